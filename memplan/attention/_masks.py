"""Boolean masks as transformers makes them (transformers/masking_utils.py, 5.23), ``sdpa_mask``."""

from __future__ import annotations

from memplan.asked.recipe import Batches
from memplan.shadow.tensor import Tensor, bool_, empty, int64


def boolean(shape: tuple[int, int], local: bool, batches: Batches | None) -> Tensor:
    """sdpa_mask without vmap: ``and_masks`` of the pattern and the padding, by broadcasting; of packed
    batches of the sequences and the pattern; of None, rows that are told neither, the pattern alone."""
    if batches is Batches.PACKED:
        return _packed(shape[1], local)
    batch, length = shape
    square = (1, 1, length, length)
    ranges = [
        empty((batch,), int64, "arange"),
        empty((1,), int64, "arange"),
        _positions(length),
        _positions(length),
    ]
    if batches is None:
        return _window(square) if local else empty(square, bool_, "le")
    result = empty((), bool_, "new_ones")
    pattern = _window(square) if local else empty(square, bool_, "le")
    result = _and(result, pattern, square)
    del pattern
    # CUDA's index makes its two indices alike first: each is copied that expanding has given a stride of zero
    # (TensorAdvancedIndexing.cpp ``make_info``)
    copies = (batch > 1) + (length > 1)
    expanded = [empty((batch, 1, 1, length), int64, "index") for _ in range(copies)]
    padding = empty((batch, 1, 1, length), bool_, "index")
    del expanded
    result = _and(result, padding, (batch, 1, length, length))
    del padding, ranges
    return result


def _packed(length: int, local: bool) -> Tensor:
    """One row: ``packed_sequence_compatibility_function``."""
    square = (1, 1, length, length)
    _ranges = [
        empty((1,), int64, "arange"),
        empty((1,), int64, "arange"),
        _positions(length),
        _positions(length),
    ]
    result = empty((), bool_, "new_ones")
    queries, keys = _each(length), _each(length)
    alike = empty(square, bool_, "eq")
    del queries, keys
    result = _and(result, alike, square)
    del alike
    queries, keys = _each(length), _each(length)
    pattern = _window(square) if local else empty(square, bool_, "le")
    del queries, keys
    result = _and(result, pattern, square)
    return result


def _each(length: int) -> Tensor:
    """``x[batch_idx, idx]`` of one row: the batch's index is copied (above)."""
    expanded = empty((1, 1, 1, length), int64, "index") if length > 1 else None
    values = empty((1, 1, 1, length), int64, "index")
    del expanded
    return values


def _positions(length: int) -> Tensor:
    arange = empty((length,), int64, "arange")
    positions = empty((length,), int64, "add")
    del arange
    return positions


def _window(square: tuple[int, ...]) -> Tensor:
    """sliding_window_causal_mask_function: a band, and below the diagonal."""
    result = empty((), bool_, "new_ones")
    shifted = empty((1, 1, square[-2], 1), int64, "sub")
    band = empty(square, bool_, "gt")
    del shifted
    result = _and(result, band, square)
    del band
    causal = empty(square, bool_, "le")
    result = _and(result, causal, square)
    return result


def _and(one: Tensor, two: Tensor, shape: tuple[int, ...]) -> Tensor:
    return empty(shape, bool_, "bitwise_and")
