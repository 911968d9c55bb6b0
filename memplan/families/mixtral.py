"""Mixtral: Mistral with experts in every layer (transformers 5.23, models/mixtral)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.families import Family
from memplan.parts.config import COMMON, Config, all_or_none, either, router_loss
from memplan.parts.experts import Weight, chosen, router_logits
from memplan.parts.layer import llama_like
from memplan.parts.module import plain
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, float32


def _experts(fields: Fields, layers: int) -> dict[str, Any]:
    """They are as wide as an MLP, and the router always normalises the top k."""
    return {
        "num_experts": fields.size(either(fields, "num_experts", "num_local_experts")),
        "num_experts_per_tok": fields.size("num_experts_per_tok"),
        "moe_intermediate_size": fields.size("intermediate_size"),
        "norm_topk_prob": True,
        "router_aux_loss_coef": router_loss(fields),
        "sparse_layers": (True,) * layers,
    }


def _route(weight: Weight, hidden_states: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """``MixtralTopKRouter.forward``."""
    logits = router_logits(weight, hidden_states)
    router_probs = ops.softmax(ops.to(logits, float32), float32)
    values, indices = chosen(router_probs, spec)
    return logits, values, indices


def _one_by_one(name: str) -> str:
    name = name.replace(".mlp.", ".block_sparse_moe.")
    name = name.replace(".experts.gate_up_proj", ".experts.0.w1.weight")
    return name.replace(".experts.down_proj", ".experts.0.w2.weight")


FAMILY = Family(
    config=Config(
        architecture="MixtralForCausalLM",
        defaults={
            **COMMON,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096 * 32,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        layers=all_or_none,
        nullable=("head_dim", "sliding_window"),
        attention_bias=False,
        experts=_experts,
    ),
    modules=plain,
    layer=llama_like(route=_route),
    adapts_experts=True,
    apart=_one_by_one,
)
