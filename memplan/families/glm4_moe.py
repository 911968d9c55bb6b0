"""GLM-4.5 and 4.6: experts that a sigmoid and a correction choose, and one that every token goes through; the
first layers are dense, and half of each head is rotated (transformers 5.23, models/glm4_moe)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.families import Family
from memplan.parts import deepseek_moe
from memplan.parts.config import COMMON, Config, full
from memplan.parts.context import Context, Leaves
from memplan.parts.experts import one_by_one
from memplan.parts.layer import attention, project_all_and_norm, residual
from memplan.parts.module import Modules, head_norms, mlp, norms
from memplan.parts.module import attention as projections
from memplan.parts.rotary import rotate_part
from memplan.shadow.tensor import Tensor


def _experts(fields: Fields, layers: int) -> dict[str, Any]:
    dense = fields.size("first_k_dense_replace", least=0)
    found = deepseek_moe.numbers(fields, deepseek_moe.from_the(dense, layers))
    return {
        **found,
        **deepseek_moe.groups(fields, found["num_experts"], 2),
        "norm_topk_prob": fields.flag("norm_topk_prob"),
        "use_qk_norm": fields.flag("use_qk_norm"),
    }


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    made = projections(spec, output_bias=False)
    if spec.use_qk_norm:
        made |= head_norms(spec.head_dim, spec.head_dim)
    return {**made, **(deepseek_moe.modules(spec) if sparse else mlp(spec)), **norms(spec)}


def _layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    before = hidden
    hidden = m["input_layernorm"](hidden)
    hidden, _ = attention(m, hidden, context, project_all_and_norm, rotate_part)
    hidden = residual(before, hidden)
    before = hidden
    hidden = m["post_attention_layernorm"](hidden)
    hidden = deepseek_moe.forward(m, hidden, context.spec)
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
