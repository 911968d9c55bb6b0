"""``scaled_dot_product_attention`` on CUDA: the choice of backend, and what each one allocates.

Sources: pytorch aten/src/ATen/native/transformers/attention.cpp, cuda/sdp_utils.cpp, cuda/attention.cu,
cuda/attention_backward.cu, cuda/flash_attn/flash_api.cpp, cuda/mem_eff_attention/kernel_{forward,backward}.h
(the headers as installed with torch 2.13). Shapes: B batch, H heads, S positions, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from memplan.cuda import attention as cuda
from memplan.cuda.attention import up
from memplan.cuda.card import Card
from memplan.trace.operators import operator, workspace

aten = torch.ops.aten


def backend(card: Card, query: Any, key: Any, value: Any, mask: Any, enable_gqa: bool) -> str:
    """Which kernel ``select_sdp_backend`` takes (cuda/sdp_utils.cpp) when gradients are wanted."""
    if not all(tensor.stride(-1) == 1 for tensor in (query, key, value)):
        return "math"
    return cuda.kernel(
        card,
        str(query.dtype).removeprefix("torch."),
        query.shape[-1],
        value.shape[-1],
        keys=key.shape[2],
        masked=mask is not None,
        grouped=key.shape[1] != query.shape[1],
        gqa=enable_gqa,
    )


def sdpa_for(card: Card) -> Callable[..., Any]:
    """A function to stand in for ``torch.nn.functional.scaled_dot_product_attention``."""

    def scaled_dot_product_attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if torch.is_autocast_enabled("cpu"):
            # it is in autocast's lower-precision list (ATen/autocast_mode.h, 2.13)
            dtype = torch.get_autocast_dtype("cpu")
            # in the order in which the compiler evaluates the wrapper's arguments: from the last
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
            value, key, query = value.to(dtype), key.to(dtype), query.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return _sdpa(card, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    return scaled_dot_product_attention


def _sdpa(
    card: Card,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    dropout: float,
    causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    chosen = backend(card, query, key, value, mask, enable_gqa)
    if mask is not None and mask.dtype is torch.bool:
        mask = additive(mask, query.dtype)
    if chosen == "flash":
        head_dim = query.shape[-1]
        if head_dim % 8:  # pad_last_dim<8>, sliced back by post_process_flash_output
            padding = (0, 8 - head_dim % 8)
            query, key, value = (torch.nn.functional.pad(t, padding) for t in (query, key, value))
        out = aten._scaled_dot_product_flash_attention.default(
            query, key, value, dropout, causal, False, scale=scale or head_dim**-0.5
        )[0]
        return out[..., :head_dim] if head_dim % 8 else out
    if chosen == "efficient":
        if mask is not None:
            if any(stride % 8 for stride in mask.stride()[:-1]):  # preprocess_mask, mem_eff_alignment
                columns = mask.shape[-1]
                mask = torch.nn.functional.pad(mask, (0, 8 - columns % 8))[..., :columns]
            mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        needs_lse = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        return aten._scaled_dot_product_efficient_attention.default(
            query, key, value, mask, needs_lse, dropout, causal, scale=scale
        )[0]
    if chosen == "cudnn":
        needs_lse = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        return aten._scaled_dot_product_cudnn_attention.default(
            query, key, value, mask, needs_lse, dropout, causal, False, scale=scale
        )[0]
    return math_attention(query, key, value, mask, dropout, causal, scale, enable_gqa)


def additive(mask: Any, dtype: torch.dtype) -> Any:
    """``convert_boolean_attn_mask``."""
    return torch.where(mask, 0.0, torch.full((), -math.inf, dtype=dtype))


def math_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    dropout: float,
    causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    """``_scaled_dot_product_attention_math``, line by line: called as an operator it would add the mask
    out of place, as it does for every tensor while a dispatch mode is on (``areAnyTensorSubclassLike``)."""
    origin = query.dtype
    half = origin in (torch.float16, torch.bfloat16)
    # The names keep alive what the C++ function's own locals do, until it returns.
    query_acc, key_acc, value_acc = (t.float() if half else t for t in (query, key, value))
    factor = math.sqrt(scale if scale is not None else query.shape[-1] ** -0.5)
    scaled = query_acc * factor
    if causal:
        mask = torch.ones((query.shape[-2], key.shape[-2]), dtype=torch.bool).tril()
        mask = additive(mask, scaled.dtype)
    key_expanded, value_expanded = key_acc, value_acc
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key_expanded = key_acc.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value_expanded = value_acc.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = torch.matmul(scaled, key_expanded.transpose(-2, -1) * factor)
    if mask is not None:
        scores.add_(mask)
    scores = torch._safe_softmax(scores, -1)
    if dropout > 0.0:
        scores = torch.native_dropout(scores, dropout, True)[0]
    # make_tuple's arguments, which are evaluated last to first: the scores go back to 16 bits, too
    _attention = scores.to(origin)
    return torch.matmul(scores, value_expanded).to(origin)


@operator(aten._safe_softmax.default)
def safe_softmax(recorder: Any, scores: Any, dim: int, dtype: Any = None) -> Any:
    """attention.cpp ``_safe_softmax``: rows that are all -inf become zeros, in the output's own storage
    (``where_out``; so in 2.13, as its CPU build shows)."""
    out = torch.softmax(scores, dim, dtype=dtype)
    masked = torch.isneginf(scores)
    masked_rows = masked.all(dim, keepdim=True)
    _zero = torch.empty((), dtype=out.dtype)
    del masked_rows
    return out


# -- flash ---------------------------------------------------------------------------------------------


def split_accumulators(
    recorder: Any, batch: int, heads: int, length: int, key_length: int, head_dim: int
) -> list[Any]:
    """Sums of each part of the keys, if they are split."""
    needed = cuda.split_accumulators(recorder.card, batch, heads, length, key_length, head_dim)
    return [workspace(nbytes) for nbytes in needed]


@operator(aten._scaled_dot_product_flash_attention.default)
def flash_forward(
    recorder: Any, query: Any, key: Any, value: Any, dropout: float = 0.0, *_: Any, **__: Any
) -> tuple[Any, ...]:
    """flash_api.cpp ``mha_fwd``: the output, a fp32 log-sum-exp, two tiny tensors of random state; and
    accumulators while the keys are split, which small batches of short sequences are."""
    batch, heads, length, head_dim = query.shape
    key_length = key.shape[2]
    out = torch.empty_like(query.transpose(1, 2))
    lse = torch.empty((batch, heads, length), dtype=torch.float32)
    if dropout == 0.0:
        _accumulators = split_accumulators(recorder, batch, heads, length, key_length, head_dim)
    rng_state = torch.empty(2, dtype=torch.uint64)
    unused = torch.empty((), dtype=torch.uint64)
    if dropout > 0.0:
        rng_state = torch.empty(2, dtype=torch.uint64)
    no_mask = torch.empty(0, dtype=query.dtype)
    return out.transpose(1, 2), lse, None, None, length, key_length, rng_state, unused, no_mask


@operator(aten._scaled_dot_product_flash_attention_backward.default)
def flash_backward(
    recorder: Any, grad_out: Any, query: Any, key: Any, value: Any, out: Any, *_: Any, **__: Any
) -> tuple[Any, Any, Any]:
    """flash_api.cpp ``mha_bwd``: dq, dk, dv; fp32 row sums and a fp32 accumulator of dq; with grouped
    queries a dk and dv for every query head, summed at the end."""
    batch, heads, length, head_dim = query.shape
    key_heads, key_length = key.shape[1], key.shape[2]
    _grad_out = grad_out.transpose(1, 2).contiguous()  # attention_backward.cu _flash_attention_backward
    _out = out.transpose(1, 2).contiguous()
    dq = torch.empty_like(query.transpose(1, 2))
    dk = torch.empty_like(key.transpose(1, 2))
    dv = torch.empty_like(value.transpose(1, 2))
    _scratch = [workspace(nbytes) for nbytes in cuda.flash_backward(batch, heads, length, head_dim)]
    if key_heads != heads:
        _dk_expanded = torch.empty((batch, key_length, heads, head_dim), dtype=key.dtype)
        _dv_expanded = torch.empty((batch, key_length, heads, head_dim), dtype=key.dtype)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


# flash-attn's operators, under our name so that the package itself may be installed beside
_LIBRARY = torch.library.Library("memplan", "FRAGMENT")
_LIBRARY.define(
    "_flash_attn_forward(Tensor query, Tensor key, Tensor value, float dropout) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "_flash_attn_backward(Tensor grad, Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor, Tensor)"
)


@operator(torch.ops.memplan._flash_attn_forward.default)
def flash_package_forward(
    recorder: Any, query: Any, key: Any, value: Any, dropout: float
) -> tuple[Any, Any, Any]:
    """``mha_fwd`` of flash-attn 2.8 (csrc/flash_attn/flash_api.cpp), which splits keys as PyTorch's copy does
    (``set_params_splitkv``) but has one tensor of random state."""
    batch, length, heads, head_dim = query.shape
    out = torch.empty_like(query)
    lse = torch.empty((batch, heads, length), dtype=torch.float32)
    if dropout == 0.0:
        _accumulators = split_accumulators(recorder, batch, heads, length, key.shape[1], head_dim)
    rng_state = torch.empty(2, dtype=torch.int64)
    return out, lse, rng_state


@operator(torch.ops.memplan._flash_attn_backward.default)
def flash_package_backward(
    recorder: Any, grad_out: Any, query: Any, key: Any, value: Any
) -> tuple[Any, Any, Any]:
    """``FlashAttnFunc.backward``'s three gradients, and ``mha_bwd``."""
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    batch, length, heads, head_dim = query.shape
    _scratch = [workspace(nbytes) for nbytes in cuda.flash_backward(batch, heads, length, head_dim)]
    if key.shape[2] != heads:
        _dk_expanded = torch.empty((batch, key.shape[1], heads, head_dim), dtype=key.dtype)
        _dv_expanded = torch.empty((batch, key.shape[1], heads, head_dim), dtype=key.dtype)
    return dq, dk, dv


