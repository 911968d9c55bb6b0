"""The tape of a training step: allocations and releases of named tensors, in order, and its replay.

Whoever writes a tape (the shadow of eager PyTorch, the tracer, the recorder of a real run), the same
functions read it. Bytes are ``int`` and already rounded to the allocator's 512-byte granularity
(``kMinBlockSize`` in c10/cuda/CUDACachingAllocator.cpp).

A tape is a list of *segments*. A segment belongs to one phase and, inside the decoder, to one layer.
In a *folded* tape one segment of each run of identical layers stands for ``repeat`` of them: its
events happen ``repeat`` times in a row. Or segments of like layers are the same stretch of events, each with
its own ``layer``. Replay reads folded and unfolded tapes alike.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate

ALLOCATION_GRANULARITY = 512


class Category(str, Enum):
    """What a byte is for."""

    WEIGHTS = "weights"
    QUANTIZATION_STATE = "quantization_state"
    ADAPTERS = "adapters"
    GRADIENTS = "gradients"
    OPTIMIZER_STATE = "optimizer_state"
    ACTIVATIONS = "activations"
    LOGITS_AND_LOSS = "logits_and_loss"
    TEMPORARIES = "temporaries"


class Phase(str, Enum):
    """Which part of the step an event belongs to. Recomputation happens in ``BACKWARD``, clipping in
    ``OPTIMIZER``; ``SETUP`` holds what exists before the step begins."""

    SETUP = "setup"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


def rounded(nbytes: int) -> int:
    """Bytes the caching allocator charges for a request: a multiple of 512, nothing for nothing."""
    return -(-nbytes // ALLOCATION_GRANULARITY) * ALLOCATION_GRANULARITY


@dataclass(slots=True)
class Segment:
    """A stretch of events ``start:stop`` of one phase; ``layer`` is the decoder layer it ran in, or None.

    ``name`` tells apart the runs of layer segments inside a phase, for example the foreach lists of an
    optimizer. In folded tapes a segment of ``repeat`` > 1 stands for that many repetitions of the layers
    that begin at the events ``marks``; ``layer`` is the first of all, ``direction`` says which is next.
    """

    phase: Phase
    name: str
    layer: int | None
    start: int
    stop: int = 0
    repeat: int = 1
    marks: tuple[int, ...] = ()
    direction: int = 1

    def layer_at(self, position: int, repetition: int) -> int | None:
        """The layer of the event at ``position`` in one of the repetitions."""
        if self.layer is None or not self.marks:
            return self.layer
        inside = bisect_right(self.marks, position) - 1
        return self.layer + self.direction * (repetition * len(self.marks) + inside)


@dataclass(slots=True)
class Tape:
    """Events and the storages they are about, in columns.

    ``events[i]`` is a storage's index when it is allocated and its complement (``~index``) when it is
    released; ``deltas[i]``, filled in by :meth:`finish`, is the change in live bytes that it makes. The
    other lists are per storage. ``products`` are storages after whose birth cuBLAS multiplies: the first time
    that a thread does, it has its workspace made (:mod:`memplan.reserved`).
    """

    provenance: str = "predicted"
    events: list[int] = field(default_factory=list)
    deltas: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    categories: list[Category] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    products: set[int] = field(default_factory=set)
    segments: list[Segment] = field(default_factory=list)
    module: str = ""  # where the writer is now

    # -- writing ---------------------------------------------------------------------------------------

    def begin(self, phase: Phase, name: str, layer: int | None = None) -> None:
        """Close the current segment and open the next."""
        here = len(self.events)
        if self.segments:
            self.segments[-1].stop = here
        self.segments.append(Segment(phase, name, layer, here))

    def finish(self) -> None:
        """Close the last segment; what is written after it does not count."""
        self.events = self.events[:]
        if self.segments:
            self.segments[-1].stop = len(self.events)
        sizes = self.sizes
        self.deltas = [sizes[event] if event >= 0 else -sizes[~event] for event in self.events]

    def alloc(self, nbytes: int, operation: str, category: Category) -> int:
        """Write the birth of a storage of ``nbytes`` (not yet rounded) bytes; its index."""
        index = len(self.sizes)
        self.sizes.append(rounded(nbytes))
        self.categories.append(category)
        self.operations.append(operation)
        self.modules.append(self.module)
        self.events.append(index)
        return index

    def free(self, index: int) -> None:
        """Write the death of a storage."""
        self.events.append(~index)

    def multiply(self) -> None:
        """Write that cuBLAS multiplies here, with all that it needs allocated."""
        self.products.add(len(self.sizes) - 1)


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest point of a tape: live bytes, where it is, and whose bytes they are."""

    allocated_bytes: int
    phase: Phase
    operation: str
    module: str
    layer: int | None
    segment: str
    by_category: dict[Category, int]


