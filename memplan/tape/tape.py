"""The tape of a training step: allocations and releases of named tensors, in order.

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
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

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
    COMMUNICATION = "communication"


class Phase(str, Enum):
    """Which part of the step an event belongs to. Recomputation happens in ``BACKWARD``, clipping in
    ``OPTIMIZER``; ``SETUP`` holds what exists before the step begins."""

    SETUP = "setup"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


class Part(str, Enum):
    """What a segment is to those who play a run on an allocator.

    ``LOADED`` and ``RESTING`` are there before the step (phase ``SETUP``), the first by loading the model.
    ``UPDATE`` is where the optimizer's update begins, at which the first step makes what later ones find: the
    optimizer's states. ``EMPTIED`` has no events: there the allocator's cache is emptied. ``RENEWED`` is
    there before the step, too, made after the first one in the place of what loading has left for it.
    """

    LOADED = "loaded"
    RESTING = "resting"
    STEP = "step"
    UPDATE = "update"
    EMPTIED = "emptied"
    RENEWED = "renewed"


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
    part: Part = Part.STEP

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
    that a thread does, it has its workspace made, one of the storages ``workspaces``
    (:mod:`memplan.device.playback`). ``rank``: of the process, of those that train together; ``streams``: the
    CUDA stream of storages that are made on another than the first. ``host``: bytes of tensors that the
    process keeps on the host, what they take there, and what of that is pinned; no file has it.
    """

    provenance: str = "predicted"
    events: list[int] = field(default_factory=list)
    deltas: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    categories: list[Category] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    products: set[int] = field(default_factory=set)
    workspaces: set[int] = field(default_factory=set)
    streams: dict[int, int] = field(default_factory=dict)
    rank: int = 0
    host: tuple[int, int, int] = (0, 0, 0)
    segments: list[Segment] = field(default_factory=list)
    module: str = ""  # where the writer is now

    # -- writing ---------------------------------------------------------------------------------------

    def begin(self, phase: Phase, name: str, layer: int | None = None, part: Part = Part.STEP) -> None:
        """Close the current segment and open the next. ``part`` can't be left out in ``SETUP``."""
        assert (phase is Phase.SETUP) is not (part in (Part.STEP, Part.UPDATE)), (phase, part)
        here = len(self.events)
        if self.segments:
            self.segments[-1].stop = here
        self.segments.append(Segment(phase, name, layer, here, part=part))

    def finish(self) -> None:
        """Close the last segment; what is written after it does not count."""
        self.events = self.events[:]
        if self.segments:
            self.segments[-1].stop = len(self.events)
        sizes = self.sizes
        self.deltas = [sizes[event] if event >= 0 else -sizes[~event] for event in self.events]

    def alloc(
        self,
        nbytes: int,
        operation: str,
        category: Category,
        *,
        workspace: bool = False,
        stream: int = 0,
    ) -> int:
        """Write the birth of a storage of ``nbytes`` (not yet rounded) bytes; its index. ``workspace``: it is
        one that cuBLAS keeps for a thread."""
        index = len(self.sizes)
        self.sizes.append(rounded(nbytes))
        self.categories.append(category)
        self.operations.append(operation)
        self.modules.append(self.module)
        self.events.append(index)
        if workspace:
            self.workspaces.add(index)
        if stream:
            self.streams[index] = stream
        return index

    def free(self, index: int) -> None:
        """Write the death of a storage."""
        self.events.append(~index)

    def exchange(self, segment: Segment, sizes: list[int]) -> None:
        """Other storages, of so many bytes, in the place of those that a segment makes and that stay."""
        first, stop = self.events[segment.start], self.events[segment.stop - 1] + 1
        more = len(sizes) - (stop - first)

        def moved(index: int) -> int:
            return index + more if index >= stop else index

        self.sizes[first:stop] = map(rounded, sizes)
        columns: tuple[list[Any], ...] = (self.categories, self.operations, self.modules)
        for column in columns:
            column[first:stop] = column[first : first + 1] * len(sizes)
        self.events = [
            *self.events[: segment.start],
            *range(first, first + len(sizes)),
            *(moved(event) if event >= 0 else ~moved(~event) for event in self.events[segment.stop :]),
        ]
        self.products, self.workspaces = (set(map(moved, one)) for one in (self.products, self.workspaces))
        self.streams = {moved(index): stream for index, stream in self.streams.items()}
        for later in self.segments[self.segments.index(segment) + 1 :]:
            later.start += more
            later.stop += more
        segment.stop += more
        self.finish()

    def mark(self) -> tuple[int, int, int]:
        """Where the writer is."""
        return len(self.events), len(self.sizes), len(self.segments)

    def rewind(self, mark: tuple[int, int, int]) -> None:
        """Take back what was written since a mark. Nothing of it may be alive."""
        events, storages, segments = mark
        del self.events[events:]
        for column in (self.sizes, self.categories, self.operations, self.modules):
            del column[storages:]
        del self.segments[segments:]
        self.products = {index for index in self.products if index < storages}
        self.workspaces = {index for index in self.workspaces if index < storages}
        self.streams = {index: stream for index, stream in self.streams.items() if index < storages}

    def multiply(self) -> None:
        """Write that cuBLAS multiplies here, with all that it needs allocated."""
        self.products.add(len(self.sizes) - 1)
