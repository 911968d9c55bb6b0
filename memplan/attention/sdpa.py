"""``torch.nn.functional.scaled_dot_product_attention`` (transformers/integrations/sdpa_attention.py, 5.23).

Nothing is padded here, so it needs a mask only where a sliding window bites (``_ignore_causal_mask_sdpa``).
"""

from __future__ import annotations

from memplan.attention import Attention
from memplan.attention._groups import repeat_kv
from memplan.attention._masks import boolean
from memplan.parts.context import Context
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
    causal = context.mask is None and q.shape[2] > 1
    out = scaled_dot_product_attention(q, k, v, context.mask, causal=causal, gqa=gqa)
    return ops.contiguous(ops.transpose(out, 1, 2)), None


def _mask(shape: tuple[int, int], dtype: DType, local: bool, wanted: bool) -> Tensor | None:
    if wanted:
        return boolean(shape, local)
    _all_ones(shape)
    return None


def _all_ones(shape: tuple[int, int]) -> None:
    """fast_all(padding_mask): a sum and a comparison."""
    total = ops.count(shape)
    equal = empty((), bool_, "eq")
    del total, equal


ATTENTION = Attention(_attend, masked=lambda bites: bites, mask=_mask)
