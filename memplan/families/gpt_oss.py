"""gpt-oss: experts in every layer, with biases and a gate of their own; attention has a sink for each head,
which no fused kernel of PyTorch's knows; every second layer slides (transformers 5.23, models/gpt_oss)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.errors import RecipeError
from memplan.families import Family
from memplan.parts.config import COMMON, Config, either, every_second, router_loss
from memplan.parts.context import Context, Leaves
from memplan.parts.experts import capture, grouped, top_k
from memplan.parts.groups import repeat_kv
from memplan.parts.layer import cached, project, residual
from memplan.parts.module import Module, Modules, attention, norms
from memplan.parts.norms import LateCastNorm
from memplan.parts.rotary import tables
from memplan.shadow import ops
from memplan.shadow.matmul import linear, matmul
from memplan.shadow.tensor import Tensor, empty, float32, state


def _experts(fields: Fields, layers: int) -> dict[str, Any]:
    """They are as wide as an MLP would be, and only the chosen ones' scores are normalised."""
    return {
        "num_experts": fields.size(either(fields, "num_experts", "num_local_experts")),
        "num_experts_per_tok": fields.size("num_experts_per_tok"),
        "moe_intermediate_size": fields.size("intermediate_size"),
        "norm_topk_prob": True,
        "router_aux_loss_coef": router_loss(fields),
        "sparse_layers": (True,) * layers,
    }


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    """Weights of experts lie as [experts, in, out]."""
    hidden, count, width = spec.hidden_size, spec.num_experts, spec.moe_intermediate_size
    return {
        "self_attn": Module("raw", {"sinks": (spec.num_attention_heads,)}),
        **attention(spec),
        "mlp.router": Module("raw", {"weight": (count, hidden), "bias": (count,)}),
        "mlp.experts": Module(
            "raw",
            {
                "gate_up_proj": (count, hidden, 2 * width),
                "gate_up_proj_bias": (count, 2 * width),
                "down_proj": (count, width, hidden),
                "down_proj_bias": (count, hidden),
            },
        ),
        **norms(spec),
    }


def _attention_of(asked: str | None) -> str:
    """transformers refuses SDPA for it, and FlashAttention 2: neither knows sinks."""
    if asked not in (None, "eager"):
        raise RecipeError(
            f"gpt-oss has no {asked} attention in transformers, for its attention has sinks: use --attn eager"
        )
    return "eager"


def _cos_sin(spec: ModelSpec, length: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of half a head, which both halves are turned by."""
    half = spec.head_dim // 2
    position = empty((1, length, 1), float32, "_to_copy")
    freqs = empty((1, length, half), float32, "mul")
    del position
    cos = ops.scale(ops.pointwise("cos", freqs))
    sin = ops.scale(ops.pointwise("sin", freqs))
    return ops.to(cos, hidden.dtype), ops.to(sin, hidden.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first_half, second_half = ops.chunk_last(x)
    first = ops.sub(ops.mul(first_half, cos), ops.mul(second_half, sin))
    second = ops.add(ops.mul(second_half, cos), ops.mul(first_half, sin))
    return ops.cat_last(first, second)


def _rotate(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    cos, sin = tables(context)
    q_embed = _turned(q, cos, sin)
    k_embed = _turned(k, cos, sin)
    return q_embed, k_embed


def _attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """``eager_attention_forward``: the sinks are one more column of the scores, and dropped afterwards."""
    groups = q.shape[1] // k.shape[1]
    key_states = repeat_kv(k, groups)
    value_states = repeat_kv(v, groups)
    attn_weights = ops.scale(matmul(q, ops.transpose(key_states, 2, 3)))
    if context.mask is not None:
        attn_weights = ops.add(attn_weights, context.mask)
    batch, heads, length, keys = attn_weights.shape
    sinks = ops.expand(ops.view(sinks, (1, heads, 1, 1)), (batch, heads, length, 1))
    combined_logits = ops.cat_last(attn_weights, sinks)
    combined_logits = ops.sub(combined_logits, ops.max_last(combined_logits))
    probs = ops.softmax(combined_logits, combined_logits.dtype)
    scores = ops.narrow_last(probs, 0, keys)
    attn_weights = ops.to(ops.dropout(scores, context.spec.attention_dropout), value_states.dtype)
    attn_output = matmul(attn_weights, value_states)
    attn_output = ops.contiguous(ops.transpose(attn_output, 1, 2))
    return attn_output, attn_weights


def _attention(m: Leaves, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    q, k, v = project(m, x, context.spec)
    state.tape.module = "self_attn"
    q, k = _rotate(q, k, context)
    k, v = cached(k, v, context)
    out, weights = _attend(q, k, v, m["self_attn"]["sinks"], context)
    out = ops.view(out, (*out.shape[:2], out.shape[2] * out.shape[3]))
    out = m["self_attn.o_proj"](out)
    return out, weights


def _route(
    router: dict[str, Tensor], hidden_states: Tensor, context: Context
) -> tuple[Tensor, Tensor, Tensor]:
    """``GptOssTopKRouter.forward``: the softmax is of the chosen ones alone."""
    state.tape.module = "mlp.router"
    router_logits = linear(hidden_states, router["weight"], router["bias"])
    capture(router_logits, context.router_logits)
    router_top_value, router_indices = top_k(router_logits, context.spec.num_experts_per_tok)
    router_scores = ops.softmax(router_top_value, router_top_value.dtype)
    return router_logits, router_scores, router_indices


def _apply_gate(gate_up: Tensor) -> Tensor:
    gate, up = ops.every_second(gate_up, 0), ops.every_second(gate_up, 1)
    gate = ops.clamp(gate, both=False)
    up = ops.clamp(up, both=True)
    glu = ops.mul(gate, ops.result_activation("sigmoid", ops.scale(gate)))
    return ops.mul(ops.shift(up), glu)


def _mlp(m: Leaves, hidden_states: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    spec, shape = context.spec, hidden_states.shape
    hidden_states = ops.view(hidden_states, (shape[0] * shape[1], shape[2]))
    _, router_scores, router_indices = _route(m["mlp.router"], hidden_states, context)
    state.tape.module = "mlp.experts"
    experts = m["mlp.experts"]
    hidden_states = grouped(
        lambda: experts["gate_up_proj"],
        lambda: experts["down_proj"],
        hidden_states,
        router_indices,
        router_scores,
        spec,
        gate=_apply_gate,
        biases=(experts["gate_up_proj_bias"], experts["down_proj_bias"]),
        transposed=True,
    )
    return ops.view(hidden_states, shape), router_scores


def _layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    before = hidden
    hidden = m["input_layernorm"](hidden)
    hidden, _ = _attention(m, hidden, context)
    hidden = residual(before, hidden)
    before = hidden
    hidden = m["post_attention_layernorm"](hidden)
    hidden, _ = _mlp(m, hidden, context)
    hidden = residual(before, hidden)
    return hidden


FAMILY = Family(
    config=Config(
        architecture="GptOssForCausalLM",
        defaults={
            **COMMON,
            "attention_bias": True,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "sliding_window": 128,
            "layer_types": None,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "router_aux_loss_coef": 0.001,
        },
        layers=every_second,
        nullable=("num_key_value_heads", "head_dim", "sliding_window", "layer_types"),
        experts=_experts,
        mxfp4=True,
    ),
    modules=_modules,
    layer=_layer,
    norm=LateCastNorm,
    cos_sin=_cos_sin,
    attention=_attention_of,
    makes_both_masks=True,
    masks_of_positions=False,
    several=False,
    float16=False,
)
