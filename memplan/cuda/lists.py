"""What lists of tensors that are split or laid end to end take on CUDA for a moment: where each lies and
which block of threads has which, in numbers of 8 bytes (aten/src/ATen/native/cuda/TensorShape.cu, 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt

from memplan.cuda.card import Card

_BLOCK = 128  # threads
_TILE = 16 * _BLOCK  # bytes of a block
_NUMBER = 8


def split_copy(chunks: Sequence[int], rows: int, card: Card) -> int:
    """Bytes of ``split_with_sizes_copy`` of a contiguous [rows, N] into tensors of so many bytes a row."""
    blocks = sum(-(-chunk // _TILE) for chunk in chunks)
    most = int(card.multiprocessors * card.threads / _BLOCK * 2.0)
    factor = -(-blocks * rows // most)
    rows_each = min(ceil(sqrt(factor)), rows)
    times = -(-factor // rows_each)
    launched = sum(-(-chunk // (_TILE * times)) for chunk in chunks)
    return _NUMBER * (3 * len(chunks) + launched + len(chunks) + 1)


def chunk_cat(chunks: Sequence[int]) -> int:
    """Bytes of ``_chunk_cat`` along the first axis, whose result has so many bytes of each tensor a chunk."""
    blocks = sum(-(-chunk // _TILE) for chunk in chunks)
    return _NUMBER * (4 * len(chunks) + blocks + 2 * (len(chunks) + 1))
