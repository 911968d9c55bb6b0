"""How a weight is cut into strips: plain numbers, shared by the kernels and the planner (imports no torch).

A strip is dequantised, multiplied and forgotten before the next: forward by output rows, gradient by input
columns, so that every sum is made in one piece and results do not depend on the cut.
"""

from __future__ import annotations

STRIP_BYTES = 32 << 20  # of what was tried fastest in 65 of 73 cases on an H200 (docs/kernels.md)
MULTIPLE = 128  # rows or columns of a cuBLAS tile

# Up to so many rows bitsandbytes' own kernels multiply without a dequantised weight
# (_gemm_4bit_use_custom_cuda, 0.50 backends/cuda/ops.py), and ours have nothing to save.
FEW_ROWS = 16


def strip(length: int, across: int, itemsize: int, converted: int = 0) -> int:
    """Rows of a strip for a weight of ``length`` rows with ``across`` columns (or the other way round): as
    equal as can be, a multiple of a tile where there are several, and at most STRIP_BYTES unless one tile is
    more.

    ``converted``: rows of a result that has to be converted to another dtype, whose part for a strip must not
    be larger either.
    """
    row = max(across, converted) * itemsize
    if length * row <= STRIP_BYTES:
        return length
    most = max(STRIP_BYTES // row // MULTIPLE, 1) * MULTIPLE
    strips = -(-length // most)
    equal = -(-length // strips)
    return min(-(-equal // MULTIPLE) * MULTIPLE, most, length)
