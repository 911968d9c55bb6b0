"""The flash-attn package (transformers/modeling_flash_attention_utils.py, 5.23).

It knows grouped queries and windows itself, so it is given no mask, and computes in 16 bits
(``get_target_dtype``).
"""

from __future__ import annotations

from memplan.asked.recipe import Batches
from memplan.attention import Attention
from memplan.parts.context import Context
from memplan.shadow import ops
from memplan.shadow.attention import flash_attention
from memplan.shadow.tensor import DType, Tensor, bool_, empty, float32, int64, state


def _attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, None]:
    return ops.contiguous(ops.transpose(_flash(q, k, v, context), 1, 2)), None


def _flash(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    if q.dtype is float32:
        q, k, v = (ops.to(x, state.autocast or context.dtype) for x in (q, k, v))
    assert context.position_ids is not None, "images, with which it is refused"
    _is_packed_sequence(context.position_ids, q.shape[0])
    return flash_attention(q, k, v, dropout=context.spec.attention_dropout, package=True)


def _is_packed_sequence(position_ids: Tensor, batch: int) -> None:
    """What looking for packed sequences costs for a moment (modeling_flash_attention_utils.py)."""
    if batch != 1 or position_ids.shape[0] == 1:
        return
    expected = empty(position_ids.shape, int64, "arange")
    least = empty((), int64, "min")
    expected = empty(position_ids.shape, int64, "add")
    del least
    difference = empty(position_ids.shape, int64, "sub")
    distance = empty(position_ids.shape, int64, "abs")
    del difference
    total = empty((), int64, "sum")
    del distance
    answer = empty((), bool_, "_to_copy")
    del total, expected, answer


def _mask(shape: tuple[int, int], dtype: DType, local: bool, bites: bool, batches: Batches | None) -> None:
    """flash_attention_mask: ``attention_mask.all()``."""
    every = empty((), bool_, "all")
    del every


ATTENTION = Attention(_attend, masked=lambda bites, batches: False, mask=_mask, package=True)
