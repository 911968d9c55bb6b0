"""Qwen 1.5 and 2 with experts: one that every token goes through has a gate of its own (transformers 5.23,
models/qwen2_moe). PEFT, which adapts the experts of those that were made after it, knows linear layers only
(peft/utils/transformers_weight_conversion.py, 0.21)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.families import Family
from memplan.families.qwen3_moe import sparse
from memplan.parts.config import COMMON, Config, Layers, as_listed, window
from memplan.parts.context import Context, Leaves
from memplan.parts.experts import by_softmax, capture, experts_forward, gate_forward, one_by_one
from memplan.parts.layer import attention, gated_mlp, residual
from memplan.parts.module import Modules, experts, linear, mlp, norms
from memplan.parts.module import attention as projections
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, state


def _layers(fields: Fields, layers: int) -> Layers:
    """Without windows their size is 0, and a mask for them is made even so."""
    switched = fields.flag("use_sliding_window")
    size = window(fields) if switched else 0
    first = fields.size("max_window_layers", least=0)
    return as_listed(fields, layers, size, lambda layer: switched and layer % 2 == 0 and layer < first)


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    width = fields.size("shared_expert_intermediate_size")
    return {**sparse(fields, layers), "shared_expert_intermediate_size": width}


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    made = projections(spec, output_bias=False)
    if not sparse:
        return {**made, **mlp(spec), **norms(spec)}
    shared = mlp(spec, "mlp.shared_expert", spec.shared_expert_intermediate_size)
    gate = {"mlp.shared_expert_gate": linear(spec.hidden_size, 1)}
    return {**made, **experts(spec), **shared, **gate, **norms(spec)}


def _mlp(m: Leaves, hidden_states: Tensor, context: Context) -> Tensor:
    """``Qwen2MoeSparseMoeBlock.forward``, or that of a dense layer."""
    spec, shape = context.spec, hidden_states.shape
    if "mlp.experts" not in m:
        return gated_mlp(m, hidden_states, spec)
    flat = ops.view(hidden_states, (shape[0] * shape[1], shape[2]))
    shared = gated_mlp(m, flat, spec, "mlp.shared_expert")
    logits, weights, chosen = gate_forward(m["mlp.gate"]["weight"], flat, spec, by_softmax)
    capture(logits, context.router_logits)
    out = experts_forward(m["mlp.experts"], flat, chosen, weights, spec)
    gate = m["mlp.shared_expert_gate"](flat)
    state.tape.module = "mlp"
    gate = ops.result_activation("sigmoid", gate)
    shared = ops.mul(gate, shared)
    del gate
    out = ops.add(out, shared)
    return ops.view(out, shape)


def _layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    before = hidden
    hidden = m["input_layernorm"](hidden)
    hidden, _ = attention(m, hidden, context)
    hidden = residual(before, hidden)
    before = hidden
    hidden = m["post_attention_layernorm"](hidden)
    hidden = _mlp(m, hidden, context)
    hidden = residual(before, hidden)
    return hidden


FAMILY = Family(
    config=Config(
        architecture="Qwen2MoeForCausalLM",
        defaults={
            **COMMON,
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "qkv_bias": True,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "layer_types": None,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        layers=_layers,
        nullable=("sliding_window", "mlp_only_layers", "layer_types"),
        bias="qkv_bias",
        experts=_more,
    ),
    modules=_modules,
    layer=_layer,
    makes_both_masks=True,
    several=False,
    liger=False,
    apart=one_by_one,
)
