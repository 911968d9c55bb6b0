"""Liger-Kernel's fused linear cross entropy: logits chunk by chunk, and gradients already in forward.

Source: liger_kernel/transformers/model/loss_utils.py ``LigerForCausalLMLoss`` and
ops/fused_linear_cross_entropy.py (0.8.5). Its Triton kernels turn logits into their gradient in place.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from importlib import import_module
from types import MethodType
from typing import Any

from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.errors import TraceError
from memplan.libraries import Library
from memplan.losses import Labels, Loss, Patch, StandIns
from memplan.losses.standard import per_item
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save_output, unpack
from memplan.shadow.matmul import autocast, product
from memplan.shadow.tensor import Tensor, bool_, empty, float32, int64, state

# How many times the hidden states' size logits may have, for model types whose patch asks for more than once
# (liger_kernel/transformers/model/gpt_oss.py, 0.8.5)
_SHARES = {"gpt_oss": 8}


def _head(
    head: Any, hidden: Tensor, labels: Labels, router_logits: list[Tensor] | None, spec: ModelSpec
) -> tuple[Tensor, None]:
    state.tape.module = "loss"
    return liger_loss(hidden, head.weight, labels, _SHARES.get(spec.model_type, 1)), None


def liger_loss(hidden: Tensor, weight: Tensor, labels: Labels, share: int = 1) -> Tensor:
    """Shift the labels, flatten, and the fused function."""
    batch, length = labels.shape
    padded = empty((batch, length + 1), int64, "constant_pad_nd")
    # labels[..., 1:] is contiguous for one row
    shift_labels = padded if batch == 1 else empty((batch, length), int64, "clone")
    hidden_states = ops.view(hidden, (batch * length, hidden.shape[-1]))
    loss = _fused_linear_cross_entropy(hidden_states, weight, share)
    del padded, shift_labels
    return per_item(loss, labels)


def chunk_size(tokens: int, hidden_size: int, vocabulary: int, share: int = 1) -> int:
    """Tokens whose logits are made at a time: about ``share`` times as many bytes as the hidden states,
    rounded up to a power of two."""
    parts = -(-vocabulary // (share * hidden_size))
    chunk = 1 << (-(-tokens // parts) - 1).bit_length()
    return min(chunk, tokens)


def _fused_linear_cross_entropy(hidden: Tensor, weight: Tensor, share: int) -> Tensor:
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
    chunk = chunk_size(tokens, width, vocabulary, share)
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


# -- Liger-Kernel's own code -----------------------------------------------------------------------------


def _attach(base: Any) -> None:
    """As ``apply_liger_kernel`` of transformers' Trainer, with the loss alone."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind, forward = type(base), type(base).forward
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(base.config.model_type)
    if apply is not None:
        kernels = {name for name in inspect.signature(apply).parameters if name != "model"}
        with suppress(NotImplementedError):  # Granite's, of a kernel that it has not got
            apply(model=base, **{name: name == "fused_linear_cross_entropy" for name in kernels})
    if kind.forward is not forward:  # of some families it patches the class, which others may use
        base.forward = MethodType(kind.forward, base)
        kind.forward = forward
    if "forward" not in vars(base):
        raise TraceError(
            f"Liger-Kernel has no fused loss for models of the type {base.config.model_type!r}: "
            "use the standard loss"
        )


def _patches(stand_ins: StandIns, card: Card) -> list[Patch]:
    import torch

    module = import_module("liger_kernel.ops.fused_linear_cross_entropy")
    asking = ("_can_use_mm_out", "fused_linear_cross_entropy_forward")
    dtype = torch.get_autocast_dtype
    return [
        *(
            (module, name, stand_ins.launch())
            for name in ("liger_cross_entropy_kernel", "element_mul_kernel")
        ),
        *((module, name, stand_ins.on_cuda(getattr(module, name))) for name in asking),
        (torch, "get_autocast_dtype", lambda device: dtype("cpu")),
        (torch.cuda, "get_device_capability", lambda device=None: card.capability),
    ]


LOSS = Loss(
    _head,
    library=Library("liger-kernel", "0.8", "liger_kernel"),
    attach=_attach,
    patches=_patches,
    # how many labels count; whether the loss's gradient is 1
    answers={"fused_linear_cross_entropy_forward": 1, "fused_linear_cross_entropy_backward": False},
)
