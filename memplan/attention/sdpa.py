"""``torch.nn.functional.scaled_dot_product_attention`` (transformers/integrations/sdpa_attention.py, 5.23).

It needs a mask only where a sliding window bites, a batch is padded (``_ignore_causal_mask_sdpa``) or
sequences lie in one row (``create_causal_mask``).
"""

from __future__ import annotations

from memplan.asked.recipe import Batches
from memplan.attention import Attention
from memplan.attention._masks import boolean
from memplan.parts.context import Context
from memplan.parts.groups import repeat_kv
from memplan.shadow import ops
from memplan.shadow.attention import scaled_dot_product_attention
from memplan.shadow.tensor import DType, Tensor, bool_, empty


def _attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, None]:
    groups = q.shape[1] // k.shape[1]
    gqa = False
    if groups > 1:
        # use_gqa_in_sdpa: no mask, and a head size that the fused kernels support
        gqa = context.mask is None and k.shape[-1] <= 256
        if not gqa:
            k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    causal = context.causal and context.mask is None and q.shape[2] > 1
    dropout = context.spec.attention_dropout
    out = scaled_dot_product_attention(q, k, v, context.mask, causal=causal, gqa=gqa, dropout=dropout)
    return ops.contiguous(ops.transpose(out, 1, 2)), None


def _mask(
    shape: tuple[int, int], dtype: DType, local: bool, bites: bool, batches: Batches | None
) -> Tensor | None:
    if not _masked(bites, batches):
        if batches is not None:
            _all_ones(shape)
        return None
    if batches is Batches.PADDED and not bites:
        for _ in range(2):  # also whether only what is to come is masked
            _all_ones(shape)
    return boolean(shape, local, batches)


def _masked(bites: bool, batches: Batches | None) -> bool:
    return bites or batches in (Batches.PADDED, Batches.PACKED)


def _all_ones(shape: tuple[int, int]) -> None:
    """fast_all(padding_mask): a sum and a comparison."""
    total = ops.count(shape)
    equal = empty((), bool_, "eq")
    del total, equal


ATTENTION = Attention(_attend, masked=_masked, mask=_mask)
