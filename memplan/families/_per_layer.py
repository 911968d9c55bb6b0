"""Layers with embeddings of their own, and last ones that reuse the keys and values of one before them: the
small Gemma 4 (transformers 5.23, models/gemma4).

Shapes: B batch, S sequence, L layers, P size of these embeddings, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.parts.context import Context, Leaves
from memplan.parts.layer import act
from memplan.parts.module import Module, Modules, linear, norm
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor


def sizes(fields: Fields) -> dict[str, Any]:
    size = fields.size("hidden_size_per_layer_input", least=0)
    words = fields.size("vocab_size_per_layer_input") if size else 0
    return {"hidden_size_per_layer_input": size, "vocab_size_per_layer_input": words}


def shared_kv(fields: Fields, kinds: Sequence[str]) -> dict[str, Any]:
    """How many layers reuse keys and values; each kind of them needs one before that has some."""
    count = fields.size("num_kv_shared_layers", least=0)
    own = set(kinds[: len(kinds) - count]) if count < len(kinds) else set()
    for kind in sorted(set(kinds) - own) if count else ():
        fields.fail(
            f"num_kv_shared_layers is {count}, but none of the {max(len(kinds) - count, 0)} layers before "
            f"these is of the type {kind}"
        )
    return {"num_kv_shared_layers": count}


def without_kv(made: Modules) -> Modules:
    """A layer's modules where keys and values are another's."""
    left_out = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")
    return {name: module for name, module in made.items() if name not in left_out}


def modules(spec: ModelSpec) -> Modules:
    """Of a layer: what its embeddings go through."""
    hidden, size = spec.hidden_size, spec.hidden_size_per_layer_input
    if not size:
        return {}
    return {
        "per_layer_input_gate": linear(hidden, size),
        "per_layer_projection": linear(size, hidden),
        "post_per_layer_input_norm": norm(hidden),
    }


def outside(spec: ModelSpec) -> Modules:
    """One table for all layers, and the projection of the embeddings that is added."""
    size = spec.hidden_size_per_layer_input
    if not size:
        return {}
    packed = spec.num_hidden_layers * size
    return {
        "model.embed_tokens_per_layer": Module(
            "embedding", {"weight": (spec.vocab_size_per_layer_input, packed)}
        ),
        "model.per_layer_model_projection": linear(spec.hidden_size, packed),
        "model.per_layer_projection_norm": norm(size),
    }


def apart(x: Tensor, spec: ModelSpec) -> Tensor:
    """[B, S, L·P] to [B, S, L, P]."""
    return ops.view(x, (*x.shape[:2], spec.num_hidden_layers, spec.hidden_size_per_layer_input))


def gated(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    """A layer's own embeddings, gated by the hidden states, in their width again: [B, S, E]."""
    assert context.per_layer_input is not None, "a layer without embeddings of its own"
    hidden = m["per_layer_input_gate"](hidden)
    hidden = act(context.spec, hidden, "")
    hidden = ops.mul(hidden, context.per_layer_input)
    hidden = m["per_layer_projection"](hidden)
    return m["post_per_layer_input_norm"](hidden)  # type: ignore[no-any-return]