@dataclass(frozen=True, slots=True)
class Point:
    """Live bytes by category after one event."""

    phase: Phase
    layer: int | None
    operation: str
    by_category: dict[Category, int]

    @property
    def allocated_bytes(self) -> int:
        """Live bytes in all categories."""
        return sum(self.by_category.values())


def replay(tape: Tape) -> Peak:
    """The first highest point of the tape, with its bytes by category."""
    live = 0
    best = -1
    best_segment = best_event = best_round = 0
    known: dict[tuple[int, int], tuple[int, int, int]] = {}
    for number, segment in enumerate(tape.segments):
        stretch = segment.start, segment.stop
        if segment.start >= segment.stop:
            continue
        if stretch not in known:
            profile = list(accumulate(tape.deltas[segment.start : segment.stop]))
            top = max(profile)
            known[stretch] = profile[-1], top, segment.start + profile.index(top)
        net, top, highest = known[stretch]
        # Of equal repetitions the last is highest if each leaves something behind, else the first.
        round_ = segment.repeat - 1 if net > 0 else 0
        if live + round_ * net + top > best:
            best = live + round_ * net + top
            best_segment, best_event, best_round = number, highest, round_
        live += segment.repeat * net
    at = tape.segments[best_segment]
    storage = tape.events[best_event]
    return Peak(
        allocated_bytes=best,
        phase=at.phase,
        operation=tape.operations[storage],
        module=tape.modules[storage],
        layer=at.layer_at(best_event, best_round),
        segment=at.name,
        by_category=_by_category(tape, best_segment, best_event, best_round),
    )


def _by_category(tape: Tape, number: int, event: int, rounds: int) -> dict[Category, int]:
    totals = dict.fromkeys(Category, 0)
    events, deltas, categories = tape.events, tape.deltas, tape.categories

    def add(start: int, stop: int, times: int) -> None:
        for position in range(start, stop):
            index = events[position]
            totals[categories[index if index >= 0 else ~index]] += deltas[position] * times

    times: dict[tuple[int, int], int] = {}
    for segment in tape.segments[:number]:
        stretch = segment.start, segment.stop
        times[stretch] = times.get(stretch, 0) + segment.repeat
    for (start, stop), count in times.items():
        add(start, stop, count)
    here = tape.segments[number]
    add(here.start, here.stop, rounds)
    add(here.start, event + 1, 1)
    return totals


def timeline(tape: Tape) -> Iterator[Point]:
    """Live bytes by category after every event of the step, repetitions unrolled."""
    totals = dict.fromkeys(Category, 0)
    for segment in tape.segments:
        for round_ in range(segment.repeat):
            for position in range(segment.start, segment.stop):
                index = tape.events[position]
                storage = index if index >= 0 else ~index
                totals[tape.categories[storage]] += tape.deltas[position]
                yield Point(
                    segment.phase, segment.layer_at(position, round_), tape.operations[storage], dict(totals)
                )


def static_bytes(tape: Tape) -> dict[Category, int]:
    """Bytes by category that are alive when the step begins (all that ``SETUP`` leaves)."""
    totals = dict.fromkeys(Category, 0)
    for segment in tape.segments:
        if segment.phase is Phase.SETUP:
            for position in range(segment.start, segment.stop):
                index = tape.events[position]
                category = tape.categories[index if index >= 0 else ~index]
                totals[category] += tape.deltas[position] * segment.repeat
    return totals
