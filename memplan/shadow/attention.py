"""Scaled dot product attention as CUDA runs it: which kernel, what it allocates, what it saves.

Sources: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp (mha_fwd, mha_bwd), cuda/attention.cu
and attention_backward.cu (memory-efficient, cuDNN), attention.cpp (math), torch 2.13; which kernel, and its
scratch: :mod:`memplan.cuda.attention`. Queries, keys and values are [B, H, S, D].
"""

from __future__ import annotations

from typing import Any

from memplan.cuda import attention as cuda
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, save_output, unpack
from memplan.shadow.matmul import matmul
from memplan.shadow.tensor import (
    DType,
    Tensor,
    bool_,
    empty,
    float32,
    int64,
    state,
    strides_of,
    uint8,
)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    gqa: bool,
    dropout: float = 0.0,
) -> Tensor:
    """``F.scaled_dot_product_attention``; ``mask`` is a bool [B, 1, S, S] or None."""
    if state.autocast is not None:
        value, key, query = (ops.to(x, state.autocast) for x in (value, key, query))
    chosen = cuda.kernel(
        state.card,
        query.dtype.name,
        query.shape[-1],
        value.shape[-1],
        keys=key.shape[2],
        masked=mask is not None,
        grouped=query.shape[1] != key.shape[1],
        gqa=gqa,
    )
    if chosen == "flash":
        return flash_attention(query, key, value, dropout=dropout)
    if chosen == "efficient":
        return _efficient(query, key, value, mask)
    if chosen == "cudnn":
        return _cudnn(query, key, value, mask)
    return _math(query, key, value, mask, causal=causal, gqa=gqa, dropout=dropout)


# -- flash -------------------------------------------------------------------------------------------


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0, package: bool = False
) -> Tensor:
    """FlashAttention-2 on 16-bit inputs: PyTorch's copy of it, or the flash-attn ``package``, which does
    without a second tensor of random state. With ``dropout`` keys are not split, and PyTorch's makes its
    random state anew."""
    batch, heads, length, head_dim = query.shape
    operation = "_flash_attn_forward" if package else "_scaled_dot_product_flash_attention"
    node = Node(_flash_backward, query, key, value) if ops.tracked(query, key, value) else None
    padded = head_dim % 8 != 0
    if padded:
        width = cuda.up(head_dim, 8)
        query, key, value = (
            empty((*x.shape[:-1], width), x.dtype, "constant_pad_nd") for x in (query, key, value)
        )
    saved = None if node is None else [save(query), save(key), save(value)]
    out = ops.pointwise(operation, query)
    logsumexp = empty((batch, heads, length), float32, operation)
    needed = (
        () if dropout else cuda.split_accumulators(state.card, batch, heads, length, key.shape[2], head_dim)
    )
    accumulators = [empty((nbytes,), uint8, operation) for nbytes in needed]
    seed = empty((2,), int64, operation)
    random = [seed] if package else [seed, empty((), int64, operation)]
    if dropout and not package:
        random[0] = empty((2,), int64, operation)
    del accumulators, seed
    if padded:
        out = Tensor((batch, heads, length, head_dim), out.dtype, out.storage, strides_of(out))
    if node is not None and saved is not None:
        saved += [save_output(out), save_output(logsumexp), *map(save_output, random)]
        node.saved = saved
        node.context = package
        attach(node, out)
    return out


