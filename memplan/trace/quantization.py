"""bitsandbytes' operators as their CUDA backend runs them (bitsandbytes 0.50 backends/cuda/ops.py)."""

from __future__ import annotations

import ast
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from memplan.trace.autocast import BELOW_AUTOCAST
from memplan.trace.operators import operator

_disabled = logging.root.manager.disable
logging.disable(logging.WARNING)  # what it says about CPU kernels is of no interest here
try:
    import bitsandbytes
finally:
    logging.disable(_disabled)

assert bitsandbytes  # imported because it registers its operators
bnb = torch.ops.bitsandbytes


@functools.cache
def _fused_heuristic(capability: tuple[int, int], multiprocessors: int) -> Callable[..., bool]:
    """The library's own ``_gemm_4bit_use_custom_cuda``, taken from its source: the module can't be imported
    without CUDA."""
    spec = importlib.util.find_spec("bitsandbytes")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "backends" / "cuda" / "ops.py"
    names = ("_gemm_4bit_use_custom_cuda", "_GEMM_4BIT_CUSTOM_FLOOR_M")
    body: list[ast.stmt] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
            body.append(node)
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names:
            body.append(node)
    scope: dict[str, Any] = {
        "torch": torch,
        "_gpu_dispatch_props": lambda device: (multiprocessors, *capability),
    }
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)
    function: Callable[..., bool] = scope["_gemm_4bit_use_custom_cuda"]
    return function


def fused(recorder: Any, A: Any, N: int, blocksize: int) -> bool:
    """Whether ``gemm_4bit`` multiplies without dequantising: few rows only."""
    K = A.shape[-1]
    M = A.numel() // K
    if M > 1536 or K % blocksize:  # _gemm_4bit_custom_max_m
        return False
    card = recorder.card
    return _fused_heuristic(card.capability, card.multiprocessors)(0, A.dtype, M, N, K)


_region: ContextVar[torch.dtype | None] = ContextVar("autocast", default=None)


@contextmanager
def told_of_autocast() -> Iterator[None]:
    """``gemm_4bit`` learns of the region that it is called in, which a stand-in, below it, does not see."""
    library = torch.library.Library("bitsandbytes", "IMPL")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        before = _region.set(torch.get_autocast_dtype("cpu"))
        try:
            with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOCAST):
                return bnb.gemm_4bit.default(*args, **kwargs)
        finally:
            _region.reset(before)

    library.impl("gemm_4bit", kernel, "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


@operator(bnb.gemm_4bit.default)
def gemm_4bit(
    recorder: Any,
    A: Any,
    B: Any,
    shape: Any,
    absmax: Any,
    blocksize: int,
    quant_type: str,
    bias: Any = None,
    absmax_8bit: Any = None,
    absmax_code: Any = None,
    absmax_offset: Any = None,
) -> Any:
    """``_dequant_linear_fallback``, which training shapes take: block scales dequantised, offset added out
    of place, the whole weight in A's dtype, then a linear."""
    if fused(recorder, A, shape[0], blocksize):  # _gemm_4bit_kernel_impl
        A = A.contiguous()
        return torch.empty((*A.shape[:-1], shape[0]), dtype=A.dtype)
    if absmax_8bit is not None:
        _absmax_dq = torch.empty_like(absmax_8bit, dtype=torch.float32)
        _absmax = _absmax_dq + absmax_offset
    weight = torch.empty(tuple(shape), dtype=A.dtype)
    dtype = _region.get()
    if dtype is None:
        return torch.nn.functional.linear(A, weight, bias)
    # the linear is under autocast, too, which casts its arguments from the last
    cast_bias = None if bias is None else bias.to(dtype)
    cast_weight = weight.to(dtype)
    return torch.nn.functional.linear(A.to(dtype), cast_weight, cast_bias)


@operator(bnb.dequantize_blockwise.default)
def dequantize_blockwise(recorder: Any, A: Any, absmax: Any, code: Any, blocksize: int, dtype: Any) -> Any:
    """One output."""
    return torch.empty_like(A, dtype=dtype)


@operator(bnb.dequantize_4bit.default)
def dequantize_4bit(
    recorder: Any, A: Any, absmax: Any, blocksize: int, quant_type: str, shape: Any, dtype: Any
) -> Any:
    """One output."""
    return torch.empty(tuple(shape), dtype=dtype)


@operator(bnb.optimizer_update_32bit.default, bnb.optimizer_update_8bit_blockwise.default)
def optimizer_update(recorder: Any, *args: Any, **kwargs: Any) -> None:
    """In place, no scratch."""
