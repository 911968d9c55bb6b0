"""Norms of a list of tensors on CUDA (aten/src/ATen/native/cuda/ForeachReduceOp.cu, torch 2.13)."""

from __future__ import annotations

_CHUNK = 65_536  # elements


def partial_norms(count: int, longest: int) -> int:
    """Bytes of fp32 partial sums: one for each chunk of the longest tensor, times the number of tensors."""
    return 4 * count * -(-longest // _CHUNK)
