"""What every decoder layer is given beside the hidden states.

Shapes: B batch, S sequence, H heads, K key-value heads, D head size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from memplan.asked.spec import ModelSpec
from memplan.shadow.tensor import DType, Tensor

Leaves = dict[str, Any]  # a layer's leaf modules by name, ``m["self_attn.q_proj"]``
SharedKV = dict[str, tuple[Tensor, Tensor]]  # keys and values that layers have stored, by kind of attention


class Context(NamedTuple):
    """Of one layer in one forward pass. ``attend``: the attention interface, [B, H, S, D] to [B, S, H, D],
    and the weights that eager attention returns."""

    spec: ModelSpec
    attend: Attend
    dtype: DType  # the load dtype
    cos_BSD: Tensor
    sin_BSD: Tensor
    mask: Tensor | None
    position_ids: Tensor | None  # not read, but kept alive: a checkpoint's closure holds all arguments
    sliding: bool
    rotated: bool  # queries and keys are turned
    cache: list[Tensor] | None  # keys and values that a DynamicCache keeps, or None without a cache
    router_logits: list[Tensor] | None  # what each layer's router said, where the loss asks for it
    items: Tensor | None  # neither read: a Trainer's num_items_in_batch, which every layer is handed
    layer: int  # its number
    per_layer_input: Tensor | None  # its own embeddings [B, S, P], where layers have some
    shared_kv: SharedKV
    causal: bool = True


Attend = Callable[[Tensor, Tensor, Tensor, Context], tuple[Tensor, "Tensor | None"]]
Layer = Callable[[Leaves, Tensor, Context], Tensor]
