"""Scaled dot product attention as CUDA runs it: which kernel, what it allocates, what it saves.

Sources: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (choice of kernel),
cuda/flash_attn/flash_api.cpp (mha_fwd, mha_bwd), cuda/attention.cu and attention_backward.cu
(memory-efficient), attention.cpp (math), torch 2.13. Queries, keys and values are [B, H, S, D].
"""

from __future__ import annotations

from typing import Any

from memplan.cuda.card import FLASH_CAPABILITY
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, save_output, unpack
from memplan.shadow.matmul import matmul
from memplan.shadow.tensor import (
    DType,
    Tensor,
    bfloat16,
    bool_,
    empty,
    float32,
    int64,
    state,
    strides_of,
    uint8,
)

_FLASH_MAX_HEAD_DIM = 256


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
    head_dim = query.shape[-1]
    ampere = state.card.capability >= FLASH_CAPABILITY
    if ampere and mask is None and query.dtype.itemsize == 2 and head_dim <= _FLASH_MAX_HEAD_DIM:
        return flash_attention(query, key, value)
    # The memory-efficient kernel wants 16-byte aligned rows and as many key heads as query heads, and before
    # Ampere it has no bfloat16.
    if (
        head_dim % (16 // query.dtype.itemsize) == 0
        and not (gqa and query.shape[1] != key.shape[1])
        and (ampere or query.dtype is not bfloat16)
    ):
        return _efficient(query, key, value, mask)
    return _math(query, key, value, mask, causal=causal, gqa=gqa)


# -- flash -------------------------------------------------------------------------------------------


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def flash_attention(query: Tensor, key: Tensor, value: Tensor, *, package: bool = False) -> Tensor:
    """FlashAttention-2 on 16-bit inputs: PyTorch's copy of it, or the flash-attn ``package``, which does
    without a second tensor of random state."""
    batch, heads, length, head_dim = query.shape
    operation = "_flash_attn_forward" if package else "_scaled_dot_product_flash_attention"
    node = Node(_flash_backward, query, key, value) if ops.tracked(query, key, value) else None
    padded = head_dim % 8 != 0
    if padded:
        width = _up(head_dim, 8)
        query, key, value = (
            empty((*x.shape[:-1], width), x.dtype, "constant_pad_nd") for x in (query, key, value)
        )
    saved = None if node is None else [save(query), save(key), save(value)]
    out = ops.pointwise(operation, query)
    logsumexp = empty((batch, heads, length), float32, operation)
    splits = key_splits(batch * heads, length, head_dim)
    accumulators = None
    if splits > 1:
        shape = (splits, batch, heads, length)
        accumulators = (
            empty(shape, float32, operation),
            empty((*shape, _rounded_head(head_dim)), float32, operation),
        )
    seed = empty((2,), int64, operation)
    random = [seed] if package else [seed, empty((), int64, operation)]
    del accumulators, seed
    if padded:
        out = Tensor((batch, heads, length, head_dim), out.dtype, out.storage, strides_of(out))
    if node is not None and saved is not None:
        saved += [save_output(out), save_output(logsumexp), *map(save_output, random)]
        node.saved = saved
        node.context = package
        attach(node, out)
    return out


def _rounded_head(head_dim: int) -> int:
    return _up(head_dim, 32 if head_dim <= 128 else 64)


def key_splits(rows: int, length: int, head_dim: int) -> int:
    """flash_api.cpp, num_splits_heuristic: into how many parts keys are split to fill the card.

    ``rows`` are batch times heads. The fewest splits within 85 % of the best use of the card; more than
    enough blocks need none.
    """
    processors = 2 * state.card.multiprocessors
    blocks = rows * -(-length // 64)
    if blocks >= 0.8 * processors:
        return 1
    keys = -(-length // (256 if head_dim <= 64 else 128 if head_dim <= 128 else 64))
    used = {}
    for splits in range(1, min(128, processors, keys) + 1):
        if splits == 1 or -(-keys // splits) != -(-keys // (splits - 1)):
            waves = blocks * splits / processors
            used[splits] = waves / -(-blocks * splits // processors)
    best = max(used.values())
    return next(splits for splits, share in used.items() if share >= 0.85 * best)


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
    rows = _up(length, 128)
    softmax_d = empty((batch, heads, rows), float32, operation)
    accumulator = empty((batch, rows, heads, _rounded_head(head_dim)), float32, operation)
    if key.shape[1] != heads:
        expanded = [empty((batch, length, heads, head_dim), key.dtype, operation) for _ in range(2)]
        del expanded
    del softmax_d, accumulator
    return for_query, for_key, for_value


# -- memory-efficient ------------------------------------------------------------------------------


def _efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, length, head_dim = query.shape
    operation = "_scaled_dot_product_efficient_attention"
    bias = None
    if mask is not None:
        bias = _additive(mask, query.dtype)
        if mask.shape[-1] % 8:  # preprocess_mask: rows are padded until they are aligned
            bias = empty((*mask.shape[:-1], _up(mask.shape[-1], 8)), query.dtype, "constant_pad_nd")
    node = Node(_efficient_backward, query, key, value) if ops.tracked(query, key, value) else None
    saved = None
    if node is not None:
        saved = [save(query), save(key), save(value)] + ([save(bias)] if bias is not None else [])
    out = empty((batch, length, heads, head_dim), query.dtype, operation)
    out = ops.transpose(out, 1, 2)
    logsumexp = empty((batch, heads, _up(length, 32) if node is not None else 0), float32, operation)
    if head_dim > 128 and query.dtype is not float32:
        accumulator = empty((batch, length, heads, head_dim), float32, operation)
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
    nbytes = _efficient_workspace(batch * heads, length, head_dim, half)
    workspace = empty((nbytes,), uint8, operation)
    del workspace, delta
    return gradients


def _efficient_workspace(rows: int, length: int, head_dim: int, half: bool) -> int:
    """kernel_backward.h, workspace_size, of the kernel that the card gets from cutlassB.h (sm80 and later).

    Tiles of fp32 for dQ, each with 16 bytes of bookkeeping, and where dK and dV do not stay in registers,
    one pair of tiles for each split of the keys. ``rows`` are batch times heads.
    """
    tile_rows = tile_columns = 64
    registers = False
    large = state.card.shared_memory > 102_400
    if half:
        if head_dim <= 64:
            registers = True
        elif head_dim <= 96 and state.card.capability in ((8, 6), (8, 9)):
            tile_rows, registers = 128, True
        elif head_dim <= 128 and large:
            tile_rows = tile_columns = 128
            registers = True
        elif head_dim > 128 and large:
            tile_rows = 128
    elif head_dim > 64 and large:
        tile_rows = 128
    tile = tile_rows * tile_columns + 4
    elements = -(-length // tile_rows) * -(-head_dim // tile_columns) * tile
    if half and not registers:
        splits = max(1, min(-(-length // tile_columns), 200 // rows))
        elements += 2 * splits * tile_columns * _up(head_dim, tile_rows)
    return rows * _up(elements, 4) * 4


# -- math --------------------------------------------------------------------------------------------


def _math(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, gqa: bool
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
    scores = _safe_softmax(scores)
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
