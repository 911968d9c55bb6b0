"""Liger-Kernel's fused linear cross entropy: logits chunk by chunk, and gradients already in forward.

Source: liger_kernel/transformers/model/loss_utils.py ``LigerForCausalLMLoss`` and
ops/fused_linear_cross_entropy.py (0.8.5). Its Triton kernels turn logits into their gradient in place.
"""

from __future__ import annotations

from typing import Any

from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save_output, unpack
from memplan.shadow.matmul import autocast, product
from memplan.shadow.tensor import Tensor, bool_, empty, float32, int64, state


def liger_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Shift the labels, flatten, and the fused function."""
    batch, length = labels.shape
    labels = empty((batch, length + 1), int64, "constant_pad_nd")
    # labels[..., 1:] is contiguous for one row
    shift_labels = labels if batch == 1 else empty((batch, length), int64, "clone")
    hidden_states = ops.view(hidden, (batch * length, hidden.shape[-1]))
    loss = _fused_linear_cross_entropy(hidden_states, weight)
    del shift_labels
    return loss


def chunk_size(tokens: int, hidden_size: int, vocabulary: int) -> int:
    """Tokens whose logits are made at a time: about as many bytes as the hidden states, rounded up to a
    power of two."""
    parts = -(-vocabulary // hidden_size)
    chunk = 1 << (-(-tokens // parts) - 1).bit_length()
    return min(chunk, tokens)


def _fused_linear_cross_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
    """``LigerFusedLinearCrossEntropyFunction.forward``. Only the gradients are kept."""
    tokens, width = hidden.shape
    vocabulary = weight.shape[0]
    node = Node(_backward, hidden, weight) if ops.tracked(hidden, weight) else None
    grad_hidden = empty((tokens, width), hidden.dtype, "zeros_like")
    grad_weight = None
    if node is not None and node.edges[1]:
        grad_weight = empty(weight.shape, weight.dtype, "zeros_like")
    losses = empty((tokens,), float32, "zeros")
    mask = empty((tokens,), bool_, "ne")
    count = ops.count((tokens,))
    del count
    chunk = chunk_size(tokens, width, vocabulary)
    # _can_use_mm_out: products are written in place where autocast would cast nothing
    in_place = hidden.dtype is weight.dtype and state.autocast in (None, hidden.dtype)
    storage = empty((chunk, vocabulary), hidden.dtype, "empty") if in_place else None
    for start in range(0, tokens, chunk):
        _chunk(hidden, weight, min(chunk, tokens - start), storage, grad_weight)
    del storage
    loss = empty((), float32, "sum")
    del losses, mask
    if node is not None:
        node.saved = [save_output(grad_hidden), None if grad_weight is None else save_output(grad_weight)]
        attach(node, loss)
    return loss


def _chunk(
    hidden: Tensor, weight: Tensor, rows: int, storage: Tensor | None, grad_weight: Tensor | None
) -> None:
    """One chunk's logits, which become their gradient, and what that adds to both gradients."""
    width, vocabulary = hidden.shape[1], weight.shape[0]
    dtype = state.autocast or hidden.dtype
    logits = storage
    if logits is None:
        # autocast caches no cast of a view such as weight.t() (ATen/autocast_mode.cpp, cached_cast)
        cast_weight = None if weight.dtype is dtype else empty(weight.shape, dtype, "_to_copy")
        cast_hidden = None if hidden.dtype is dtype else empty((rows, width), dtype, "_to_copy")
        logits = product((rows, vocabulary), dtype, "mm")
        del cast_weight, cast_hidden
        cached_weight = autocast(weight)
        grad_hidden = product((rows, width), dtype, "mm")
        del cached_weight, grad_hidden
    if grad_weight is None:
        return
    cast_hidden = None if hidden.dtype is dtype else empty((rows, width), dtype, "_to_copy")
    if dtype is float32 or state.card.capability < (8, 0):
        # parameter-sized products and their fp32 copies, where neither kind of addmm applies
        short = product(weight.shape, dtype, "mm")
        del cast_hidden
        short = ops.to(short, float32)
        del short


def _backward(node: Node, grad: Tensor) -> Any:
    """Both gradients are there; they are scaled in place, unless the loss's own gradient is 1."""
    number = empty((), float32, "equal")
    compared = empty((), bool_, "equal")
    every = empty((), bool_, "equal")
    del number, compared, every
    return tuple(None if saved is None else unpack(saved) for saved in node.saved)
