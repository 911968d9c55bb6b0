"""What Qwen3.5's families have in common (transformers 5.23, models/qwen3_5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import LayerKind, ModelSpec
from memplan.errors import UnsupportedArchitecture, shown
from memplan.parts.config import COMMON, FULL, LINEAR, Layers
from memplan.parts.context import Context, Layer, Leaves
from memplan.parts.delta_rule import GatedNorm, delta_net
from memplan.parts.layer import cached, heads, residual
from memplan.parts.module import Modules, head_norms, linear, widths
from memplan.parts.norms import GemmaNorm, RMSNorm
from memplan.parts.rotary import rope, tables
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, state

DEFAULTS: Mapping[str, Any] = {
    **COMMON,
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "layer_types": None,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
NULLABLE = ("layer_types",)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_KINDS: Mapping[str, LayerKind] = {one: one for one in (FULL, LINEAR)}


def layers(fields: Fields, count: int) -> Layers:
    """Every fourth has full attention, unless the configuration says which."""
    listed = fields.strings("layer_types")
    if listed is None:
        interval = fields.size("full_attention_interval")
        return None, tuple(LINEAR if (layer + 1) % interval else FULL for layer in range(count))
    if len(listed) != count:
        fields.fail(f"layer_types has {len(listed)} entries, but num_hidden_layers is {count}")
    for kind in listed:
        if kind not in _KINDS:
            raise UnsupportedArchitecture(
                f"{shown(fields.name)} has layers of the type {shown(kind)}, but memplan predicts only "
                f"{FULL} and {LINEAR} of its family"
            )
    return None, tuple(_KINDS[kind] for kind in listed)


def linear_sizes(fields: Fields, count: int) -> dict[str, Any]:
    """What a spec says of linear attention."""
    return {
        "linear_key_heads": fields.size("linear_num_key_heads"),
        "linear_value_heads": fields.size("linear_num_value_heads"),
        "linear_key_dim": fields.size("linear_key_head_dim"),
        "linear_value_dim": fields.size("linear_value_head_dim"),
        "linear_conv_kernel": fields.size("linear_conv_kernel_dim"),
    }


def attention_modules(spec: ModelSpec) -> Modules:
    """Queries have a gate beside them."""
    hidden, bias = spec.hidden_size, spec.attention_bias
    query, key = widths(spec)
    return {
        "self_attn.q_proj": linear(hidden, 2 * query, bias),
        "self_attn.k_proj": linear(hidden, key, bias),
        "self_attn.v_proj": linear(hidden, key, bias),
        "self_attn.o_proj": linear(query, hidden, bias),
        **head_norms(spec.head_dim, spec.head_dim),
    }


def norm(name: str, weight: Tensor) -> RMSNorm:
    return (GatedNorm if name == "linear_attn.norm" else GemmaNorm)(name, weight)


def _rotate(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb``: of a part of each head."""
    cos, sin = tables(context)
    width = cos.shape[-1]
    q_rot, q_pass = ops.narrow_last(q, 0, width), ops.narrow_last(q, width, q.shape[-1])
    k_rot, k_pass = ops.narrow_last(k, 0, width), ops.narrow_last(k, width, k.shape[-1])
    q_embed = rope(q_rot, cos, sin)
    k_embed = rope(k_rot, cos, sin)
    q_embed = ops.cat_last(q_embed, q_pass)
    k_embed = ops.cat_last(k_embed, k_pass)
    return q_embed, k_embed


def gated_attention(m: Leaves, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    """``Qwen3_5Attention.forward``: the output is gated by what lies beside the queries."""
    spec = context.spec
    batch, length, _ = x.shape

    def split(y: Tensor) -> Tensor:
        return ops.view(y, (batch, length, y.shape[-1] // spec.head_dim, spec.head_dim))

    both = m["self_attn.q_proj"](x)
    both = ops.view(both, (batch, length, spec.num_attention_heads, 2 * spec.head_dim))
    q, gate = ops.chunk_last(both)
    del both
    state.tape.module = "self_attn"
    gate = ops.reshape(gate, (batch, length, spec.num_attention_heads * spec.head_dim))
    q = ops.transpose(m["self_attn.q_norm"](ops.view(q, q.shape)), 1, 2)
    k = ops.transpose(m["self_attn.k_norm"](split(m["self_attn.k_proj"](x))), 1, 2)
    v = heads(m["self_attn.v_proj"](x), spec.head_dim)
    state.tape.module = "self_attn"
    q, k = _rotate(q, k, context)
    k, v = cached(k, v, context)
    out, weights = context.attend(q, k, v, context)
    out = ops.reshape(out, (*out.shape[:2], out.shape[2] * out.shape[3]))
    out = ops.mul(out, ops.result_activation("sigmoid", gate))
    out = m["self_attn.o_proj"](out)
    return out, weights


def layer(mlp: Layer) -> Layer:
    """A layer with this MLP, or what it has in the place of one."""

    def run(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
        before = hidden
        hidden = m["input_layernorm"](hidden)
        if "linear_attn" in m:
            hidden = delta_net(m, hidden, context)
        else:
            hidden, _ = gated_attention(m, hidden, context)
        hidden = residual(before, hidden)
        before = hidden
        hidden = m["post_attention_layernorm"](hidden)
        hidden = mlp(m, hidden, context)
        hidden = residual(before, hidden)
        return hidden

    return run
