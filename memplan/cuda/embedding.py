"""The gradient of an embedding on CUDA (aten/src/ATen/native/cuda/Embedding.cu
``embedding_dense_backward_cuda``, torch 2.13).

Up to 3,072 indices are added up by one kernel; more are sorted, and summed by EmbeddingBackwardKernel.cu in
fp32 parts of 10 rows, sized for the case that all of them differ. cub's own scratch for the sort, some bytes
an index, is left out.
"""

from __future__ import annotations

SORTED_FROM = 3072  # indices; up to here nothing is sorted
_INDEX = 8  # bytes


def sorting(rows: int) -> list[int]:
    """Bytes that sorting takes, before the gradient is there."""
    return [_INDEX * rows] * 2 if rows > SORTED_FROM else []


def summing(rows: int, entries: int, width: int) -> list[int]:
    """Bytes that summing takes then, for a table of ``entries`` vectors of ``width``."""
    if rows <= SORTED_FROM:
        return []
    segments = min(rows, entries)
    parts = rows // 10 + segments
    return [_INDEX * count for count in (rows, 1, segments, segments, 1, parts)] + [4 * parts * width]
