"""Gemma 4, of a checkpoint with images its language model: five layers slide, the sixth does not and has
wider heads, whose keys may be its values; norms over queries, keys and values; each layer's output is
multiplied by a number that is loaded (transformers 5.23, models/gemma4)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.errors import UnsupportedArchitecture, shown
from memplan.families import Family, _gemma, _rope_by_kind
from memplan.parts.config import FULL, ROPE_TYPES, Config, Layers, as_listed, window
from memplan.parts.context import Context, Leaves
from memplan.parts.layer import cached, mlp, residual
from memplan.parts.module import Modules, attention, buffer, head_norms
from memplan.parts.module import mlp as mlp_modules
from memplan.parts.norms import RMSNorm
from memplan.parts.rotary import rope
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, float32, state


def _layers(fields: Fields, layers: int) -> Layers:
    """Whatever is listed, the last does not slide."""
    size, kinds = as_listed(fields, layers, window(fields), lambda layer: (layer + 1) % 6 > 0)
    return size, (*kinds[:-1], FULL)


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    """What its layers with full attention have. Raises UnsupportedArchitecture for what is not played."""
    for key, what in (
        ("hidden_size_per_layer_input", "embeddings for each layer"),
        ("num_kv_shared_layers", "layers that share keys and values"),
        ("enable_moe_block", "experts beside its MLPs"),
    ):
        if fields.get(key):
            raise UnsupportedArchitecture(
                f"{shown(fields.name)} is a Gemma 4 with {what} ({key} is {shown(fields.get(key))}), which "
                "memplan doesn't predict; add --trace to have its own code traced"
            )
    shared = fields.flag("attention_k_eq_v")
    return {
        "global_head_dim": fields.size("global_head_dim"),
        "num_global_key_value_heads": fields.size_or_none("num_global_key_value_heads") if shared else None,
        "attention_k_eq_v": shared,
    }


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    made = attention(spec)
    if spec.attention_k_eq_v:
        del made["self_attn.v_proj"]
    norms = head_norms(spec.head_dim, spec.head_dim)
    scalar = {"layer_scalar": buffer(1)}
    return {**made, **norms, **mlp_modules(spec), **_gemma.four_norms(spec), **scalar}


class _Norm(RMSNorm):
    """``Gemma4RMSNorm``: a power instead of a root, in fp32 with the weight, if it has one."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        normed_output = self._normalize(ops.to(x, float32))
        normed_output = ops.mul(normed_output, ops.to(self.weight, float32))
        return ops.to(normed_output, x.dtype)

    def _normalize(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        mean_squared = ops.shift(ops.mean_last(ops.square(x)))
        return ops.mul(x, ops.power(mean_squared))

    @classmethod
    def bare(cls, name: str, x: Tensor) -> Tensor:
        """Without a weight."""
        norm = cls(name, x)
        return ops.to(norm._normalize(ops.to(x, float32)), x.dtype)


def _heads(x: Tensor, spec: ModelSpec) -> Tensor:
    """[B, S, H·D] to [B, S, H, D]."""
    return ops.view(x, (*x.shape[:-1], x.shape[-1] // spec.head_dim, spec.head_dim))


def _turned(x: Tensor, context: Context) -> Tensor:
    """``apply_rotary_pos_emb`` of heads that are not transposed yet, and that."""
    batch, length, width = context.cos_BSD.shape
    cos = ops.view(context.cos_BSD, (batch, length, 1, width))
    sin = ops.view(context.sin_BSD, (batch, length, 1, width))
    state.tape.module = "self_attn"
    return rope(x, cos, sin)


def _attention(m: Leaves, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    spec = context.spec
    q = _heads(m["self_attn.q_proj"](x), spec)
    q = m["self_attn.q_norm"](q)
    q = _turned(q, context)
    q = ops.transpose(q, 1, 2)
    k = _heads(m["self_attn.k_proj"](x), spec)
    v = k if spec.attention_k_eq_v else _heads(m["self_attn.v_proj"](x), spec)
    k = m["self_attn.k_norm"](k)
    k = _turned(k, context)
    k = ops.transpose(k, 1, 2)
    v = _Norm.bare("self_attn.v_norm", v)
    v = ops.transpose(v, 1, 2)
    state.tape.module = "self_attn"
    k, v = cached(k, v, context)
    out, weights = context.attend(q, k, v, context)
    out = ops.view(out, (*out.shape[:2], out.shape[2] * out.shape[3]))
    out = m["self_attn.o_proj"](out)
    return out, weights


def _layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    before = hidden
    hidden = m["input_layernorm"](hidden)
    hidden, _ = _attention(m, hidden, context)
    hidden = m["post_attention_layernorm"](hidden)
    hidden = residual(before, hidden)
    before = hidden
    hidden = m["pre_feedforward_layernorm"](hidden)
    hidden = mlp(m, hidden, context)
    hidden = m["post_feedforward_layernorm"](hidden)
    hidden = residual(before, hidden)
    hidden = ops.mul_(hidden, m["layer_scalar"])
    return hidden


FAMILY = Family(
    config=Config(
        architecture="Gemma4ForCausalLM",
        defaults={
            **_gemma.DEFAULTS,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 512,
            "vocab_size": 262_144,
            "final_logit_softcapping": None,
            "global_head_dim": 512,
            "num_global_key_value_heads": None,
            "attention_k_eq_v": False,
            "hidden_size_per_layer_input": 256,
            "num_kv_shared_layers": 0,
            "enable_moe_block": False,
        },
        layers=_layers,
        nullable=("layer_types", "final_logit_softcapping", "num_global_key_value_heads"),
        activation="hidden_activation",
        experts=_more,
        images=("Gemma4ForConditionalGeneration", "gemma4"),
        rope=_rope_by_kind.entries,
        rope_types=(*ROPE_TYPES, "proportional"),
    ),
    modules=_modules,
    layer=_layer,
    norm=_Norm,
    scaled_embedding=True,
    rotates_by_layer=True,
    makes_both_masks=True,
    several=False,
    liger=False,
)
