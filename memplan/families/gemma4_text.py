"""Gemma 4, of a checkpoint with images its language model: five layers slide, the sixth does not and has
wider heads, whose keys may be its values; norms over queries, keys and values; each layer's output is
multiplied by a number that is loaded; experts may stand beside MLPs (transformers 5.23, models/gemma4)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.errors import UnsupportedArchitecture, shown
from memplan.families import Family, _gemma, _rope_by_kind
from memplan.parts.config import FULL, ROPE_TYPES, Config, Layers, as_listed, window
from memplan.parts.context import Context, Leaves
from memplan.parts.experts import grouped, normalize_, top_k
from memplan.parts.layer import cached, mlp, residual
from memplan.parts.module import Module, Modules, attention, buffer, experts, head_norms, linear, norms
from memplan.parts.module import mlp as mlp_modules
from memplan.parts.norms import RMSNorm
from memplan.parts.rotary import rope
from memplan.shadow import ops
from memplan.shadow.indexing import by_rows
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
    ):
        if fields.get(key):
            raise UnsupportedArchitecture(
                f"{shown(fields.name)} is a Gemma 4 with {what} ({key} is {shown(fields.get(key))}), which "
                "memplan doesn't predict; add --trace to have its own code traced"
            )
    return {
        **_wide(fields, layers),
        "attention_k_eq_v": fields.flag("attention_k_eq_v"),
        **(_experts(fields, layers) if fields.flag("enable_moe_block") else {}),
    }


def _wide(fields: Fields, layers: int) -> dict[str, Any]:
    """Heads of layers with full attention. ``per_layer_config`` has them by layer in a file that transformers
    5.23 wrote, and counts alone where it is there (``Gemma4TextConfig.__post_init__``)."""
    if "per_layer_config" not in fields.config:
        heads = fields.size_or_none("num_global_key_value_heads")
        return {
            "global_head_dim": fields.size("global_head_dim"),
            "num_global_key_value_heads": heads if fields.flag("attention_k_eq_v") else None,
        }
    digits = len(str(layers - 1))
    listed = {key.zfill(digits): entry for key, entry in fields.nested("per_layer_config").items()}
    _, kinds = _layers(fields, layers)
    full = [str(layer).zfill(digits) for layer, kind in enumerate(kinds) if kind == FULL]
    entries = [listed.get(layer, {}) for layer in full]
    first = entries[0]
    if (
        not listed.keys() <= set(full)
        or any(entry != first for entry in entries)
        or not isinstance(first, dict)
        or not first.keys() <= {"head_dim", "num_key_value_heads"}
    ):
        raise UnsupportedArchitecture(
            f"{shown(fields.name)} is a Gemma 4 whose per_layer_config says more than that layers with full "
            "attention have heads of their own, which memplan doesn't predict; add --trace to have its own "
            "code traced"
        )
    wide = fields.inside(first, {"head_dim": fields.get("head_dim"), "num_key_value_heads": None})
    return {
        "global_head_dim": wide.size("head_dim"),
        "num_global_key_value_heads": wide.size_or_none("num_key_value_heads"),
    }


def _experts(fields: Fields, layers: int) -> dict[str, Any]:
    return {
        "num_experts": fields.size("num_experts"),
        "num_experts_per_tok": fields.size("top_k_experts"),
        "moe_intermediate_size": fields.size("moe_intermediate_size"),
        "norm_topk_prob": True,
        "sparse_layers": (True,) * layers,
    }


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    made = attention(spec)
    if spec.attention_k_eq_v:
        del made["self_attn.v_proj"]
    over_heads = head_norms(spec.head_dim, spec.head_dim)
    scalar = {"layer_scalar": buffer(1)}
    beside = _expert_modules(spec) if sparse else {}
    return {**made, **over_heads, **mlp_modules(spec), **_gemma.four_norms(spec), **scalar, **beside}


def _expert_modules(spec: ModelSpec) -> Modules:
    hidden, count = spec.hidden_size, spec.num_experts
    names = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")
    return {
        "router": Module("raw", {"scale": (hidden,), "per_expert_scale": (count,)}),
        "router.proj": linear(hidden, count),
        "experts": experts(spec)["mlp.experts"],
        **norms(spec, *names),
    }


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


def _router(m: Leaves, hidden_states: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """``Gemma4TextRouter.forward``."""
    hidden_states = _Norm.bare("router.norm", hidden_states)
    own = m["router"]
    state.tape.module = "router"
    hidden_states = ops.scale(ops.mul(hidden_states, own["scale"]))
    expert_scores = m["router.proj"](hidden_states)
    state.tape.module = "router"
    router_probabilities = ops.softmax(expert_scores, float32)
    top_k_weights, top_k_index = top_k(router_probabilities, context.spec.num_experts_per_tok)
    top_k_weights = normalize_(top_k_weights, ops.sum_last(top_k_weights))
    top_k_weights = ops.mul(top_k_weights, by_rows(own["per_expert_scale"], top_k_index))
    return router_probabilities, top_k_weights, top_k_index


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = ops.chunk_last(gate_up)
    return ops.mul(ops.activation("gelu", gate), up)


def _experts_forward(
    weights: dict[str, Tensor], x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, spec: ModelSpec
) -> Tensor:
    state.tape.module = "experts"
    up, down = weights["gate_up_proj"], weights["down_proj"]
    return grouped(lambda: up, lambda: down, x, top_k_index, top_k_weights, spec, gate=_gate)


def _layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    before = hidden
    hidden = m["input_layernorm"](hidden)
    hidden, _ = _attention(m, hidden, context)
    hidden = m["post_attention_layernorm"](hidden)
    hidden = residual(before, hidden)
    before = hidden
    hidden = m["pre_feedforward_layernorm"](hidden)
    hidden = mlp(m, hidden, context)
    if "experts" in m:  # names that stand until the layer's end
        hidden_1 = m["post_feedforward_layernorm_1"](hidden)
        flat = ops.view(before, (before.shape[0] * before.shape[1], before.shape[2]))
        _, top_k_weights, top_k_index = _router(m, flat, context)
        hidden_2 = m["pre_feedforward_layernorm_2"](flat)
        hidden_2 = _experts_forward(m["experts"], hidden_2, top_k_index, top_k_weights, context.spec)
        hidden_2 = ops.view(hidden_2, before.shape)
        hidden_2 = m["post_feedforward_layernorm_2"](hidden_2)
        hidden = residual(hidden_1, hidden_2)
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
            "per_layer_config": None,
            "hidden_size_per_layer_input": 256,
            "num_kv_shared_layers": 0,
            "enable_moe_block": False,
            "num_experts": None,
            "top_k_experts": None,
            "moe_intermediate_size": None,
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
