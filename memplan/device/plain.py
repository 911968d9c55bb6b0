"""A pool of the caching allocator where nothing limits it and nothing is set, for what is asked many times.

It does what :meth:`memplan.device.allocator.Allocator.play` does, by numbers alone: no block is made, for
nobody looks at one, and a state is copied rather than played again. tests/test_rerun.py holds the two against
each other. Sizes and addresses are counted in ``UNIT`` bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from memplan.device.allocator import MIN_BLOCK, MIN_LARGE, ROUND_LARGE, SMALL, SMALL_SEGMENT

UNIT = MIN_BLOCK
LARGEST_SMALL = SMALL // UNIT
_BITS = 36  # of an address: 32 TiB
_ADDRESS = (1 << _BITS) - 1


def units(size: int) -> int:
    """A request, as the allocator rounds it."""
    return -(-size // UNIT) or 1


class PlainPool:
    """The blocks of one pool; ``reserved``: of all its segments.

    A free block is a key, its size and its address in one number. Keys are in order, and are found by where
    their blocks start and end, too. Segments lie apart, so what touches is of one segment.
    """

    def __init__(self, small: bool, large_segment: int) -> None:
        self.small, self.large_segment = small, large_segment // UNIT
        self.reserved = 0
        self._keys: list[int] = []
        self._starts: dict[int, int] = {}  # the free block at an address
        self._ends: dict[int, int] = {}  # the one that ends there
        self._segments: dict[int, int] = {}
        self._addresses: list[int] = []  # by request, of what is handed out
        self._sizes: list[int] = []
        self._top = 0

    def copy(self) -> PlainPool:
        """Another that is as this one is now."""
        other = PlainPool(self.small, self.large_segment * UNIT)
        other.reserved, other._top = self.reserved, self._top
        other._keys, other._addresses, other._sizes = self._keys[:], self._addresses[:], self._sizes[:]
        other._starts, other._ends = self._starts.copy(), self._ends.copy()
        other._segments = self._segments.copy()
        return other

    def empty(self) -> None:
        """Give back the segments that nothing lies in."""
        for address, size in list(self._segments.items()):
            key = size << _BITS | address
            if self._starts.get(address) == key:
                del self._segments[address], self._starts[address], self._ends[address + size]
                del self._keys[bisect_left(self._keys, key)]
                self.reserved -= size

    def _segment(self, size: int) -> int:
        """``get_allocation_size``: what is asked of the driver for a request."""
        if self.small:
            return SMALL_SEGMENT // UNIT
        if size < MIN_LARGE // UNIT:
            return self.large_segment
        return -(-size * UNIT // ROUND_LARGE) * ROUND_LARGE // UNIT

    def _new_segment(self, size: int) -> int:
        """The key of a new segment."""
        address, needed = self._top, self._segment(size)
        self._segments[address] = needed
        self._top += needed + 1
        self.reserved += needed
        return needed << _BITS | address

    def play(self, events: Iterable[int], sizes: Sequence[int]) -> None:
        """Requests of ``sizes[event]``; releases for events below zero, of ``~event``."""
        keys, starts, ends = self._keys, self._starts, self._ends
        addresses, taken = self._addresses, self._sizes
        new = [0] * (len(sizes) - len(addresses))
        addresses += new
        taken += new
        least = 0 if self.small else LARGEST_SMALL  # what may be left over without a block of its own
        for event in events:
            if event >= 0:
                size = sizes[event]
                at = bisect_left(keys, size << _BITS)
                if at < len(keys):
                    key = keys.pop(at)
                    address = key & _ADDRESS
                    del starts[address]
                else:
                    key = self._new_segment(size)
                    address = key & _ADDRESS
                found = key >> _BITS
                rest = found - size
                if rest > least:
                    start = address + size
                    key = rest << _BITS | start
                    starts[start] = ends[address + found] = key
                    keys.insert(bisect_left(keys, key, 0, at), key)
                    taken[event] = size
                else:
                    ends.pop(address + found, 0)
                    taken[event] = found
                addresses[event] = address
            else:
                address, size = addresses[~event], taken[~event]
                end = address + size
                key = ends.pop(address, 0)
                if key:
                    del keys[bisect_left(keys, key)]
                    size += key >> _BITS
                    address = key & _ADDRESS
                key = starts.pop(end, 0)
                if key:
                    del keys[bisect_left(keys, key)]
                    size += key >> _BITS
                    end = address + size
                key = size << _BITS | address
                starts[address] = ends[end] = key
                keys.insert(bisect_left(keys, key), key)
