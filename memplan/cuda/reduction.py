"""What a sum over rows takes on CUDA beside its result, where it is split over several blocks
(aten/src/ATen/native/cuda/Reduce.cuh, ``setReduceConfig`` and ``ReduceConfig``, torch 2.13).

Gradients of norms' weights and of biases are such sums, and so are those of DoRA's magnitudes.
"""

from __future__ import annotations

from math import prod

from memplan.cuda.card import Card

_THREADS = 512  # mnt_wrapper::MAX_NUM_THREADS
_WARP = 32
_FEW, _MANY = 16, 256  # min_values_per_thread, max_values_per_thread
_ACCUMULATOR = 4  # bytes of an fp32 partial sum, which 16-bit and fp32 values have


def scratch(shape: tuple[int, ...], card: Card) -> tuple[int, int] | None:
    """Bytes of partial sums and of semaphores while floats [..., N] with contiguous rows are summed to [N];
    None where each sum stays in one block."""
    outputs, rows = shape[-1], prod(shape[:-1])
    vector = 4
    while outputs % vector:
        vector //= 2
    most = _THREADS // vector
    width, height = _power(outputs // vector, most), _power(rows, most)
    height_left = min(height, most // min(width, _WARP))
    width = min(width, most // height_left)
    height = height_left
    values = rows
    if values < min(height * 16, _MANY):
        return None  # each warp sums for other outputs
    values = -(-rows // height)
    grid = -(-(outputs // vector) // width)
    room = card.multiprocessors * (card.threads // (width * height))
    if values < _MANY or grid > room:
        return None
    blocks = max(min(-(-room // grid), -(-values // _FEW)), -(-values // _MANY))
    if blocks <= 1:
        return None
    return _ACCUMULATOR * outputs * blocks * width * vector, 4 * grid


def _power(size: int, most: int) -> int:
    """``last_pow2``, at most ``most``."""
    return most if size >= most else 1 << max(size.bit_length() - 1, 0)


def whole_scratch(count: int, itemsize: int, accumulator: int, card: Card) -> list[tuple[int, int]]:
    """The same while ``count`` contiguous numbers of ``itemsize`` bytes are reduced to one, whose partial
    results have ``accumulator`` bytes: a pair for each part whose offsets 32 bits can tell, one after the
    other (``gpu_reduce_kernel``; TensorIterator.cpp, ``can_use_32bit_indexing``)."""
    if max(count, 1 + (count - 1) * itemsize) > 0x7FFFFFFF:
        half = count // 2
        return [
            *whole_scratch(half, itemsize, accumulator, card),
            *whole_scratch(count - half, itemsize, accumulator, card),
        ]
    width = _power(count // 4 if count > 128 else count, _THREADS)
    values = -(-count // width)
    if values < _MANY:
        return []
    room = card.multiprocessors * (card.threads // width)
    blocks = max(min(room, -(-values // _FEW)), -(-values // _MANY))
    return [(accumulator * blocks, 4)] if blocks > 1 else []
