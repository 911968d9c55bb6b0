"""transformers' ForCausalLMLoss as it was from 4.46 to 4.48 (loss/loss_utils.py, 4.48.3): logits are shifted,
not labels. Of several sequences that is a copy of the fp32 logits; of one it is a view.

Before 4.46 models made their loss themselves, and in another order: of fp32 logits, which took the place of
their bf16 ones. From 4.49 on it is the loss of today.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import TraceError
from memplan.losses import Labels, Loss
from memplan.losses.standard import cross_entropy, head_of, per_item
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, empty, float32, int64

if TYPE_CHECKING:
    import torch


def shifted_loss(logits: Tensor, labels: Labels) -> Tensor:
    """Upcast, shift logits and labels, flatten, cross entropy."""
    logits = ops.to(logits, float32)
    batch, length = labels.shape
    shift_logits = ops.contiguous(ops.narrow(logits, (batch, length - 1, logits.shape[-1])))
    # labels[..., 1:] is contiguous for one row
    shift_labels = labels if batch == 1 else empty((batch, length - 1), int64, "clone")
    shift_logits = ops.view(shift_logits, (batch * (length - 1), logits.shape[-1]))
    return per_item(cross_entropy(shift_logits, shift_labels), labels)


def _for_causal_lm(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: int | None = None,
    ignore_index: int = -100,
    **_: Any,
) -> torch.Tensor:
    """The library's own lines."""
    from torch import nn

    logits = logits.float()
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    shift_logits = shift_logits.view(-1, vocab_size)
    shift_labels = shift_labels.view(-1)
    shift_labels = shift_labels.to(shift_logits.device)
    reduction = "sum" if num_items_in_batch is not None else "mean"
    loss = nn.functional.cross_entropy(
        shift_logits, shift_labels, ignore_index=ignore_index, reduction=reduction
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _attach(base: Any) -> None:
    """In the place of the installed library's."""
    if not hasattr(type(base), "loss_function"):
        raise TraceError(f"{type(base).__name__} makes its loss by itself: use --loss standard")
    base.loss_function = _for_causal_lm


LOSS = Loss(head_of(shifted_loss), tiled=False, attach=_attach)
