"""Qwen3.5 and 3.6 with experts in every layer, one of which every token is sent to (transformers 5.23,
models/qwen3_5_moe)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.families import Family, _qwen3_5
from memplan.parts import delta_rule
from memplan.parts.config import Config, router_loss
from memplan.parts.context import Context, Leaves
from memplan.parts.experts import by_softmax, capture, experts_forward, gate_forward, one_by_one
from memplan.parts.layer import act
from memplan.parts.module import Modules, experts, linear, norms
from memplan.parts.rotary import of_three_grids
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, state


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    return {
        **_qwen3_5.linear_sizes(fields, layers),
        "num_experts": fields.size("num_experts"),
        "num_experts_per_tok": fields.size("num_experts_per_tok"),
        "moe_intermediate_size": fields.size("moe_intermediate_size"),
        "shared_expert_intermediate_size": fields.size("shared_expert_intermediate_size"),
        "norm_topk_prob": True,
        "router_aux_loss_coef": router_loss(fields),
        "sparse_layers": (True,) * layers,
    }


def _experts(spec: ModelSpec) -> Modules:
    hidden, width = spec.hidden_size, spec.shared_expert_intermediate_size
    return {
        **experts(spec),
        "mlp.shared_expert.gate_proj": linear(hidden, width),
        "mlp.shared_expert.up_proj": linear(hidden, width),
        "mlp.shared_expert.down_proj": linear(width, hidden),
        "mlp.shared_expert_gate": linear(hidden, 1),
    }


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    return {**_qwen3_5.attention_modules(spec), **_experts(spec), **norms(spec)}


def _linear_modules(spec: ModelSpec, sparse: bool) -> Modules:
    return {**delta_rule.modules(spec), **_experts(spec), **norms(spec)}


def _mlp(m: Leaves, hidden_states: Tensor, context: Context) -> Tensor:
    """``Qwen3_5MoeSparseMoeBlock.forward``."""
    shape, spec = hidden_states.shape, context.spec
    hidden_states = ops.view(hidden_states, (shape[0] * shape[1], shape[2]))
    shared = _shared_expert(m, hidden_states, spec)
    logits, weights, chosen = gate_forward(m["mlp.gate"]["weight"], hidden_states, spec, by_softmax)
    capture(logits, context.router_logits)
    expert_output = experts_forward(m["mlp.experts"], hidden_states, chosen, weights, spec)
    shared = ops.mul(_sigmoid(m["mlp.shared_expert_gate"](hidden_states)), shared)
    expert_output = ops.add(expert_output, shared)
    return ops.view(expert_output, shape)


def _sigmoid(x: Tensor) -> Tensor:
    state.tape.module = "mlp"
    return ops.result_activation("sigmoid", x)


def _shared_expert(m: Leaves, x: Tensor, spec: ModelSpec) -> Tensor:
    inner = ops.mul(act(spec, m["mlp.shared_expert.gate_proj"](x)), m["mlp.shared_expert.up_proj"](x))
    out: Tensor = m["mlp.shared_expert.down_proj"](inner)
    return out


FAMILY = Family(
    config=Config(
        architecture="Qwen3_5MoeForCausalLM",
        defaults={
            **_qwen3_5.DEFAULTS,
            "num_key_value_heads": 2,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "router_aux_loss_coef": 0.001,
        },
        layers=_qwen3_5.layers,
        nullable=_qwen3_5.NULLABLE,
        inner="moe_intermediate_size",
        experts=_more,
        images=("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"),
        rope_types=_qwen3_5.ROPE_TYPES,
        rotates_part=True,
    ),
    modules=_modules,
    linear_modules=_linear_modules,
    layer=_qwen3_5.layer(_mlp),
    norm=_qwen3_5.norm,
    cos_sin=of_three_grids,
    several=False,
    liger=False,  # it imports Qwen3_5MoeCausalLMOutputWithPast
    apart=one_by_one,
)
