"""A snapshot's own history on the simulated allocator: does it end in the snapshot's segments?

The history of ``torch.cuda.memory._record_memory_history`` has every request, every release and every
segment. Requests and releases are played; addresses of segments are taken from the history, because the
driver gives them; which block a request gets, when a segment is needed and when one is given back is the
simulation's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from memplan.asked.alloc_conf import AllocatorSettings
from memplan.device.allocator import Allocator, Block
from memplan.errors import MemplanError
from memplan.snapshot.records import Action, Snapshot


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of it. ``difference`` tells the first request that got another block, or the first segment
    that differs at the end; None: all is as recorded. Bytes."""

    requests: int
    reserved_bytes: int
    recorded_reserved_bytes: int
    difference: str | None


def replay(snapshot: Snapshot, settings: AllocatorSettings | None = None) -> Replayed:
    """Play a snapshot's history, which must be whole: recorded from before the first allocation on.

    Raises MemplanError for one that has lost its beginning, or with expandable segments, whose address space
    the history does not tell.
    """
    if any(segment.is_expandable for segment in snapshot.segments):
        raise MemplanError(
            "a history of expandable segments can't be replayed: it does not tell address space"
        )
    segments = deque(
        (entry.addr, entry.size) for entry in snapshot.trace if entry.action is Action.SEGMENT_ALLOC
    )

    def place(size: int) -> int:
        if not segments:
            raise _Differs(f"a segment of {size} bytes is needed, the history has no more")
        address, recorded = segments.popleft()
        if recorded != size:
            raise _Differs(f"a segment of {size} bytes is needed, the history has one of {recorded}")
        return address

    allocator = Allocator(settings, place=place)
    requests = 0
    live: dict[int, Block] = {}
    try:
        for entry in snapshot.trace:
            if entry.action is Action.ALLOC:
                requests += 1
                block = allocator.malloc(entry.size, entry.stream)
                if block.address != entry.addr:
                    raise _Differs(
                        f"request {requests}, of {entry.size} bytes, got the block at {entry.addr:#x}, "
                        f"not that at {block.address:#x}"
                    )
                live[entry.addr] = block
            elif entry.action is Action.FREE_COMPLETED:
                if entry.addr not in live:
                    raise MemplanError(
                        f"the history releases a block at {entry.addr:#x} that it never allocates: it has "
                        "lost its beginning; record from the start of the process, with more max_entries"
                    )
                allocator.free(live.pop(entry.addr))
            elif entry.action is Action.SEGMENT_FREE:
                allocator.give_back(entry.addr)
    except _Differs as error:
        return Replayed(requests, allocator.reserved, snapshot.reserved_bytes, str(error))
    return Replayed(
        requests, allocator.reserved, snapshot.reserved_bytes, _segments_differ(allocator, snapshot)
    )


class _Differs(Exception):
    pass


def _segments_differ(allocator: Allocator, snapshot: Snapshot) -> str | None:
    ours = {segment.address: segment for segment in allocator.segments()}
    recorded = {segment.address: segment for segment in snapshot.segments}
    for address in sorted(ours.keys() | recorded.keys()):
        here, there = ours.get(address), recorded.get(address)
        if here is None or there is None:
            return f"the segment at {address:#x} is {'not ' if here is None else 'only '}in the simulation"
        blocks = tuple(size for size, _ in here.blocks)
        if blocks != tuple(block.size for block in there.blocks):
            return f"the segment at {address:#x} is divided in another way"
    return None
