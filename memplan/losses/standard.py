"""transformers' ForCausalLMLoss (loss/loss_utils.py, 5.23), on logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memplan.asked.spec import ModelSpec
from memplan.losses import Head, Labels, Loss
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, save_output, unpack
from memplan.shadow.tensor import Tensor, empty, float32, int64, state


def head_of(loss_function: Callable[[Tensor, Labels], Tensor]) -> Head:
    """``lm_head``, a number to scale by, caps, ``loss_function`` of logits and labels."""

    def whole(
        head: Any, hidden: Tensor, labels: Labels, router_logits: list[Tensor] | None, spec: ModelSpec
    ) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        if spec.logits_scaling is not None or spec.logit_scale is not None:
            state.tape.module = ""
            logits = ops.scale(logits, "mul" if spec.logits_scaling is None else "div")
        if spec.final_logit_softcapping is not None:
            logits = ops.scale(logits, "div")
            logits = ops.result_activation("tanh", logits)
            logits = ops.scale(logits)
        state.tape.module = "loss"
        loss = loss_function(logits, labels)
        return loss, logits

    return whole


def causal_lm_loss(logits: Tensor, labels: Labels) -> Tensor:
    """Upcast, shift the labels, flatten, cross entropy."""
    logits = ops.to(logits, float32)
    batch, length = labels.shape
    padded = empty((batch, length + 1), int64, "constant_pad_nd")
    # labels[..., 1:] is contiguous for one row
    shift_labels = padded if batch == 1 else empty((batch, length), int64, "clone")
    logits = ops.view(logits, (batch * length, logits.shape[-1]))
    return per_item(cross_entropy(logits, shift_labels), labels)


def per_item(loss: Tensor, labels: Labels) -> Tensor:
    """A sum over labels divided by their count; the mean, where nobody says how many count."""
    return loss if labels.items is None else ops.divide(loss, labels.items)


def cross_entropy(source: Tensor, target: Tensor) -> Tensor:
    """``torch.nn.functional.cross_entropy``."""
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


LOSS = Loss(head_of(causal_lm_loss), tiled=False)
