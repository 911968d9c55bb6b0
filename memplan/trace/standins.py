"""Where the CPU's code and CUDA's allocate differently: what CUDA does, each piece with its source.

Operator stand-ins run inside the recorder, so what they allocate with ``torch.empty`` is on the tape.
Patches replace Python functions of the libraries that can't run on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

aten = torch.ops.aten

OPERATORS: dict[Any, Callable[..., Any]] = {}


def operator(overload: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a stand-in for an operator: called as ``f(recorder, overload, *args, **kwargs)``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS[overload] = function
        return function

    return register


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# -- attention -----------------------------------------------------------------------------------------


@operator(aten._scaled_dot_product_flash_attention.default)
def flash_forward(
    recorder: Any, func: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> tuple[Any, ...]:
    """aten/src/ATen/native/transformers/cuda/attention.cu ``_scaled_dot_product_flash_attention_cuda`` and
    flash_attn/flash_api.cpp ``mha_fwd``: the output, a fp32 log-sum-exp, and two tiny tensors of random state.

    q, k, v arrive as [B, H, S, D] and are transposed, not copied.
    """
    batch, heads, length, head_dim = query.shape
    # at::empty_like keeps the strides of the transposed query if those are dense
    out = torch.empty_like(query.transpose(1, 2))
    lse = torch.empty((batch, heads, length), dtype=torch.float32)
    rng_state = torch.empty(2, dtype=torch.uint64)
    unused = torch.empty((), dtype=torch.uint64)
    debug_mask = torch.empty(0, dtype=query.dtype)
    return (out.transpose(1, 2), lse, None, None, length, key.shape[2], rng_state, unused, debug_mask)


@operator(aten._scaled_dot_product_flash_attention_backward.default)
def flash_backward(
    recorder: Any, func: Any, grad_out: Any, query: Any, key: Any, value: Any, out: Any, *args: Any, **kwargs: Any
) -> tuple[Any, Any, Any]:
    """flash_attn/flash_api.cpp ``mha_bwd``: dq, dk, dv; fp32 row sums and a fp32 accumulator of dq; with
    grouped queries dk and dv for every query head, summed at the end."""
    batch, heads, length, head_dim = query.shape
    kv_heads, kv_length = key.shape[1], key.shape[2]
    rounded_length = _up(length, 128)
    rounded_dim = _up(head_dim, 32 if head_dim <= 128 else 64)
    dq = torch.empty_like(query.transpose(1, 2))
    dk = torch.empty_like(key.transpose(1, 2))
    dv = torch.empty_like(value.transpose(1, 2))
    softmax_d = torch.empty((batch, heads, rounded_length), dtype=torch.float32)
    dq_accum = torch.empty((batch, rounded_length, heads, rounded_dim), dtype=torch.float32)
    if kv_heads != heads:
        dk_expanded = torch.empty((batch, kv_length, heads, head_dim), dtype=key.dtype)
        dv_expanded = torch.empty((batch, kv_length, heads, head_dim), dtype=key.dtype)
        del dk_expanded, dv_expanded
    del softmax_d, dq_accum
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def sdpa(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:
    """``scaled_dot_product_attention`` on CUDA: the choice of backend and what is done around it
    (aten/src/ATen/native/transformers/attention.cpp, cuda/sdp_utils.cpp)."""
    if query.dtype in (torch.float16, torch.bfloat16) and attn_mask is None and query.shape[-1] <= 256:
        head_dim = query.shape[-1]
        if head_dim % 8:
            pad = 8 - head_dim % 8
            query, key, value = (torch.nn.functional.pad(t, (0, pad)) for t in (query, key, value))
        scale = head_dim**-0.5 if scale is None else scale
        out = aten._scaled_dot_product_flash_attention.default(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return out[..., :head_dim] if head_dim % 8 else out
    return aten._scaled_dot_product_attention_math.default(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


# -- bitsandbytes --------------------------------------------------------------------------------------

try:
    import bitsandbytes as bnb
except ImportError:  # the rest of the tracer works without
    bnb = None

if bnb is not None:
    ops = torch.ops.bitsandbytes

    @operator(ops.gemm_4bit.default)
    def gemm_4bit(
        recorder: Any, func: Any, A: Any, B: Any, shapeB: Any, absmax: Any, blocksize: int, quant_type: str,
        bias: Any = None, absmax_8bit: Any = None, absmax_code: Any = None, absmax_offset: Any = None,
    ) -> Any:
        """bitsandbytes 0.50 backends/cuda/ops.py ``_dequant_linear_fallback``: what training shapes take."""
        if absmax_8bit is not None:
            absmax_dq = torch.empty_like(absmax_8bit, dtype=torch.float32)
            absmax = absmax_dq + absmax_offset
        B_dq = torch.empty(tuple(shapeB), dtype=A.dtype)
        return torch.nn.functional.linear(A, B_dq, bias)

    @operator(ops.dequantize_blockwise.default)
    def dequantize_blockwise(
        recorder: Any, func: Any, A: Any, absmax: Any, code: Any, blocksize: int, dtype: Any
    ) -> Any:
        """bitsandbytes 0.50 backends/cuda/ops.py: one output."""
        return torch.empty_like(A, dtype=dtype)

    @operator(ops.dequantize_4bit.default)
    def dequantize_4bit(
        recorder: Any, func: Any, A: Any, absmax: Any, blocksize: int, quant_type: str, shape: Any, dtype: Any
    ) -> Any:
        """bitsandbytes 0.50 backends/cuda/ops.py: one output."""
        return torch.empty(tuple(shape), dtype=dtype)


# -- transformers --------------------------------------------------------------------------------------


def _all_true(tensor: torch.Tensor) -> bool:
    """``fast_all`` of a mask that is all ones (transformers 5 masking_utils.py), its allocations included."""
    torch.eq(tensor.sum(), tensor.numel())
    return True


@contextmanager
def patched() -> Iterator[None]:
    """The patches in force."""
    from transformers import masking_utils

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", sdpa))
        # fake tensors would make transformers believe that it is being compiled and build a mask
        stack.enter_context(mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: False))
        stack.enter_context(mock.patch.object(masking_utils, "fast_all", _all_true))
        yield
