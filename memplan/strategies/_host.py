"""What a process keeps on the host."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from memplan.shadow.spread import Spread


class HostBytes(NamedTuple):
    """Bytes of ``tensors`` that rest there, and what the host gives for them: ``taken``, of which ``pinned``,
    which is rounded up."""

    tensors: int
    taken: int
    pinned: int


class Host:
    """Tensors on the host. Pinned ones are blocks of PyTorch's CachingHostAllocator
    (aten/src/ATen/core/CachingHostAllocator.h, torch 2.13): powers of two, which stay where their tensors
    go, for the next of that size."""

    def __init__(self) -> None:
        self._tensors = self._pageable = self._pinned = 0
        self._free: Counter[int] = Counter()

    def keep(self, nbytes: int) -> None:
        """A tensor that is not pinned."""
        self._tensors += nbytes
        self._pageable += nbytes

    def keep_states(self, nbytes: int) -> None:
        """AdamW's two, of a tensor of so many bytes in float32."""
        for _ in range(2):
            self.keep(nbytes)

    def pin(self, nbytes: int) -> None:
        """A pinned one."""
        self._tensors += nbytes
        block = _block(nbytes)
        if self._free[block]:
            self._free[block] -= 1
        else:
            self._pinned += block

    def unpin(self, nbytes: int) -> None:
        """One of these goes."""
        self._tensors -= nbytes
        self._free[_block(nbytes)] += 1

    @property
    def bytes(self) -> HostBytes:
        """What is there."""
        return HostBytes(self._tensors, self._pageable + self._pinned, self._pinned)


class Hosted(Spread):
    """A spread that may keep something there: ``on_host``."""

    def __init__(self, world: int, rank: int | None = None) -> None:
        super().__init__(world, rank)
        self.on_host = Host()

    def host(self) -> HostBytes:
        """What is offloaded."""
        return self.on_host.bytes


def _block(nbytes: int) -> int:
    return 1 << (nbytes - 1).bit_length() if nbytes else 0
