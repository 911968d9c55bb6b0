"""Indexing on CUDA: masks become indices first, and gradients are added to rows in sorted order.

Sources: aten/src/ATen/native/TensorAdvancedIndexing.cpp, cuda/Nonzero.cu, cuda/Indexing.cu,
cuda/IndexKernel.cpp (torch 2.13). cub's scratch for counting, scanning and sorting (some bytes an index) is
left out.
"""

from __future__ import annotations

_INDEX = 8  # bytes

COUNT = 4  # Nonzero.cu ``nonzero_cuda_out_impl``: how many, before the indices are made


def nonzero(axes: int, found: int) -> int:
    """Bytes of a row of indices for each axis."""
    return _INDEX * axes * found


def sorting(rows: int) -> list[int]:
    """``index_put_with_sort_kernel``: bytes of the order of so many indices, of what they were, and of a
    range."""
    return [_INDEX * rows] * 3


def places(elements: int) -> int:
    """``masked_scatter__cuda``: bytes of the place of each of the mask's elements in the source."""
    return _INDEX * elements
