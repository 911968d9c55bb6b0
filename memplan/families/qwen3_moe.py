"""Qwen3 with experts in some or all layers (transformers 5.23, models/qwen3_moe)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.errors import shown
from memplan.families import Family
from memplan.parts.config import COMMON, Config, all_if_switched_on, either, router_loss
from memplan.parts.experts import by_softmax, one_by_one
from memplan.parts.layer import llama_like, project_and_norm_heads
from memplan.parts.module import Modules, attention, experts, head_norms, mlp, norms


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    """Experts are made before their router."""
    inner = dict(reversed(experts(spec).items())) if sparse else mlp(spec)
    return {**attention(spec), **head_norms(spec.head_dim, spec.head_dim), **inner, **norms(spec)}


def sparse(fields: Fields, layers: int) -> dict[str, Any]:
    count = fields.size(either(fields, "num_local_experts", "num_experts"), least=0)
    step, listed = fields.size("decoder_sparse_step"), fields.get("mlp_only_layers")
    if listed is not None and not (isinstance(listed, list) and all(type(n) is int for n in listed)):
        fields.fail(f"mlp_only_layers is {shown(listed)}, but it must be a list of layer numbers")
    dense = set(listed or ())
    sparse = tuple(count > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    return {
        "num_experts": count if any(sparse) else 0,
        "num_experts_per_tok": fields.size("num_experts_per_tok"),
        "moe_intermediate_size": fields.size("moe_intermediate_size"),
        "norm_topk_prob": fields.flag("norm_topk_prob"),
        "router_aux_loss_coef": router_loss(fields),
        "sparse_layers": sparse,
    }


FAMILY = Family(
    config=Config(
        architecture="Qwen3MoeForCausalLM",
        defaults={
            **COMMON,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        layers=all_if_switched_on,
        nullable=("sliding_window", "mlp_only_layers"),
        experts=sparse,
    ),
    modules=_modules,
    layer=llama_like(project_and_norm_heads, by_softmax),
    adapts_experts=True,
    apart=one_by_one,
)