def _flash_backward(node: Node, grad: Tensor) -> Any:
    operation = "_flash_attn_backward" if node.context else "_scaled_dot_product_flash_attention_backward"
    query, key, value, out, *rest = [unpack(saved) for saved in node.saved]
    batch, heads, length, head_dim = query.shape
    if not node.context:
        # [B, S, H, D], both made contiguous (attention_backward.cu, _flash_attention_backward); the package
        # asks for no more than contiguous rows (flash_attn_interface.py, maybe_contiguous)
        _held = [ops.contiguous(ops.transpose(x, 1, 2)) for x in (grad, out)]
    for_query = ops.pointwise(operation, query)
    for_key = ops.pointwise(operation, key)
    for_value = ops.pointwise(operation, value)
    needed = cuda.flash_backward(batch, heads, length, head_dim)
    softmax_d, accumulator = (empty((nbytes,), uint8, operation) for nbytes in needed)
    if key.shape[1] != heads:
        expanded = [empty((batch, length, heads, head_dim), key.dtype, operation) for _ in range(2)]
        del expanded
    del softmax_d, accumulator
    gradients = for_query, for_key, for_value
    if node.context:  # transformers hands it transposed tensors, whose gradients are views
        return tuple(x.viewed(x.shape, x.strides) for x in gradients)
    return gradients


# -- memory-efficient ------------------------------------------------------------------------------


def _efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, length, head_dim = query.shape
    operation = "_scaled_dot_product_efficient_attention"
    bias = None
    if mask is not None:
        bias = _additive(mask, query.dtype)
        if mask.shape[-1] % 8:  # preprocess_mask: rows are padded until they are aligned
            bias = empty((*mask.shape[:-1], cuda.up(mask.shape[-1], 8)), query.dtype, "constant_pad_nd")
    node = Node(_efficient_backward, query, key, value) if ops.tracked(query, key, value) else None
    saved = None
    if node is not None:
        saved = [save(query), save(key), save(value)] + ([save(bias)] if bias is not None else [])
    value_dim = value.shape[-1]
    out = empty((batch, length, heads, value_dim), query.dtype, operation)
    out = ops.transpose(out, 1, 2)
    logsumexp = empty((batch, heads, cuda.up(length, 32) if node is not None else 0), float32, operation)
    if cuda.efficient_accumulates(query.dtype.name, head_dim, value_dim):
        accumulator = empty((batch, length, heads, value_dim), float32, operation)
        del accumulator
    if node is not None and saved is not None:
        saved += [save_output(out), save_output(logsumexp)]
        node.saved = saved
        attach(node, out)
    return out


def _efficient_backward(node: Node, grad: Tensor) -> Any:
    operation = "_scaled_dot_product_efficient_attention_backward"
    query, key, value, *rest = [unpack(saved) for saved in node.saved]
    grad = ops.contiguous(ops.transpose(grad, 1, 2))
    batch, heads, length, head_dim = query.shape
    gradients = []
    for tensor in (query, key, value):
        b, h, s, d = tensor.shape
        gradients.append(ops.transpose(empty((b, s, h, d), tensor.dtype, operation), 1, 2))
    half = query.dtype is not float32
    if half:
        delta = empty((batch, heads, length), float32, operation)
    else:
        # (grad_out * out).sum(-1), made contiguous: one C++ expression, whose temporaries live to its end.
        # 16-bit kernels compute it themselves.
        product = empty(grad.shape, float32, operation)
        delta = total = empty((batch, length, heads), float32, operation)
        if min(length, heads) > 1:  # else the sum is contiguous as it is, transposed
            delta = empty((batch, heads, length), float32, operation)
        del total, product
    nbytes = cuda.efficient_workspace(
        state.card, batch * heads, length, key.shape[2], head_dim, value.shape[-1], half
    )
    workspace = empty((nbytes,), uint8, operation)
    del workspace, delta
    return gradients


# -- cuDNN -------------------------------------------------------------------------------------------


