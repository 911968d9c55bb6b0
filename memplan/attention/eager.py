"""Products and a softmax (transformers 5.23, models/*/modeling_*.py, ``eager_attention_forward``).

It always has a mask: zero where attended, the dtype's minimum elsewhere.
"""

from __future__ import annotations

from memplan.asked.recipe import Batches
from memplan.attention import Attention
from memplan.attention._masks import boolean
from memplan.parts.context import Context
from memplan.parts.groups import repeat_kv
from memplan.shadow import ops
from memplan.shadow.matmul import matmul
from memplan.shadow.tensor import DType, Tensor, empty, float32


def _attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    key_states = repeat_kv(k, groups)
    value_states = repeat_kv(v, groups)
    attn_weights = ops.scale(matmul(q, ops.transpose(key_states, 2, 3)))
    if context.spec.attn_logit_softcapping is not None:
        attn_weights = ops.scale(attn_weights, "div")
        attn_weights = ops.result_activation("tanh", attn_weights)
        attn_weights = ops.scale(attn_weights)
    if context.mask is not None:
        attn_weights = ops.add(attn_weights, context.mask)
    attn_weights = ops.to(ops.softmax(attn_weights, float32), q.dtype)
    attn_weights = ops.dropout(attn_weights, context.spec.attention_dropout)
    attn_output = matmul(attn_weights, value_states)
    attn_output = ops.contiguous(ops.transpose(attn_output, 1, 2))
    return attn_output, attn_weights


def _mask(shape: tuple[int, int], dtype: DType, local: bool, bites: bool, batches: Batches | None) -> Tensor:
    """eager_mask: zero where attended, the dtype's minimum elsewhere."""
    mask = boolean(shape, local, batches)
    zero = empty((), dtype, "zeros")
    minimum = empty((), dtype, "scalar_tensor")
    additive = empty(mask.shape, dtype, "where")
    del zero, minimum, mask
    return additive


ATTENTION = Attention(_attend, masked=lambda bites, batches: True, mask=_mask, fused=False)
