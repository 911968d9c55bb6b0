"""Keys and values for every query, where heads come in groups (``repeat_kv``)."""

from __future__ import annotations

from memplan.shadow import ops
from memplan.shadow.tensor import Tensor


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return x
    batch, heads, length, width = x.shape
    wide = ops.expand(_unsqueeze_heads(x), (batch, heads, groups, length, width))
    return ops.reshape(wide, (batch, heads * groups, length, width))


def _unsqueeze_heads(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    return ops.view(x, (batch, heads, 1, length, width))
