"""A tape laid out in memory, as the snapshot that PyTorch could have taken of it.

Where tensors lie is an allocator's affair: :func:`snapshot_of` takes its actions as they come and tells of
each what it was for. :func:`first_fit` is the plainest allocator there can be, to look at tensors with and
not at segments.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from memplan.snapshot.records import (
    Action,
    Block,
    BlockState,
    Frame,
    Segment,
    Snapshot,
    TraceEntry,
)
from memplan.tape import Tape

_BASE = 1 << 40  # an address; any multiple of 2 MiB will do
_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class Placed:
    """What an allocator did: ``size`` bytes of a block (alloc, free_completed) or a segment (segment_...) at
    an address. ``storage`` is the tape's number of the tensor in the block, ``pool`` the segment's. When it
    ran out of memory (oom), ``addr`` is what the device had left, as in PyTorch's own record."""

    action: Action
    addr: int
    size: int
    storage: int = -1
    pool: Literal["small", "large"] = "large"


def first_fit(tape: Tape) -> list[Placed]:
    """One segment, and every tensor in the first gap of it that is large enough."""
    placed: list[Placed] = []
    gaps = [(_BASE, 1 << 62)]  # begin and end, by address
    where: dict[int, int] = {}
    top = _BASE
    for event in tape.events:
        storage = event if event >= 0 else ~event
        size = tape.sizes[storage]
        if not size:
            continue  # PyTorch asks the allocator for nothing then
        if event >= 0:
            number = next(n for n, (begin, end) in enumerate(gaps) if end - begin >= size)
            address, end = gaps.pop(number)
            if address + size < end:
                gaps.insert(number, (address + size, end))
            where[storage] = address
            top = max(top, address + size)
            placed.append(Placed(Action.ALLOC, address, size, storage))
        else:
            address = where.pop(storage)
            _add(gaps, address, address + size)
            placed.append(Placed(Action.FREE_COMPLETED, address, size, storage))
    whole = -(-(top - _BASE) // _PAGE) * _PAGE
    return [Placed(Action.SEGMENT_ALLOC, _BASE, whole), *placed]


def snapshot_of(
    tape: Tape,
    placement: Iterable[Placed] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Snapshot:
    """The snapshot after the last event of an unfolded tape, with all events in its trace.

    ``placement`` is what an allocator did with the tape (default: :func:`first_fit`), ``settings`` are its
    settings as PyTorch would write them. The frames of an entry are not a stack but what memplan knows.
    """
    if any(segment.repeat > 1 for segment in tape.segments):
        raise ValueError("a folded tape leaves events out, so it can't be laid out: play every layer")
    told = _Frames(tape)
    held = _Held()
    trace: list[TraceEntry] = []
    for placed in first_fit(tape) if placement is None else placement:
        held.take(placed)
        if placed.action is Action.OOM:
            trace.append(TraceEntry(Action.OOM, 0, placed.size, device_free=placed.addr))
            continue
        if placed.storage < 0:
            trace.append(TraceEntry(placed.action, placed.addr, placed.size))
            continue
        storage = placed.storage
        size, frames, category = tape.sizes[storage], told[storage], tape.categories[storage].value
        if placed.action is Action.FREE_COMPLETED:  # at once: memplan's tapes know one stream
            trace.append(TraceEntry(Action.FREE_REQUESTED, placed.addr, size, frames=frames))
        trace.append(TraceEntry(placed.action, placed.addr, size, frames=frames, category=category))
    # The viewer colours by category if there are any, and then stumbles where none is called "unknown"
    # (annotate_snapshot in torch/utils/viz/MemoryViz.js). PyTorch's own snapshots end with such an entry.
    trace.append(TraceEntry(Action.SNAPSHOT, 0, 0, category="unknown"))
    origin = f"{tape.provenance} by memplan, not recorded by PyTorch"
    return Snapshot(0, tuple(held.segments(tape, told)), tuple(trace), settings or {}, origin)


class _Frames:
    """What is known of each storage, in the form of a stack trace, innermost first."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.known: dict[tuple[str, ...], tuple[Frame, ...]] = {}
        self.starts = [segment.start for segment in tape.segments]
        self.born = {event: position for position, event in enumerate(tape.events) if event >= 0}

    def __getitem__(self, storage: int) -> tuple[Frame, ...]:
        tape = self.tape
        position = self.born[storage]
        # of segments that begin together all but the last are empty
        segment = tape.segments[bisect_right(self.starts, position) - 1]
        layer = "none" if segment.layer is None else str(segment.layer)
        key = (
            tape.operations[storage],
            tape.modules[storage] or "none",
            layer,
            f"{segment.phase.value} ({segment.name})",
            tape.categories[storage].value,
        )
        frames = self.known.get(key)
        if frames is None:
            titles = ("operation", "module", "layer", "phase", "category")
            frames = tuple(Frame(title, 0, text) for title, text in zip(titles, key, strict=True))
            frames += (Frame("memplan", 0, f"{tape.provenance}, not recorded by PyTorch"),)
            self.known[key] = frames
        return frames


class _Held:
    """What an allocator holds: stretches of memory, and the blocks in them."""

    def __init__(self) -> None:
        self.mallocs: dict[int, int] = {}  # sizes by address
        self.mapped: list[tuple[int, int]] = []  # begin and end, by address
        self.blocks: dict[int, Placed] = {}  # by address
        self.small: list[int] = []  # where small segments were made or mapped

    def take(self, placed: Placed) -> None:
        """Follow one action."""
        begin, end = placed.addr, placed.addr + placed.size
        if placed.pool == "small":
            insort(self.small, begin)
        match placed.action:
            case Action.ALLOC:
                self.blocks[begin] = placed
            case Action.FREE_COMPLETED:
                del self.blocks[begin]
            case Action.SEGMENT_ALLOC:
                self.mallocs[begin] = placed.size
            case Action.SEGMENT_FREE:
                del self.mallocs[begin]
            case Action.SEGMENT_MAP:
                _add(self.mapped, begin, end)
            case Action.SEGMENT_UNMAP:
                number = bisect_right(self.mapped, (begin, 1 << 63)) - 1
                first, last = self.mapped.pop(number)
                self.mapped[number:number] = [
                    part for part in ((first, begin), (end, last)) if part[0] < part[1]
                ]

    def segments(self, tape: Tape, told: _Frames) -> Iterator[Segment]:
        """The segments as they lie, with their blocks and the gaps between them."""
        stretches = [(begin, begin + size, False) for begin, size in self.mallocs.items()]
        stretches += [(begin, end, True) for begin, end in self.mapped]
        addresses = sorted(self.blocks)
        for begin, end, expandable in sorted(stretches):
            inside = addresses[bisect_left(addresses, begin) : bisect_left(addresses, end)]
            blocks: list[Block] = []
            reached = begin
            for address in [*inside, end]:
                if address > reached:
                    blocks.append(Block(reached, address - reached, 0, BlockState.INACTIVE))
                if address < end:
                    block = self.blocks[address]
                    requested = tape.sizes[block.storage]
                    frames = told[block.storage]
                    blocks.append(Block(address, block.size, requested, BlockState.ALLOCATED, frames))
                    reached = address + block.size
            small = bisect_left(self.small, begin) < bisect_left(self.small, end)
            live = sum(block.size for block in blocks if block.state is BlockState.ALLOCATED)
            yield Segment(
                address=begin,
                total_size=end - begin,
                allocated_size=live,
                active_size=live,
                requested_size=sum(block.requested_size for block in blocks),
                stream=0,
                segment_type="small" if small else "large",
                is_expandable=expandable,
                blocks=tuple(blocks),
            )


def _add(stretches: list[tuple[int, int]], begin: int, end: int) -> None:
    """Add a stretch to others that are sorted and apart, and join it with those that it touches."""
    number = bisect_left(stretches, (begin, end))
    if number < len(stretches) and stretches[number][0] == end:
        end = stretches.pop(number)[1]
    if number and stretches[number - 1][1] == begin:
        number -= 1
        begin = stretches.pop(number)[0]
    stretches.insert(number, (begin, end))
