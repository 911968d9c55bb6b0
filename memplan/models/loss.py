"""From hidden states to the loss.

``causal_lm_loss`` is transformers' ForCausalLMLoss (loss/loss_utils.py, 5.23), on logits. The other two take
the last hidden states and the head's weight and never make all logits: ``chunked_loss`` is TRL's fused head
(trl/kernels/chunked_logprob.py, 1.16), ``liger_loss`` Liger-Kernel's fused linear cross entropy
(liger_kernel/ops/fused_linear_cross_entropy.py, 0.8.5).
"""

from __future__ import annotations

from typing import Any

from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, save_output, unpack
from memplan.shadow.matmul import autocast
from memplan.shadow.tensor import DType, Tensor, bool_, empty, float32, int64, state


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Upcast, shift the labels, flatten, cross entropy."""
    logits = ops.to(logits, float32)
    batch, length = labels.shape
    labels = empty((batch, length + 1), int64, "constant_pad_nd")
    # labels[..., 1:] is contiguous for one row
    shift_labels = labels if batch == 1 else empty((batch, length), int64, "clone")
    logits = ops.view(logits, (batch * length, logits.shape[-1]))
    return _cross_entropy(logits, shift_labels)


def _cross_entropy(source: Tensor, target: Tensor) -> Tensor:
    log_probabilities = _log_softmax(source)
    return _nll(log_probabilities, target)


def _log_softmax(x: Tensor) -> Tensor:
    node = Node(_log_softmax_backward, x) if ops.tracked(x) else None
    out = empty(x.shape, x.dtype, "_log_softmax")
    if node is not None:
        node.saved = save_output(out)
        attach(node, out)
    return out


def _log_softmax_backward(node: Node, grad: Tensor) -> Any:
    result = unpack(node.saved)
    return (empty(result.shape, grad.dtype, "_log_softmax_backward_data"),)


def _nll(x: Tensor, target: Tensor) -> Tensor:
    node = Node(_nll_backward, x) if ops.tracked(x) else None
    saved = [save(x), save(target)] if node is not None else []
    out = empty((), x.dtype, "nll_loss_forward")
    total_weight = empty((), x.dtype, "nll_loss_forward")
    if node is not None:
        node.saved = [*saved, save_output(total_weight)]
        node.context = x.shape
        attach(node, out)
    return out


def _nll_backward(node: Node, grad: Tensor) -> Any:
    return (empty(node.context, grad.dtype, "nll_loss_backward"),)


# -- TRL's chunks ------------------------------------------------------------------------------------

_TOKEN_CHUNK = 4096
_VOCABULARY_CHUNK = 32_768


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """ChunkedLogProbFunction over tiles of 4,096 tokens by 32,768 entries of the vocabulary, and the mean."""
    batch, length, width = hidden.shape
    mask = empty((batch, length - 1), bool_, "ne")
    node = Node(_shifted_backward, hidden) if ops.tracked(hidden) else None
    selected = empty((batch * (length - 1), width), hidden.dtype, "index")
    if node is not None:
        node.context = hidden.shape
        attach(node, selected)
    targets = empty((batch * (length - 1),), int64, "index")
    log_probabilities = _chunked_log_probabilities(selected, weight, targets)
    del selected, targets
    scattered = ops.pointwise("masked_scatter", log_probabilities)
    node = Node(_scattered_backward, log_probabilities) if ops.tracked(log_probabilities) else None
    if node is not None:
        node.saved = save(mask)
        attach(node, scattered)
    del mask, log_probabilities
    total = ops.neg(scattered)
    node = Node(ops._expand_backward, total) if ops.tracked(total) else None
    summed = empty((), float32, "sum")
    if node is not None:
        attach(node, summed)
    del total
    return ops.scale(summed, "div")


def _shifted_backward(node: Node, grad: Tensor) -> Any:
    """The gradient of ``hidden[:, :-1][mask]``: scattered, then padded with the last position."""
    batch, length, width = node.context
    scattered = empty((batch, length - 1, width), grad.dtype, "index_put")
    padded = empty(node.context, grad.dtype, "slice_backward")
    del scattered
    return (padded,)


def _scattered_backward(node: Node, grad: Tensor) -> Any:
    mask = unpack(node.saved)
    return (empty(mask.shape, grad.dtype, "masked_select"),)


def _chunked_log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    operation = "chunked_log_prob"
    count = hidden.shape[0]
    dtype = state.autocast or hidden.dtype
    node = Node(_chunked_backward, hidden, weight) if ops.tracked(hidden, weight) else None
    running = [empty((count,), float32, operation) for _ in range(7)]
    _run_tiles(hidden, weight, dtype, operation)
    logsumexp = empty((count,), float32, operation)
    out = empty((count,), float32, operation)
    entropy = empty((count,), float32, operation)
    top = empty((count,), bool_, operation)
    del running, top
    if node is not None:
        node.saved = [save(hidden), save(weight), save(targets), save_output(logsumexp), save_output(entropy)]
        node.context = dtype
        attach(node, out)
    return out


def _run_tiles(hidden: Tensor, weight: Tensor, dtype: DType, operation: str) -> None:
    """The buffer of one tile, and copies of a chunk of tokens and of weights where dtypes differ."""
    tokens = min(hidden.shape[0], _TOKEN_CHUNK)
    tile = empty((tokens, _VOCABULARY_CHUNK), dtype, operation)
    chunk = None if hidden.dtype is dtype else empty((tokens, hidden.shape[1]), dtype, operation)
    if weight.dtype is not dtype:
        rows = empty((min(_VOCABULARY_CHUNK, weight.shape[0]), weight.shape[1]), dtype, operation)
        del rows
    del tile, chunk


def _chunked_backward(node: Node, grad: Tensor) -> Any:
    operation = "chunked_log_prob_backward"
    hidden, weight, *_rest = [unpack(saved) for saved in node.saved]
    for_hidden = empty(hidden.shape, float32, operation) if node.edges[0] else None
    for_weight = empty(weight.shape, float32, operation) if node.edges[1] else None
    _run_tiles(hidden, weight, node.context, operation)
    if for_hidden is not None:
        cast_hidden = ops.to(for_hidden, hidden.dtype)
        for_hidden = None
    else:
        cast_hidden = None
    cast_weight = None if for_weight is None else ops.to(for_weight, weight.dtype)
    return cast_hidden, cast_weight


# -- Liger's fused linear cross entropy --------------------------------------------------------------


def liger_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits chunk by chunk, gradients already in forward: only those are kept for backward."""
    operation = "liger_fused_linear_cross_entropy"
    batch, length = labels.shape
    labels = empty((batch, length + 1), int64, "constant_pad_nd")
    shift_labels = labels if batch == 1 else empty((batch, length), int64, "clone")
    count, width = batch * length, hidden.shape[-1]
    if state.autocast is not None:
        hidden = autocast(hidden)
        weight = autocast(weight)
    hidden = ops.view(hidden, (count, width))
    node = Node(_liger_backward, hidden, weight) if ops.tracked(hidden, weight) else None
    for_hidden = empty((count, width), hidden.dtype, operation)
    for_weight = empty(weight.shape, weight.dtype, operation) if node is not None and node.edges[1] else None
    losses = empty((count,), float32, operation)
    mask = empty((count,), bool_, operation)
    chunk = liger_chunk(count, width, weight.shape[0])
    logits = empty((chunk, weight.shape[0]), hidden.dtype, operation)
    del logits
    out = empty((), float32, operation)
    del losses, mask, shift_labels
    if node is not None:
        node.saved = [save_output(for_hidden), None if for_weight is None else save_output(for_weight)]
        attach(node, out)
    return out


def liger_chunk(tokens: int, hidden_size: int, vocabulary: int) -> int:
    """Tokens whose logits Liger makes at a time: about as many bytes as the hidden states, rounded up to a
    power of two."""
    parts = -(-vocabulary // hidden_size)
    chunk = 1 << (-(-tokens // parts) - 1).bit_length()
    return min(chunk, tokens)


def _liger_backward(node: Node, grad: Tensor) -> Any:
    return tuple(None if saved is None else unpack(saved) for saved in node.saved)
