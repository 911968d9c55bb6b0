"""Phi-3 and Phi-4: queries, keys and values in one projection, and a part of each head is rotated
(transformers 5.23, models/phi3)."""

from __future__ import annotations

from memplan.asked.spec import ModelSpec
from memplan.families import Family
from memplan.parts.config import COMMON, Config, all_or_none
from memplan.parts.context import Context, Leaves
from memplan.parts.layer import act, cached, heads, residual
from memplan.parts.module import Modules, linear, norms, widths
from memplan.parts.rotary import rope, tables
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, state


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    query, key = widths(spec)
    return {
        "self_attn.o_proj": linear(query, hidden),
        "self_attn.qkv_proj": linear(hidden, query + 2 * key),
        "mlp.gate_up_proj": linear(hidden, 2 * inner),
        "mlp.down_proj": linear(inner, hidden),
        **norms(spec),
    }


def _rotate(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    cos, sin = tables(context)
    width = cos.shape[-1]
    q_rot, q_pass = ops.narrow_last(q, 0, width), ops.narrow_last(q, width, q.shape[-1])
    k_rot, k_pass = ops.narrow_last(k, 0, width), ops.narrow_last(k, width, k.shape[-1])
    q_embed = ops.cat_last(rope(q_rot, cos, sin), q_pass)
    k_embed = ops.cat_last(rope(k_rot, cos, sin), k_pass)
    return q_embed, k_embed


def _attention(m: Leaves, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    if state.spread is not None:  # all arguments are given by name
        return state.spread.module("self_attn", _attend, None, m, x, context)  # type: ignore[no-any-return]
    return _attend(None, m, x, context)


def _attend(_: None, m: Leaves, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    """One projection, kept alive by its name until the end."""
    spec = context.spec
    qkv = m["self_attn.qkv_proj"](x)
    query, key = widths(spec)
    query_pos, key_pos = query, query + key
    q = ops.narrow_last(qkv, 0, query_pos)
    k = ops.narrow_last(qkv, query_pos, key_pos)
    v = ops.narrow_last(qkv, key_pos, qkv.shape[-1])
    q, k, v = heads(q, spec.head_dim), heads(k, spec.head_dim), heads(v, spec.head_dim)
    state.tape.module = "self_attn"
    q, k = _rotate(q, k, context)
    k, v = cached(k, v, context)
    out, weights = context.attend(q, k, v, context)
    out = ops.view(out, (*out.shape[:2], out.shape[2] * out.shape[3]))
    out = m["self_attn.o_proj"](out)
    return out, weights


def _mlp(m: Leaves, x: Tensor, context: Context) -> Tensor:
    if state.spread is not None:
        return state.spread.module("mlp", _gated, x, m, context)  # type: ignore[no-any-return]
    return _gated(x, m, context)


def _gated(x: Tensor, m: Leaves, context: Context) -> Tensor:
    up_states = m["mlp.gate_up_proj"](x)
    gate, up_states = ops.chunk_last(up_states)
    up_states = ops.mul(up_states, act(context.spec, gate))
    return m["mlp.down_proj"](up_states)  # type: ignore[no-any-return]


def _dropout(name: str, hidden: Tensor, context: Context) -> Tensor:
    p = context.spec.resid_dropout
    if state.spread is not None:
        return state.spread.module(name, ops.dropout, hidden, p)  # type: ignore[no-any-return]
    return ops.dropout(hidden, p)


def _layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    before = hidden
    hidden = m["input_layernorm"](hidden)
    hidden, _weights = _attention(m, hidden, context)
    hidden = residual(before, _dropout("resid_attn_dropout", hidden, context))
    before = hidden
    hidden = m["post_attention_layernorm"](hidden)
    hidden = _mlp(m, hidden, context)
    hidden = residual(before, _dropout("resid_mlp_dropout", hidden, context))
    return hidden


FAMILY = Family(
    config=Config(
        architecture="Phi3ForCausalLM",
        defaults={
            **COMMON,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "resid_pdrop": 0.0,
            "sliding_window": None,
        },
        layers=all_or_none,
        nullable=("num_key_value_heads", "sliding_window"),
        attention_bias=False,
        rope_types=("default", "longrope"),
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        rotates_part=True,
    ),
    modules=_modules,
    layer=_layer,
)
