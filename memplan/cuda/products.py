"""Products of matrices on CUDA (aten/src/ATen/native/cuda/Blas.cpp, GroupedBlas.cpp, torch 2.13)."""

from __future__ import annotations

_ALIGNMENT = 16  # bytes


def padded_columns(columns: int, itemsize: int) -> int:
    """GroupedMMUtils.h ``create_grouped_gemm_output_tensor``: rows of a grouped product are padded to 16
    bytes. Ampere multiplies group by group, with no scratch; Hopper's CUTLASS kernel has some kilobytes, left
    out."""
    step = _ALIGNMENT // itemsize
    return -(-columns // step) * step
