"""GLM-4.5 and 4.6: experts that a sigmoid and a correction choose, and one that every token goes through; the
first layers are dense, and half of each head is rotated (transformers 5.23, models/glm4_moe)."""

from __future__ import annotations

from functools import partial
from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.families import Family
from memplan.parts.config import COMMON, Config, either, full
from memplan.parts.context import Context, Leaves
from memplan.parts.experts import Weight, experts_forward, gate_forward, normalize_, one_by_one, top_k
from memplan.parts.layer import attention, gated_mlp, project_all_and_norm, residual
from memplan.parts.module import Modules, experts, head_norms, mlp, norms
from memplan.parts.module import attention as projections
from memplan.parts.rotary import rotate_part
from memplan.shadow import ops
from memplan.shadow.indexing import gather_last
from memplan.shadow.matmul import linear
from memplan.shadow.tensor import Tensor, bool_, empty, float32, state


def _experts(fields: Fields, layers: int) -> dict[str, Any]:
    count = fields.size(either(fields, "num_local_experts", "n_routed_experts"))
    groups, chosen = fields.size("n_group"), fields.size("topk_group")
    if count % groups or count // groups < 2:
        fields.fail(
            f"n_routed_experts is {count}, but each of {groups} groups (n_group) must have two or more"
        )
    if chosen > groups:
        fields.fail(f"topk_group is {chosen}, but there are {groups} groups (n_group)")
    dense, width = fields.size("first_k_dense_replace", least=0), fields.size("moe_intermediate_size")
    return {
        "num_experts": count if dense < layers else 0,
        "num_experts_per_tok": fields.size("num_experts_per_tok"),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width * fields.size("n_shared_experts"),
        "norm_topk_prob": fields.flag("norm_topk_prob"),
        "n_group": groups,
        "topk_group": chosen,
        "use_qk_norm": fields.flag("use_qk_norm"),
        "sparse_layers": tuple(layer >= dense for layer in range(layers)),
    }


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    made = projections(spec, output_bias=False)
    if spec.use_qk_norm:
        made |= head_norms(spec.head_dim, spec.head_dim)
    if not sparse:
        return {**made, **mlp(spec), **norms(spec)}
    stack = experts(spec)
    gate = stack.pop("mlp.gate")
    gate.buffers["e_score_correction_bias"] = (spec.num_experts,)
    shared = mlp(spec, "mlp.shared_experts", spec.shared_expert_intermediate_size)
    return {**made, **stack, "mlp.gate": gate, **shared, **norms(spec)}


def _route(
    correction: Tensor, weight: Weight, hidden_states: Tensor, spec: ModelSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """``Glm4MoeTopkRouter.forward``. N tokens, X experts in G groups."""
    experts, groups = spec.num_experts, spec.n_group
    batch, length, width = hidden_states.shape
    hidden_states = ops.view(hidden_states, (batch * length, width))
    router_logits_NX = linear(ops.to(hidden_states, float32), ops.to(weight(), float32))
    scores = ops.result_activation("sigmoid", router_logits_NX)
    scores_for_choice = ops.add(scores, correction)
    by_group = ops.view(scores_for_choice, (batch * length, groups, experts // groups))
    group_scores_NG = ops.view(ops.sum_last(top_k(by_group, 2)[0]), (batch * length, groups))
    del by_group
    _group_idx = top_k(group_scores_NG, spec.topk_group)[1]
    group_mask = empty(group_scores_NG.shape, float32, "zeros_like")  # and scattered into in place
    wide = ops.expand(
        ops.view(group_mask, (*group_mask.shape, 1)), (batch * length, groups, experts // groups)
    )
    score_mask = ops.reshape(wide, (batch * length, experts))
    del wide
    scores_for_choice = ops.masked_fill(scores_for_choice, _outside(score_mask))
    topk_indices = top_k(scores_for_choice, spec.num_experts_per_tok)[1]
    topk_weights = gather_last(scores, topk_indices)
    if spec.norm_topk_prob:
        denominator = ops.shift(ops.sum_last(topk_weights))
        topk_weights = normalize_(topk_weights, denominator)
    topk_weights = ops.scale(topk_weights)
    return router_logits_NX, topk_weights, topk_indices


def _outside(score_mask: Tensor) -> Tensor:
    """``~score_mask.bool()``."""
    chosen = empty(score_mask.shape, bool_, "_to_copy")
    return ops.pointwise("bitwise_not", chosen)


def _mlp(m: Leaves, hidden_states: Tensor, context: Context) -> Tensor:
    """``Glm4MoeMoE.forward``, or that of a dense layer."""
    spec = context.spec
    if "mlp.experts" not in m:
        return gated_mlp(m, hidden_states, spec)
    residuals, shape = hidden_states, hidden_states.shape
    gate = m["mlp.gate"]
    route = partial(_route, gate["e_score_correction_bias"])
    _, topk_weights, topk_indices = gate_forward(gate["weight"], hidden_states, spec, route)
    hidden_states = ops.view(hidden_states, (shape[0] * shape[1], shape[2]))
    hidden_states = experts_forward(m["mlp.experts"], hidden_states, topk_indices, topk_weights, spec)
    hidden_states = ops.view(hidden_states, shape)
    shared = gated_mlp(m, residuals, spec, "mlp.shared_experts")
    state.tape.module = "mlp"
    hidden_states = ops.add(hidden_states, shared)
    return hidden_states


def _layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    before = hidden
    hidden = m["input_layernorm"](hidden)
    hidden, _ = attention(m, hidden, context, project_all_and_norm, rotate_part)
    hidden = residual(before, hidden)
    before = hidden
    hidden = m["post_attention_layernorm"](hidden)
    hidden = _mlp(m, hidden, context)
    hidden = residual(before, hidden)
    return hidden


FAMILY = Family(
    config=Config(
        architecture="Glm4MoeForCausalLM",
        defaults={
            **COMMON,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "partial_rotary_factor": 0.5,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "use_qk_norm": False,
        },
        layers=full,
        experts=_experts,
        rotates_part=True,
    ),
    modules=_modules,
    layer=_layer,
    adapts_experts=True,
    several=False,
    liger=False,
    apart=one_by_one,
)
