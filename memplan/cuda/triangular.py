"""Triangular systems on CUDA (aten/src/ATen/native/cuda/linalg/BatchLinearAlgebra.cpp
``triangular_solve_kernel``, BatchLinearAlgebraLibBlas.cpp ``apply_triangular_solve_batched``, torch 2.13)."""

from __future__ import annotations

_POINTER = 8  # bytes
_ONE_BY_ONE = 8  # systems
_LARGE = 64  # rows


def pointers(systems: int, rows: int) -> list[int]:
    """Bytes of where each matrix and each right-hand side lies, which cuBLAS's batched solver is told; a few
    large systems are solved one after the other. Beyond 512 rows it is MAGMA, which is not modelled."""
    if systems <= _ONE_BY_ONE and rows >= _LARGE:
        return []
    return [_POINTER * systems] * 2
