"""What is in a snapshot. All sizes and addresses are bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

ORIGIN_KEY = "memplan"  # ours; PyTorch's readers pass it over


class Action(str, Enum):
    """What an entry of the trace says (``TraceEntry::Action`` in c10/cuda/CUDACachingAllocator.h)."""

    ALLOC = "alloc"
    FREE_REQUESTED = "free_requested"  # the block may still be in use on another stream
    FREE_COMPLETED = "free_completed"  # and from here on is not
    SEGMENT_ALLOC = "segment_alloc"  # cudaMalloc
    SEGMENT_FREE = "segment_free"  # cudaFree
    SEGMENT_MAP = "segment_map"  # cuMemMap, of expandable segments
    SEGMENT_UNMAP = "segment_unmap"
    SNAPSHOT = "snapshot"
    OOM = "oom"
    USER_DEFINED = "user_defined"


class BlockState(str, Enum):
    """What a block is used for. PyTorch writes ``active_pending_free`` and documents the other name."""

    ALLOCATED = "active_allocated"
    PENDING_FREE = "active_pending_free"
    AWAITING_FREE = "active_awaiting_free"
    INACTIVE = "inactive"


@dataclass(frozen=True, slots=True)
class Frame:
    """A line of a stack trace."""

    filename: str
    line: int
    name: str


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One thing that the allocator was asked or did. ``size`` is as requested for alloc and free, and of the
    segment for segment_...; ``device_free`` is what oom found free, which has no address (0)."""

    action: Action
    addr: int
    size: int
    stream: int = 0
    frames: tuple[Frame, ...] = ()  # innermost first
    device_free: int | None = None
    time_us: int | None = None
    category: str | None = None
    pool_id: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a segment. ``size`` is the block's, ``requested_size`` what was asked for (0: inactive)."""

    address: int
    size: int
    requested_size: int
    state: BlockState
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory from the driver: a cudaMalloc, or a contiguous stretch of an expandable segment."""

    address: int
    total_size: int
    allocated_size: int  # in blocks that are allocated
    active_size: int  # the same with blocks whose release is pending
    requested_size: int
    stream: int
    segment_type: str  # "small" or "large": which pool
    is_expandable: bool
    blocks: tuple[Block, ...]
    pool_id: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One device's part of a snapshot. ``trace`` is in the order in which things happened and may have lost
    its beginning; ``settings`` are PyTorch's allocator settings, plain values by name. ``origin`` is empty
    for what PyTorch dumped, else it says who made this up."""

    device: int
    segments: tuple[Segment, ...]
    trace: tuple[TraceEntry, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    @property
    def reserved_bytes(self) -> int:
        """Bytes in all segments."""
        return sum(segment.total_size for segment in self.segments)

    @property
    def allocated_bytes(self) -> int:
        """Bytes in allocated blocks."""
        return sum(segment.allocated_size for segment in self.segments)
