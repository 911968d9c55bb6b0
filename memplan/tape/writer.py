"""What writes a tape, and what holds of every tape that is written.

There are four kinds of writers: the shadow (:mod:`memplan.predict`), the tracer (:mod:`memplan.trace`), the
recorders of real runs (:mod:`memplan.verify`), and whoever else has a step to tell of. All that reads takes
any of their tapes.
"""

from __future__ import annotations

from typing import Protocol

from memplan.tape.tape import ALLOCATION_GRANULARITY, Category, Part, Phase, Tape


class Writer(Protocol):
    """What a step is told to; :class:`memplan.tape.Tape` is one. ``module`` is where the step is now."""

    module: str

    def begin(self, phase: Phase, name: str, layer: int | None = None, part: Part = Part.STEP) -> None:
        """What follows belongs to this phase, layer and part of a run."""

    def alloc(
        self, nbytes: int, operation: str, category: Category, *, workspace: bool = False, stream: int = 0
    ) -> int:
        """A storage is born; its number."""

    def free(self, index: int) -> None:
        """It dies."""

    def multiply(self) -> None:
        """cuBLAS multiplies, with all that it needs allocated."""

    def finish(self) -> None:
        """The step is over."""


def sound(tape: Tape) -> None:
    """Check what readers rely on. Raises AssertionError, which says what does not hold of the tape."""
    storages = len(tape.sizes)
    for column in (tape.categories, tape.operations, tape.modules):
        assert len(column) == storages, "a column has another length than the sizes"
    assert not any(size % ALLOCATION_GRANULARITY or size < 0 for size in tape.sizes), "sizes are not rounded"
    assert {*tape.products, *tape.workspaces, *tape.streams} <= set(range(storages)), "a mark has no storage"
    assert len(tape.deltas) == len(tape.events), "the tape is not finished"
    live: set[int] = set()
    born: set[int] = set()
    for event in tape.events:
        if event >= 0:
            assert event not in born, "a storage is born twice"
            born.add(event)
            live.add(event)
        else:
            assert ~event in live, "a storage dies that is not alive"
            live.remove(~event)
    place, step = 0, False
    for segment in tape.segments:
        assert place <= segment.start <= segment.stop <= len(tape.events), "segments are in no order"
        place = segment.stop
        before = segment.part in (Part.LOADED, Part.RESTING, Part.EMPTIED)
        assert before is (segment.phase is Phase.SETUP), "a segment's part does not belong to its phase"
        assert not (before and step), "something is there before the step that comes after it began"
        step = step or not before
    assert sum(segment.part is Part.UPDATE for segment in tape.segments) <= 1, "the update begins twice"
    for storage in tape.workspaces:
        assert tape.categories[storage] is Category.TEMPORARIES, "a workspace is something else besides"