def _cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """attention.cu ``_cudnn_attention_forward``: the output in the query's layout, fp32 log-sum-exp, two
    seeds."""
    batch, heads, length, _ = query.shape
    operation = "_scaled_dot_product_cudnn_attention"
    bias = None if mask is None else _additive(mask, query.dtype)
    node = Node(_cudnn_backward, query, key, value) if ops.tracked(query, key, value) else None
    saved = None
    if node is not None:
        saved = [save(query), save(key), save(value)] + ([save(bias)] if bias is not None else [])
    seeds = [empty((), int64, operation) for _ in range(2)]
    out = ops.pointwise(operation, query)
    logsumexp = empty((batch, heads, length, 1), float32, operation)
    if node is not None and saved is not None:
        saved += [save_output(out), save_output(logsumexp), *map(save_output, seeds)]
        node.saved = saved
        attach(node, out)
    return out


def _cudnn_backward(node: Node, grad: Tensor) -> Any:
    operation = "_scaled_dot_product_cudnn_attention_backward"
    query, key, value, *rest = [unpack(saved) for saved in node.saved]
    batch, heads, length, head_dim = query.shape
    gradients = [ops.pointwise(operation, tensor) for tensor in (query, key, value)]
    nbytes = cuda.cudnn_backward(
        query.dtype.itemsize, batch, heads, key.shape[1], length, key.shape[2], head_dim
    )
    workspace = empty((nbytes,), uint8, operation)
    del workspace
    return gradients


# -- math --------------------------------------------------------------------------------------------


def _math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    gqa: bool,
    dropout: float,
) -> Tensor:
    """_scaled_dot_product_attention_math. Names live to the end of the function, as its C++ locals do."""
    dtype = query.dtype
    half = dtype.itemsize == 2
    query_acc, key_acc, value_acc = (ops.to(x, float32) if half else x for x in (query, key, value))
    scaled = ops.scale(query_acc)
    bias = None
    if causal:
        bias = _causal_bias(scaled.shape[-2], key.shape[-2])
    elif mask is not None:
        bias = _additive(mask, float32)
    key_expanded, value_expanded = key_acc, value_acc
    if gqa:
        groups = query.shape[1] // key.shape[1]
        key_expanded, value_expanded = _repeat_heads(key_acc, groups), _repeat_heads(value_acc, groups)
    scores = matmul(scaled, ops.scale(ops.transpose(key_expanded, -2, -1)))
    if bias is not None:
        scores = ops.add_(scores)
    scores = ops.dropout(_safe_softmax(scores), dropout)
    # The second result, the weights, is made first: arguments are evaluated from the last.
    weights = ops.to(scores, dtype)
    out = ops.to(matmul(scores, value_expanded), dtype)
    del weights
    return out


def _causal_bias(length: int, keys: int) -> Tensor:
    ones = empty((length, keys), bool_, "ones")
    lower = empty((length, keys), bool_, "tril")
    del ones
    return _additive(lower, float32)


def _additive(mask: Tensor, dtype: DType) -> Tensor:
    """convert_boolean_attn_mask."""
    infinity = empty((), dtype, "full")
    zero = empty((), dtype, "scalar_tensor")
    bias = empty(mask.shape, dtype, "where")
    del zero, infinity
    return bias


def _repeat_heads(x: Tensor, groups: int) -> Tensor:
    """``repeat_interleave``, which copies in any case (aten/src/ATen/native/Repeat.cpp)."""
    batch, heads, length, width = x.shape
    wide = ops.expand(ops.view(x, (batch, heads, 1, length, width)), (batch, heads, groups, length, width))
    return ops.view(ops.clone(wide), (batch, heads * groups, length, width))


def _safe_softmax(x: Tensor) -> Tensor:
    """at::_safe_softmax: softmax, then rows that are all -inf become zero, in the result's own storage."""
    operation = "_safe_softmax"
    node = Node(ops._softmax_backward, x) if ops.tracked(x) else None
    out = empty(x.shape, x.dtype, operation)
    masked = empty(x.shape, bool_, operation)
    rows = empty((*x.shape[:-1], 1), bool_, operation)
    zero = empty((), x.dtype, operation)
    del masked, rows, zero
    if node is not None:
        node.context = x.dtype
        node.saved = save_output(out)
        attach(node, out)
    return out
