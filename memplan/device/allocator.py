"""PyTorch's CUDA caching allocator, simulated: which block a request gets, and what is reserved for it.

The specification is c10/cuda/CUDACachingAllocator.cpp (constants: c10/core/AllocatorConfig.h, torch 2.13);
methods carry the names of its functions. One device; a pool of small and one of large blocks a stream, as
the comparison of blocks (by stream, then size, then address) keeps streams apart there. Bytes are ``int``.

The driver hands out addresses upwards here, and never the same twice. Addresses decide only between free
blocks of equal size.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from memplan.asked.alloc_conf import AllocatorSettings

MIB = 1 << 20

MIN_BLOCK = 512  # kMinBlockSize: every request is rounded to a multiple of it
SMALL = MIB  # kSmallSize: the largest request that the small pool serves
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer: the segments that small requests are cut from
MIN_LARGE = 10 * MIB  # kMinLargeAlloc: smaller ones are cut from segments of large_segment_size
ROUND_LARGE = 2 * MIB  # kRoundLarge: what larger segments are rounded to

ADDRESS_BITS = 64


class OutOfMemory(Exception):
    """The driver gives no more: ``requested`` bytes were asked for, ``reserved`` are held already."""

    def __init__(self, requested: int, reserved: int) -> None:
        super().__init__(f"{requested} bytes asked for, {reserved} reserved")
        self.requested, self.reserved = requested, reserved


class Block:
    """A stretch of a segment: handed out, or free in its pool. ``previous`` and ``next`` are its neighbours
    in the segment; ``born`` is the pool's count of searches when it became free (for garbage collection).
    An unmapped block is address space of an expandable segment that has no memory yet."""

    __slots__ = ("address", "born", "expandable", "free", "mapped", "next", "pool", "previous", "size")

    def __init__(self, pool: Pool, address: int, size: int, expandable: Expandable | None = None) -> None:
        self.pool, self.address, self.size = pool, address, size
        self.previous: Block | None = None
        self.next: Block | None = None
        self.free = True
        self.mapped = True
        self.born = 0
        self.expandable = expandable

    @property
    def is_split(self) -> bool:
        """Whether the segment has other blocks."""
        return self.previous is not None or self.next is not None


class Pool:
    """Free blocks of one stream and kind: ``keys`` are their sizes and addresses as one number each, which
    compares fastest, in order; ``blocks`` has the block of each key."""

    __slots__ = ("blocks", "keys", "searches", "small", "stream", "unmapped")

    def __init__(self, small: bool, stream: int) -> None:
        self.small, self.stream = small, stream
        self.keys: list[int] = []
        self.blocks: dict[int, Block] = {}
        self.unmapped: list[tuple[int, Block]] = []
        self.searches = 0

    def insert(self, block: Block) -> None:
        """Keep a free block."""
        block.born = self.searches
        key = block.size << ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.blocks[key] = block

    def remove(self, block: Block) -> None:
        """Forget a free block."""
        key = block.size << ADDRESS_BITS | block.address
        del self.blocks[key], self.keys[bisect_left(self.keys, key)]

    def take(self, at: int) -> Block:
        """Forget the free block of the key at this place, and give it."""
        return self.blocks.pop(self.keys.pop(at))

    def in_order(self) -> list[Block]:
        """The free blocks by size, then address."""
        return [self.blocks[key] for key in self.keys]

    def remove_unmapped(self, block: Block) -> None:
        """Forget a stretch of address space."""
        unmapped = self.unmapped
        del unmapped[bisect_left(unmapped, (block.address,))]


@dataclass(slots=True)
class Expandable:
    """An expandable segment: address space for more than the card, mapped ``page`` bytes at a time."""

    address: int
    page: int


@dataclass(frozen=True, slots=True)
class SegmentView:
    """A segment as ``torch.cuda.memory_snapshot`` shows it: its blocks are (size, whether in use)."""

    address: int
    size: int
    stream: int
    small: bool
    blocks: tuple[tuple[int, bool], ...]


class Allocator:
    """The allocator of one device.

    ``capacity``: bytes that the driver can give (None: without end). ``limit``: what
    ``set_per_process_memory_fraction`` allows, if it was called; garbage collection works only then.
    ``on_segment`` is told each change of what is reserved: (address, bytes), negative when given back;
    ``position`` is then the event that :meth:`play` plays.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        *,
        capacity: int | None = None,
        limit: int | None = None,
        on_segment: Callable[[int, int], None] | None = None,
        place: Callable[[int], int] | None = None,
    ) -> None:
        self.settings = settings or AllocatorSettings()
        self.capacity, self.limit = capacity, limit
        self.on_segment = on_segment
        self.place = place or self._next_address
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        self.position = 0
        self._pools: dict[tuple[int, bool], Pool] = {}
        self._heads: dict[int, Block] = {}  # a block of each segment; its first one is found by walking
        self._top = 1 << 40  # an address; PyTorch's begin somewhere there too
        self._collects = limit is not None and self.settings.garbage_collection_threshold > 0
        self._plain = not (
            self.settings.expandable_segments or self.settings.max_split_size or self._collects
        )

    # -- requests --------------------------------------------------------------------------------------

    def malloc(self, size: int, stream: int = 0) -> Block:
        """A block for a request of ``size`` bytes. Raises OutOfMemory."""
        size = self.round_size(size)
        small = size <= SMALL
        pool = self._pools.get((stream, small)) or self._pool(stream, small)
        if self._plain:
            # get_free_block: the smallest block that is large enough, of these the lowest
            at = bisect_left(pool.keys, size << ADDRESS_BITS)
            block = pool.take(at) if at < len(pool.keys) else self._new_block(pool, size)
        else:
            block = self._get_free_block(pool, size) or self._new_block(pool, size)
        remaining = block.size - size
        if remaining and (remaining > SMALL or small or not self._plain):
            if self._plain or self._should_split(pool, size, remaining):
                rest = Block(pool, block.address + size, remaining, block.expandable)
                after = rest.next = block.next
                if after is not None:
                    after.previous = rest
                rest.previous = block
                block.next = rest
                block.size = size
                pool.insert(rest)
        block.free = False
        allocated = self.allocated = self.allocated + block.size
        if allocated > self.peak_allocated:
            self.peak_allocated = allocated
        return block

    def free(self, block: Block) -> None:
        """Take a block back: merge it with free neighbours and keep it."""
        self.allocated -= block.size
        block.free = True
        pool = block.pool
        before, after = block.previous, block.next
        if before is not None and before.free and before.mapped:
            self._merge(block, before, pool)
        if after is not None and after.free and after.mapped:
            self._merge(block, after, pool)
        pool.insert(block)

    def play(
        self,
        events: Sequence[int],
        sizes: Sequence[int],
        live: dict[int, Block],
        streams: Mapping[int, int] | None = None,
    ) -> None:
        """Requests and releases in a row: ``sizes[event]`` bytes for an event of zero or more, whose block
        comes into ``live``; for one below, the block of ``~event`` is taken back. ``streams``: of the events
        of another stream than 0.

        What :meth:`malloc` and :meth:`free` do, one by one; where nothing is set that asks for more it is
        written out here in a third less time, which is most of what a plan takes.
        """
        self.position = -1
        if not self._plain or self.settings.roundup or streams:
            streams = streams or {}
            for self.position, event in enumerate(events):
                if event >= 0:
                    live[event] = self.malloc(sizes[event], streams.get(event, 0))
                else:
                    self.free(live.pop(~event))
            return
        pools = self._pool(0, False), self._pool(0, True)
        keys_of, blocks_of = [pool.keys for pool in pools], [pool.blocks for pool in pools]
        allocated, peak = self.allocated, self.peak_allocated
        for position, event in enumerate(events):
            if event >= 0:
                size = sizes[event]
                if size & 511 or not size:
                    size = self.round_size(size)
                small = size <= SMALL
                keys, blocks = keys_of[small], blocks_of[small]
                at = bisect_left(keys, size << ADDRESS_BITS)
                if at < len(keys):
                    block = blocks.pop(keys.pop(at))
                else:
                    self.position, self.allocated, self.peak_allocated = position, allocated, peak
                    block = self._new_block(pools[small], size)
                remaining = block.size - size
                if remaining and (small or remaining > SMALL):
                    rest = Block(block.pool, block.address + size, remaining)
                    after = rest.next = block.next
                    if after is not None:
                        after.previous = rest
                    rest.previous = block
                    block.next = rest
                    block.size = size
                    key = remaining << ADDRESS_BITS | rest.address
                    insort(keys, key)
                    blocks[key] = rest
                block.free = False
                allocated += block.size
                if allocated > peak:
                    peak = allocated
                live[event] = block
            else:
                block = live.pop(~event)
                size = block.size
                allocated -= size
                small = block.pool.small
                keys, blocks = keys_of[small], blocks_of[small]
                other = block.previous
                if other is not None and other.free:
                    key = other.size << ADDRESS_BITS | other.address
                    del blocks[key], keys[bisect_left(keys, key)]
                    size += other.size
                    block.address = other.address
                    before = block.previous = other.previous
                    if before is None:
                        self._heads[block.address] = block
                    else:
                        before.next = block
                other = block.next
                if other is not None and other.free:
                    key = other.size << ADDRESS_BITS | other.address
                    del blocks[key], keys[bisect_left(keys, key)]
                    size += other.size
                    after = block.next = other.next
                    if after is not None:
                        after.previous = block
                block.size = size
                block.free = True
                key = size << ADDRESS_BITS | block.address
                insort(keys, key)
                blocks[key] = block
        self.position = len(events) - 1
        self.allocated, self.peak_allocated = allocated, peak

    def empty_cache(self) -> None:
        """``torch.cuda.empty_cache``: give back every segment that nothing lies in."""
        self._release_cached_blocks()

    def give_back(self, address: int) -> int:
        """Give one segment back that nothing lies in, as ``empty_cache`` does with all; its bytes, or 0 if it
        has gone already."""
        block = self._heads.get(address)
        if block is None or not block.free or block.is_split:
            return 0
        self._release(block)
        return block.size

    def reset_peaks(self) -> None:
        """``torch.cuda.reset_peak_memory_stats``."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def round_size(self, size: int) -> int:
        """``round_size``: to 512 bytes, or to a division of a power of two."""
        if size < MIN_BLOCK:
            return MIN_BLOCK
        if self.settings.roundup:
            divisions = self.settings.divisions(size)
            if divisions > 1 and size > MIN_BLOCK * divisions:
                return _next_division(size, divisions)
        return (size + MIN_BLOCK - 1) // MIN_BLOCK * MIN_BLOCK

    def segments(self) -> Iterator[SegmentView]:
        """All segments, by address; of expandable ones their mapped stretches."""
        for _, head in sorted(self._heads.items()):
            block: Block | None = head
            while block is not None and block.previous is not None:
                block = block.previous
            stretch: list[Block] = []
            while block is not None:
                if block.mapped:
                    stretch.append(block)
                if stretch and (not block.mapped or block.next is None):
                    yield _view(stretch)
                    stretch = []
                block = block.next

    # -- finding a block -------------------------------------------------------------------------------

    def _pool(self, stream: int, small: bool) -> Pool:
        return self._pools.setdefault((stream, small), Pool(small, stream))

    def _get_free_block(self, pool: Pool, size: int) -> Block | None:
        """``get_free_block`` with settings that are not the default."""
        keys, blocks = pool.keys, pool.blocks
        if self._collects:
            pool.searches += 1
        at = bisect_left(keys, size << ADDRESS_BITS)
        if at == len(keys):
            return None
        if blocks[keys[at]].expandable is not None:
            # a block that can grow counts as large as it can become
            while at + 1 < len(keys) and _growth(blocks[keys[at + 1]]) < _growth(blocks[keys[at]]):
                at += 1
        largest_split = self.settings.max_split_size
        if largest_split:
            found = blocks[keys[at]].size
            if size < largest_split <= found:
                return None  # an oversized block is not for a small request
            if size >= largest_split and found >= size + self.settings.max_non_split_rounding:
                return None
        return pool.take(at)

    def _new_block(self, pool: Pool, size: int) -> Block:
        """What ``malloc`` does when no free block fits: collect, ask the driver, release, ask again."""
        if self._collects:
            self._garbage_collect(pool)
        needed = self.allocation_size(size)
        block = self._alloc_block(pool, size, needed)
        if block is None and self._release_available(pool, size):
            block = self._alloc_block(pool, size, needed)
        if block is None:
            self._release_cached_blocks()
            self.retries += 1
            block = self._alloc_block(pool, size, needed)
        if block is None:
            raise OutOfMemory(size, self.reserved)
        return block

    def allocation_size(self, size: int) -> int:
        """``get_allocation_size``: the segment that is asked for when ``size`` bytes are needed."""
        if size <= SMALL:
            return SMALL_SEGMENT
        if size < MIN_LARGE:
            return self.settings.large_segment_size
        return (size + ROUND_LARGE - 1) // ROUND_LARGE * ROUND_LARGE

    def _alloc_block(self, pool: Pool, size: int, needed: int) -> Block | None:
        if self.limit is not None and self.reserved + needed > self.limit:
            return None
        if self.settings.expandable_segments:
            return self._expand(pool, size)
        if self.capacity is not None and self.reserved + needed > self.capacity:
            return None
        block = Block(pool, self.place(needed), needed)
        self._heads[block.address] = block
        self._reserve(block.address, needed)
        return block

    def _should_split(self, pool: Pool, size: int, remaining: int) -> bool:
        if pool.small or self.settings.expandable_segments:
            return remaining >= MIN_BLOCK
        largest = self.settings.max_split_size
        return remaining > SMALL and (not largest or size < largest)

    def _merge(self, block: Block, other: Block, pool: Pool) -> None:
        """``try_merge_blocks``: ``block`` takes in its neighbour ``other``, which is free."""
        if other.mapped:
            pool.remove(other)
        else:
            pool.remove_unmapped(other)
        if other is block.previous:
            block.address = other.address
            block.previous = other.previous
            if block.previous is not None:
                block.previous.next = block
        else:
            block.next = other.next
            if block.next is not None:
                block.next.previous = block
        block.size += other.size
        if block.previous is None:
            start = block.expandable.address if block.expandable else block.address
            self._heads[start] = block

    # -- what the driver gives and takes ---------------------------------------------------------------

    def _next_address(self, size: int) -> int:
        address = self._top
        self._top += (size + ROUND_LARGE - 1) // ROUND_LARGE * ROUND_LARGE
        return address

    def _reserve(self, address: int, change: int) -> None:
        self.reserved += change
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
        if self.on_segment is not None:
            self.on_segment(address, change)

    def _release(self, block: Block) -> None:
        """``release_block``: give a segment back."""
        block.pool.remove(block)
        del self._heads[block.address]
        self._reserve(block.address, -block.size)

    def _release_available(self, pool: Pool, size: int) -> bool:
        """``release_available_cached_blocks``: only enough oversized blocks for the request."""
        largest = self.settings.max_split_size
        if not largest:
            return False
        wanted = max(size, largest)
        blocks = pool.in_order()
        at = bisect_left(pool.keys, wanted << ADDRESS_BITS)
        if at < len(blocks) and blocks[at].expandable is None:
            self._release(blocks[at])
            return True
        # no single one, so the largest first; expandable segments can't be given back whole
        released = 0
        for block in reversed(blocks[:at]):
            if released >= wanted or block.size < largest:
                break
            if block.expandable is None:
                self._release(block)
                released += block.size
        return released >= wanted

    def _release_cached_blocks(self) -> None:
        for pool in sorted(self._pools.values(), key=lambda pool: pool.small):
            expandable = []
            for block in pool.in_order():
                if block.expandable is not None:
                    expandable.append(block)
                elif not block.is_split:
                    self._release(block)
            for block in expandable:
                self._unmap(block)

    def _garbage_collect(self, pool: Pool) -> None:
        """``garbage_collect_cached_blocks``: above the threshold, give back what was longest unused."""
        assert self.limit is not None
        threshold = int(self.settings.garbage_collection_threshold * self.limit)
        if self.reserved <= threshold:
            return
        target = self.reserved - threshold
        large = self._pool(pool.stream, False)
        whole = [b for b in large.in_order() if not b.is_split and b.expandable is None]
        age = sum(large.searches - block.born for block in whole)
        count, reclaimed, freed = len(whole), 0, True
        while reclaimed < target and freed and count:
            limit = age / count
            freed = False
            for block in whole[:]:
                if large.searches - block.born >= limit:
                    freed = True
                    reclaimed += block.size
                    age -= large.searches - block.born
                    count -= 1
                    whole.remove(block)
                    self._release(block)

    # -- expandable segments ---------------------------------------------------------------------------

    def _expand(self, pool: Pool, size: int) -> Block | None:
        """``try_allocate_expandable_block``: map memory at the lowest address where the request fits."""
        block = self._find_expandable(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            rest = block.next
            assert rest is not None
            if not self._map(rest, min(size - block.size, rest.size)):
                return None
            block = rest
        pool.remove(block)
        return block

    def _find_expandable(self, pool: Pool, size: int) -> Block:
        """``find_expandable_block``: free memory followed by address space, or address space alone."""
        for _, unmapped in pool.unmapped:
            start = unmapped
            if start.previous is not None and start.previous.free:
                start = start.previous
            room, block = 0, start
            while room < size and block is not None and block.free:
                room += block.size
                block = block.next  # type: ignore[assignment]
            if room >= size:
                return start
        page = SMALL_SEGMENT if pool.small else self.settings.large_segment_size
        # address space for 1 1/8 of the card; for one without end, of what no card has, or of this request
        card = max(1 << 40, size) if self.capacity is None else self.capacity
        space = -(-card * 9 // (8 * page)) * page
        segment = Expandable(self.place(space), page)
        fresh = Block(pool, segment.address, space, segment)
        fresh.mapped = False
        self._heads[segment.address] = fresh
        insort(pool.unmapped, (fresh.address, fresh))
        return fresh

    def _map(self, block: Block, size: int) -> bool:
        """``map_block``: whole pages from the block's address on. False where the driver has no more."""
        segment, pool = block.expandable, block.pool
        assert segment is not None
        size = (size + segment.page - 1) // segment.page * segment.page
        # whole pages may go beyond the limit: alloc_block has compared what is asked for, and no more
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        pool.remove_unmapped(block)
        block.mapped = True
        if size < block.size:
            rest = Block(pool, block.address + size, block.size - size, segment)
            rest.mapped = False
            rest.previous, rest.next = block, block.next
            if rest.next is not None:
                rest.next.previous = rest
            block.next, block.size = rest, size
            insort(pool.unmapped, (rest.address, rest))
        self._reserve(block.address, size)
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.free and neighbour.mapped:
                self._merge(block, neighbour, pool)
        pool.insert(block)
        return True

    def _unmap(self, block: Block) -> None:
        """``unmap_block``: give back the whole pages that a free block covers."""
        segment, pool = block.expandable, block.pool
        assert segment is not None
        first = -(-(block.address - segment.address) // segment.page) * segment.page + segment.address
        last = (block.address + block.size - segment.address) // segment.page * segment.page + segment.address
        if first >= last:
            return
        pool.remove(block)
        end = block.address + block.size
        for address, size in ((block.address, first - block.address), (last, end - last)):
            if not size:
                continue
            piece = Block(pool, address, size, segment)
            if address < first:
                piece.previous, piece.next = block.previous, block
                if piece.previous is not None:
                    piece.previous.next = piece
                block.previous = piece
            else:
                piece.previous, piece.next = block, block.next
                if piece.next is not None:
                    piece.next.previous = piece
                block.next = piece
            pool.insert(piece)
        block.address, block.size, block.mapped = first, last - first, False
        self._reserve(first, first - last)
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.free and not neighbour.mapped:
                self._merge(block, neighbour, pool)
        insort(pool.unmapped, (block.address, block))


def _growth(block: Block) -> int:
    after = block.next
    return block.size + (after.size if after is not None and not after.mapped else 0)


def _next_division(size: int, divisions: int) -> int:
    """``roundup_power2_next_division``: the next of ``divisions`` equal steps between powers of two."""
    if size <= 4 or divisions <= 1:
        return size
    if size & (size - 1) == 0:
        return size
    floor = 1 << (size.bit_length() - 1)
    step = floor >> (divisions.bit_length() - 1)
    if step == 0:
        return floor << 1
    down = size & ~(step - 1)
    return down if down == size else down + step


def _view(blocks: list[Block]) -> SegmentView:
    first = blocks[0]
    return SegmentView(
        first.address,
        sum(block.size for block in blocks),
        first.pool.stream,
        first.pool.small,
        tuple((block.size, not block.free) for block in blocks),
    )