class FlashAttention(torch.autograd.Function):
    """flash-attn 2's ``FlashAttnFunc`` (flash_attn/flash_attn_interface.py 2.8): [B, S, H, D] throughout."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, dropout: float) -> Any:
        head_dim = query.shape[-1]
        if head_dim % 8:
            padding = (0, 8 - head_dim % 8)
            query, key, value = (torch.nn.functional.pad(t, padding) for t in (query, key, value))
        out, lse, rng_state = torch.ops.memplan._flash_attn_forward.default(query, key, value, dropout)
        ctx.save_for_backward(query, key, value, out, lse, rng_state)
        return out[..., :head_dim]

    @staticmethod
    def backward(ctx: Any, grad_out: Any) -> tuple[Any, Any, Any, None]:
        query, key, value, out, lse, _ = ctx.saved_tensors
        head_dim = grad_out.shape[-1]
        if head_dim % 8:
            grad_out = torch.nn.functional.pad(grad_out, (0, 8 - head_dim % 8))
        dq, dk, dv = torch.ops.memplan._flash_attn_backward.default(grad_out, query, key, value)
        return dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim], None


def flash_attn_func(query: Any, key: Any, value: Any, dropout_p: float = 0.0, **_: Any) -> Any:
    """``flash_attn.flash_attn_func``."""
    return FlashAttention.apply(query, key, value, dropout_p)


def flash_attn_package(*_: Any, **__: Any) -> tuple[Any, Any]:
    """transformers' ``lazy_import_flash_attention``: the package's functions, and what selects the arguments
    that they know. Of the arguments dropout alone makes a difference here."""
    return (flash_attn_func, None, None, None, None), (
        lambda dropout=0.0, **_: {"dropout_p": dropout},
        None,
    )


# -- memory-efficient ----------------------------------------------------------------------------------


@operator(aten._scaled_dot_product_efficient_attention.default)
def efficient_forward(
    recorder: Any, query: Any, key: Any, value: Any, bias: Any, compute_lse: bool, *_: Any, **__: Any
) -> tuple[Any, ...]:
    """attention.cu ``_efficient_attention_forward``: the output and a fp32 log-sum-exp padded to 32 rows;
    past 128 dimensions 16-bit outputs are accumulated in fp32 in global memory
    (kernel_forward.h ``kNeedsOutputAccumulatorBuffer``). The seeds are on the host."""
    batch, heads, length, head_dim = query.shape
    value_dim = value.shape[-1]
    out = torch.empty((batch, length, heads, value_dim), dtype=query.dtype)
    lse = torch.empty((batch, heads, up(length, 32) if compute_lse else 0), dtype=torch.float32)
    if cuda.efficient_accumulates(str(query.dtype).removeprefix("torch."), head_dim, value_dim):
        _accumulator = torch.empty((batch, length, heads, value_dim), dtype=torch.float32)
    with recorder.pause():
        seed, offset = torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)
    return out.transpose(1, 2), lse, seed, offset


@operator(aten._scaled_dot_product_efficient_attention_backward.default)
def efficient_backward(
    recorder: Any, grad_out: Any, query: Any, key: Any, value: Any, bias: Any, out: Any, *_: Any, **__: Any
) -> tuple[Any, ...]:
    """attention_backward.cu ``_efficient_attention_backward``."""
    batch, heads, length, head_dim = query.shape
    grad_out = grad_out.transpose(1, 2).contiguous()
    dq, dk, dv = (
        torch.empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3]), dtype=t.dtype)
        for t in (query, key, value)
    )
    half = query.dtype is not torch.float32
    if half:  # kKernelComputesDelta
        _delta = torch.empty((batch, heads, length), dtype=torch.float32)
    else:
        # one C++ expression, whose temporaries live to its end
        product = grad_out * out.transpose(1, 2)
        summed = product.sum(-1).transpose(-2, -1)
        _delta = summed.contiguous()
        del summed, product
    _workspace = workspace(
        cuda.efficient_workspace(
            recorder.card, batch * heads, length, key.shape[2], head_dim, value.shape[-1], half
        )
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None


# -- cuDNN ---------------------------------------------------------------------------------------------


@operator(aten._scaled_dot_product_cudnn_attention.default)
def cudnn_forward(
    recorder: Any,
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    compute_lse: bool,
    dropout: float = 0.0,
    *_: Any,
    **__: Any,
) -> tuple[Any, ...]:
    """attention.cu ``_cudnn_attention_forward``: output in the query's layout, fp32 log-sum-exp, two seeds.
    What workspace cuDNN asks for in forward is not known here."""
    batch, heads, length, _ = query.shape
    seed = torch.empty((), dtype=torch.int64)
    offset = torch.empty((), dtype=torch.int64)
    out = torch.empty_like(query)
    lse = torch.empty((batch, heads, length, 1), dtype=torch.float32).squeeze(-1)
    return out, lse, None, None, length, key.shape[2], seed, offset, torch.empty(0, dtype=query.dtype)


@operator(aten._scaled_dot_product_cudnn_attention_backward.default)
def cudnn_backward(
    recorder: Any, grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> tuple[Any, Any, Any]:
    """attention_backward.cu ``_cudnn_attention_backward``, and its workspace."""
    batch, heads, length, head_dim = query.shape
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    nbytes = cuda.cudnn_backward(
        query.dtype.itemsize, batch, heads, key.shape[1], length, key.shape[2], head_dim
    )
    _workspace = workspace(nbytes)
    return dq, dk, dv
