"""Zeros that nobody wrote take none of the host's memory, and nor do they in another type: a stub's weights,
which are holes, converted where a program keeps a model on the host (FSDP's loading on one rank does)."""

from __future__ import annotations

import mmap
from math import prod
from typing import Any

CONVERSIONS = ("to", "float", "double", "half", "bfloat16", "clone")  # a Tensor's own, by name
_LEAST = 1 << 20  # elements: of fewer it does not matter
_LOOK = 1 << 22  # at so many at once


def converted(torch: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a conversion on the host gives, where that is zeros: memory that the kernel has not filled yet.
    None if it has to be made."""
    source = args[0]
    if type(source) not in (torch.Tensor, torch.nn.Parameter) or "memory_format" in kwargs:
        return None
    if source.device.type != "cpu" or source.numel() < _LEAST:
        return None
    if not source.is_floating_point() or not source.is_contiguous():
        return None
    if source.requires_grad and torch.is_grad_enabled():
        return None  # which has a history
    with torch.no_grad():
        plain = source.detach()
        blank = func(plain[:0], *args[1:], **kwargs)
        same = blank.dtype is source.dtype and func.__name__ != "clone"
        if (
            same
            or blank.device.type != "cpu"
            or any(bool(part.any()) for part in plain.view(-1).split(_LOOK))
        ):
            return None
        return _unwritten(torch, source.shape, blank.dtype)


def _unwritten(torch: Any, shape: Any, dtype: Any) -> Any:
    """Zeros that the kernel makes when they are written; torch.zeros writes them itself."""
    count = prod(shape)
    memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
