"""What a run reserves where nothing limits it, asked many times with other sizes of the same events.

A run is loading, a step and a later step (:mod:`memplan.device.playback`). Which requests and releases it
makes is written down once; loading is played once, for its sizes do not change; small requests are played
once for all runs that have the same ones, as the two pools know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from memplan.asked.alloc_conf import AllocatorSettings
from memplan.device.allocator import Allocator, Block, Pool
from memplan.device.plain import LARGEST_SMALL, UNIT, PlainPool, units
from memplan.device.playback import FIRST_STEP, LATER_STEP, Playback
from memplan.tape import Tape

_REMEMBERED = 8  # small pools: a search comes back to the sizes about its answer
_Apart = tuple[list[int], list[int]]


def can_rerun(settings: AllocatorSettings) -> bool:
    """Whether runs with these settings are of plain pools while nothing limits them."""
    return not (settings.expandable_segments or settings.max_split_size or settings.roundup)


class Rerun:
    """A run that was written down: its ``tape`` (unfolded) and how it is loaded; ``kinds``: of each storage,
    by which sizes are told."""

    def __init__(
        self, tape: Tape, kinds: Sequence[int], loading: Tape | None, settings: AllocatorSettings
    ) -> None:
        recorder = _Recorder()
        run = Playback(tape, recorder)
        run.load(loading)
        *loaded, after = recorder.parts  # what follows the last emptying of the cache may have other sizes
        self._fixed = len(recorder.sizes) - sum(event >= 0 for event in after)
        there = [storage for storage, block in run.live.items() if block.address < self._fixed]
        run.step(FIRST_STEP)
        recorder.parts.append([])
        run.step(LATER_STEP)
        self._steps = recorder.parts[-2:]
        self._stays = {kinds[storage]: tape.sizes[storage] for storage in there}
        self._handed_on = {kinds[storage]: tape.sizes[storage] for storage in run.handed_on}
        # of each request of the steps; workspaces, which are always as large, have kinds of their own
        asked = list(zip(recorder.storages, recorder.sizes, strict=True))
        count = len(set(kinds))
        workspaces = sorted({size for storage, size in asked[self._fixed :] if storage is None})
        self._workspaces = [units(size) for size in workspaces]
        self._kinds = [
            count + workspaces.index(size) if storage is None else kinds[storage]
            for storage, size in asked[self._fixed :]
        ]
        requests = [units(size) for size in recorder.sizes]
        self._small_there = [request <= LARGEST_SMALL for request in requests[: self._fixed]]
        large_segment = settings.large_segment_size
        self._pools = PlainPool(False, large_segment), PlainPool(True, large_segment)
        self._most_loaded = 0
        for events in loaded:
            self._load(_apart(events, self._small_there), requests)
        # events of both pools, by which kinds are small; the small pool when loaded and after a step
        self._chosen: dict[tuple[bool, ...], list[_Apart]] = {}
        self._small: dict[tuple[int, ...], list[PlainPool]] = {}

    def _load(self, events: _Apart, requests: list[int]) -> None:
        for pool, chosen in zip(self._pools, events, strict=True):
            pool.play(chosen, requests)
        self._most_loaded = max(self._most_loaded, sum(pool.reserved for pool in self._pools) * UNIT)
        for pool in self._pools:
            pool.empty()

    def suits(self, sizes: Sequence[int]) -> bool:
        """Whether a run with these sizes of the kinds makes the same requests and releases: what is there
        when a step begins is as large, and what takes the place of something that a step drops is told by its
        size as before."""
        if any(sizes[kind] != size for kind, size in self._stays.items()):
            return False
        pairs = {(size, sizes[kind]) for kind, size in self._handed_on.items()}
        return len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})

    def play(self, sizes: Sequence[int]) -> Iterator[int]:
        """Bytes reserved at most up to the end of the first step, and of the later one."""
        asked = [*(units(size) for size in sizes), *self._workspaces]
        requests = [0] * self._fixed + [asked[kind] for kind in self._kinds]
        is_small = tuple(request <= LARGEST_SMALL for request in asked)
        small = self._small.setdefault(
            tuple(request if request <= LARGEST_SMALL else 0 for request in asked), [self._pools[1]]
        )
        if len(self._small) > _REMEMBERED:
            del self._small[next(iter(self._small))]
        large = self._pools[0].copy()
        for number, (events, small_events) in enumerate(self._events(is_small), 1):
            large.play(events, requests)
            if number == len(small):
                small.append(small[-1].copy())
                small[-1].play(small_events, requests)
            yield max(self._most_loaded, (large.reserved + small[number].reserved) * UNIT)

    def _events(self, is_small: tuple[bool, ...]) -> list[_Apart]:
        if is_small not in self._chosen:
            small = self._small_there + [is_small[kind] for kind in self._kinds]
            self._chosen[is_small] = [_apart(events, small) for events in self._steps]
        return self._chosen[is_small]


class _Recorder(Allocator):
    """Writes down what is asked for: a block's address is its number. A part ends where the cache is
    emptied."""

    def __init__(self) -> None:
        super().__init__()
        self._nowhere = Pool(False, 0)
        self.parts: list[list[int]] = [[]]
        self.sizes: list[int] = []
        self.storages: list[int | None] = []  # which one is asked for, unless it is a workspace

    def malloc(self, size: int, stream: int = 0) -> Block:
        block = Block(self._nowhere, len(self.sizes), size)
        self.sizes.append(size)
        self.storages.append(None)
        self.parts[-1].append(block.address)
        return block

    def play(
        self,
        events: Sequence[int],
        sizes: Sequence[int],
        live: dict[int, Block],
        streams: Mapping[int, int] | None = None,
    ) -> None:
        assert not streams, "runs of several streams are played one by one"
        for event in events:
            if event >= 0:
                live[event] = self.malloc(sizes[event])
                self.storages[-1] = event
            else:
                self.parts[-1].append(~live.pop(~event).address)

    def empty_cache(self) -> None:
        self.parts.append([])


def _apart(events: list[int], small: list[bool]) -> _Apart:
    """The events of the large pool, and of the small one."""
    large, little = (
        [event for event in events if small[event if event >= 0 else ~event] is which]
        for which in (False, True)
    )
    return large, little
