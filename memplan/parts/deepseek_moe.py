"""Experts as DeepSeek's: routed ones, which are chosen within some groups of them, and one that every token
goes through; the first layers may be dense (transformers 5.23, models/deepseek_v3, glm4_moe and
glm4_moe_lite, and as far as deepseek_v2 has it)."""

from __future__ import annotations

from functools import partial
from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.parts.config import either
from memplan.parts.context import Leaves
from memplan.parts.experts import Route, Weight, experts_forward, gate_forward, normalize_, top_k
from memplan.parts.layer import gated_mlp
from memplan.parts.module import Modules, experts, mlp
from memplan.shadow import ops
from memplan.shadow.indexing import gather_last
from memplan.shadow.matmul import linear
from memplan.shadow.tensor import Tensor, bool_, empty, float32, state


def numbers(fields: Fields, sparse: tuple[bool, ...], other: str = "num_local_experts") -> dict[str, Any]:
    """What a specification says of experts in ``sparse`` layers; ``other``: the second name of their number
    (``attribute_map``)."""
    width = fields.size("moe_intermediate_size")
    return {
        "num_experts": fields.size(either(fields, other, "n_routed_experts")) if any(sparse) else 0,
        "num_experts_per_tok": fields.size("num_experts_per_tok"),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width * fields.size("n_shared_experts"),
        "sparse_layers": sparse,
    }


def groups(fields: Fields, count: int, least: int) -> dict[str, Any]:
    """How ``count`` experts are grouped, ``least`` of them or more in each."""
    number, chosen = fields.size("n_group"), fields.size("topk_group")
    if count % number or (count and count // number < least):
        few = {1: "as many", 2: "two or more"}[least]
        fields.fail(f"n_routed_experts is {count}, but each of {number} groups (n_group) must have {few}")
    if chosen > number:
        fields.fail(f"topk_group is {chosen}, but there are {number} groups (n_group)")
    return {"n_group": number, "topk_group": chosen}


def from_the(dense: int, layers: int) -> tuple[bool, ...]:
    """Which layers have experts, after so many ``dense`` ones."""
    return tuple(layer >= dense for layer in range(layers))


def modules(spec: ModelSpec, *, corrected: bool = True) -> Modules:
    """A router (``corrected``: with a correction of its choice), its experts, and the one for every token."""
    stack = experts(spec)
    gate = stack.pop("mlp.gate")
    if corrected:
        gate.buffers["e_score_correction_bias"] = (spec.num_experts,)
    shared = mlp(spec, "mlp.shared_experts", spec.shared_expert_intermediate_size)
    return {**stack, "mlp.gate": gate, **shared}


def forward(m: Leaves, hidden_states: Tensor, spec: ModelSpec, route: Route | None = None) -> Tensor:
    """``DeepseekV3MoE.forward``, or that of a dense layer. ``route``: unless by a sigmoid."""
    if "mlp.experts" not in m:
        return gated_mlp(m, hidden_states, spec)
    residuals, shape = hidden_states, hidden_states.shape
    gate = m["mlp.gate"]
    if route is None:
        route = partial(_by_sigmoid, gate["e_score_correction_bias"])
    _, topk_weights, topk_indices = gate_forward(gate["weight"], hidden_states, spec, route)
    hidden_states = ops.view(hidden_states, (shape[0] * shape[1], shape[2]))
    hidden_states = experts_forward(m["mlp.experts"], hidden_states, topk_indices, topk_weights, spec)
    hidden_states = ops.view(hidden_states, shape)
    shared = gated_mlp(m, residuals, spec, "mlp.shared_experts")
    state.tape.module = "mlp"
    hidden_states = ops.add(hidden_states, shared)
    return hidden_states


def router_logits(weight: Weight, hidden_states: Tensor) -> Tensor:
    """In fp32, of all tokens."""
    batch, length, width = hidden_states.shape
    hidden_states = ops.view(hidden_states, (batch * length, width))
    return linear(ops.to(hidden_states, float32), ops.to(weight(), float32))


def _by_sigmoid(
    correction: Tensor, weight: Weight, hidden_states: Tensor, spec: ModelSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """``DeepseekV3TopkRouter.forward``. N tokens, X experts in G groups."""
    router_logits_NX = router_logits(weight, hidden_states)
    tokens, groups = router_logits_NX.shape[0], spec.n_group
    scores = ops.result_activation("sigmoid", router_logits_NX)
    scores_for_choice = ops.add(scores, correction)
    by_group = ops.view(scores_for_choice, (tokens, groups, spec.num_experts // groups))
    group_scores_NG = ops.view(ops.sum_last(top_k(by_group, 2)[0]), (tokens, groups))
    del by_group
    _group_idx = top_k(group_scores_NG, spec.topk_group)[1]
    _group_mask, score_mask = masks(group_scores_NG, spec)
    scores_for_choice = ops.masked_fill(scores_for_choice, outside(score_mask))
    topk_indices = top_k(scores_for_choice, spec.num_experts_per_tok)[1]
    topk_weights = gather_last(scores, topk_indices)
    if spec.norm_topk_prob:
        denominator = ops.shift(ops.sum_last(topk_weights))
        topk_weights = normalize_(topk_weights, denominator)
    topk_weights = ops.scale(topk_weights)
    return router_logits_NX, topk_weights, topk_indices


def masks(group_scores_NG: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Which groups are chosen, and which experts with them."""
    tokens, groups = group_scores_NG.shape
    group_mask = empty(group_scores_NG.shape, float32, "zeros_like")  # and scattered into in place
    wide = ops.expand(ops.view(group_mask, (tokens, groups, 1)), (tokens, groups, spec.num_experts // groups))
    return group_mask, ops.reshape(wide, (tokens, spec.num_experts))


def outside(score_mask: Tensor) -> Tensor:
    """``~score_mask.bool()``."""
    chosen = empty(score_mask.shape, bool_, "_to_copy")
    return ops.pointwise("bitwise_not", chosen)
