"""A steady-state step as the simulated caching allocator lays it out (:mod:`memplan.device.playback`)."""

from __future__ import annotations

from typing import Literal

from memplan.device.allocator import SMALL, Allocator
from memplan.device.fit import Run
from memplan.device.playback import FIRST_STEP, Playback
from memplan.snapshot.layout import Placed
from memplan.snapshot.records import Action


def placement(run: Run) -> list[Placed]:
    """What the allocator does in the step after the first: the segments and the resting tensors as loading
    and the first step left them, then the step itself."""
    placed: list[Placed] = []
    allocator = Allocator(run.settings)
    played = Playback(run.tape, allocator)
    played.load(run.loading(None))
    played.step(FIRST_STEP)
    expandable = run.settings.expandable_segments
    take = Action.SEGMENT_MAP if expandable else Action.SEGMENT_ALLOC
    give = Action.SEGMENT_UNMAP if expandable else Action.SEGMENT_FREE

    for segment in allocator.segments():
        placed.append(Placed(take, segment.address, segment.size, pool=_pool(segment.small)))
    for storage, block in sorted(played.live.items()):
        placed.append(Placed(Action.ALLOC, block.address, block.size, storage))

    small = False

    def changed(address: int, change: int) -> None:
        placed.append(Placed(take if change > 0 else give, address, abs(change), pool=_pool(small)))

    allocator.on_segment = changed
    tape, live = run.tape, played.live
    for event in tape.events[played.begin :]:
        if event >= 0:
            small = tape.sizes[event] <= SMALL
            block = allocator.malloc(tape.sizes[event])
            live[event] = block
            placed.append(Placed(Action.ALLOC, block.address, block.size, event))
        else:
            block = live.pop(~event)
            placed.append(Placed(Action.FREE_COMPLETED, block.address, block.size, ~event))
            allocator.free(block)
    return placed


def _pool(small: bool) -> Literal["small", "large"]:
    return "small" if small else "large"
