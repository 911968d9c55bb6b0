"""The tape of a training step: allocations and releases of named tensors, in order; what writes it, and what
reads it."""

from memplan.tape.replay import Peak, Point, replay, static_bytes, timeline
from memplan.tape.tape import ALLOCATION_GRANULARITY, Category, Part, Phase, Segment, Tape, rounded

__all__ = [
    "ALLOCATION_GRANULARITY",
    "Category",
    "Part",
    "Peak",
    "Phase",
    "Point",
    "Segment",
    "Tape",
    "replay",
    "rounded",
    "static_bytes",
    "timeline",
]
