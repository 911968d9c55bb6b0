"""Multi-head latent attention: keys and values of all heads come from one narrow vector a token, and a part
of each key that is rotated is the same for all heads (transformers 5.23, models/deepseek_v2, deepseek_v3 and
glm4_moe_lite).

``head_dim`` of a specification is the rotated part, as in these families' configurations. Shapes: B batch, H
heads, S sequence, N the part of a head that is not rotated, R the rotated one, V of a value, L the latent.
"""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.parts.context import Context, Leaves
from memplan.parts.layer import cached
from memplan.parts.module import Modules, linear, norm
from memplan.parts.rotary import Rotate
from memplan.shadow import ops
from memplan.shadow.recurrent import split_last, write
from memplan.shadow.tensor import Tensor, empty, state


def sizes(fields: Fields) -> dict[str, Any]:
    """What a specification says of it."""
    heads = fields.size("num_attention_heads")
    shared = fields.size_or_none("num_key_value_heads") or heads
    if shared != heads:
        fields.fail(f"num_key_value_heads is {shared}, but keys are expanded to all {heads} heads")
    return {
        "q_lora_rank": fields.size_or_none("q_lora_rank") or 0,
        "kv_lora_rank": fields.size("kv_lora_rank"),
        "qk_nope_head_dim": fields.size("qk_nope_head_dim"),
        "v_head_dim": fields.size("v_head_dim"),
    }


def projections(spec: ModelSpec) -> Modules:
    """Those of attention, and the norms over what lies between them."""
    hidden, heads, bias = spec.hidden_size, spec.num_attention_heads, spec.attention_bias
    queries, between, latent = heads * spec.qk_head_dim, spec.q_lora_rank, spec.kv_lora_rank
    if between:
        made = {
            "self_attn.q_a_proj": linear(hidden, between, bias),
            "self_attn.q_a_layernorm": norm(between),
            "self_attn.q_b_proj": linear(between, queries),
        }
    else:
        made = {"self_attn.q_proj": linear(hidden, queries)}
    return {
        **made,
        "self_attn.kv_a_proj_with_mqa": linear(hidden, latent + spec.head_dim, bias),
        "self_attn.kv_a_layernorm": norm(latent),
        "self_attn.kv_b_proj": linear(latent, heads * (spec.qk_nope_head_dim + spec.v_head_dim)),
        "self_attn.o_proj": linear(heads * spec.v_head_dim, hidden, bias),
    }


def attention(m: Leaves, x: Tensor, context: Context, rotate: Rotate) -> tuple[Tensor, Tensor | None]:
    """``DeepseekV3Attention.forward``: the output [B, S, E], and the weights that eager attention returns."""
    spec = context.spec
    batch, length, _ = x.shape
    q_BSHD = _queries(m, x)
    state.tape.module = "self_attn"
    q_BSHD = ops.view(q_BSHD, (batch, length, spec.num_attention_heads, spec.qk_head_dim))
    q_pass, q_rot = split_last(ops.transpose(q_BSHD, 1, 2), spec.qk_nope_head_dim, spec.head_dim)
    compressed_kv = m["self_attn.kv_a_proj_with_mqa"](x)
    state.tape.module = "self_attn"
    kv_nope, k_rot = split_last(compressed_kv, spec.kv_lora_rank, spec.head_dim)
    kv_nope = m["self_attn.kv_a_layernorm"](kv_nope)
    state.tape.module = "self_attn"
    kv_nope = ops.view(kv_nope, (batch, 1, length, spec.kv_lora_rank))
    k_rot = ops.view(k_rot, (batch, 1, length, spec.head_dim))
    q_rot, k_rot = rotate(q_rot, k_rot, context)
    kv_nope, k_rot = cached(kv_nope, k_rot, context)
    query_states = ops.cat_last(q_pass, q_rot)
    key_states, value_states = _expand_kv(m, kv_nope, k_rot, spec)
    out, weights = context.attend(query_states, key_states, value_states, context)
    out = ops.reshape(out, (batch, length, spec.num_attention_heads * spec.v_head_dim))
    out = m["self_attn.o_proj"](out)
    return out, weights


def _queries(m: Leaves, x: Tensor) -> Tensor:
    if "self_attn.q_proj" in m:
        return m["self_attn.q_proj"](x)  # type: ignore[no-any-return]
    latent = m["self_attn.q_a_layernorm"](m["self_attn.q_a_proj"](x))
    return m["self_attn.q_b_proj"](latent)  # type: ignore[no-any-return]


def _expand_kv(m: Leaves, kv_nope: Tensor, k_rot: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """``expand_kv``: keys [B, H, S, N + R], which are copied together, and values [B, H, S, V]."""
    batch, _, length, _ = kv_nope.shape
    heads, nope, value = spec.num_attention_heads, spec.qk_nope_head_dim, spec.v_head_dim
    kv_nope = m["self_attn.kv_b_proj"](kv_nope)
    state.tape.module = "self_attn"
    kv_nope = ops.transpose(ops.view(kv_nope, (batch, length, heads, nope + value)), 1, 2)
    k_nope, value_states = split_last(kv_nope, nope, value)
    k_rot = ops.expand(k_rot, (batch, heads, length, spec.head_dim))
    key_states = empty((batch, heads, length, spec.qk_head_dim), kv_nope.dtype, "new_empty")
    key_states = write(key_states, -1, k_nope)
    key_states = write(key_states, -1, k_rot)
    return key_states, value_states
