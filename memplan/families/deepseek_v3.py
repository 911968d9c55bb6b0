"""DeepSeek V3 and R1, and who took their shape (Kimi K2, Moonlight): latent attention, and experts that a
sigmoid and a correction choose (transformers 5.23, models/deepseek_v3)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.families import Family
from memplan.families._latent import DEFAULTS, layer, modules, read
from memplan.parts import deepseek_moe
from memplan.parts.config import COMMON, Config, full
from memplan.parts.experts import one_by_one


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    dense = fields.size("first_k_dense_replace", least=0)
    return read(fields, deepseek_moe.from_the(dense, layers))


FAMILY = Family(
    config=Config(
        architecture="DeepseekV3ForCausalLM",
        defaults={
            **COMMON,
            **DEFAULTS,
            "num_key_value_heads": 128,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": 2048,
            "num_experts_per_tok": 8,
            "n_routed_experts": 256,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
        },
        nullable=("q_lora_rank", "num_key_value_heads"),
        layers=full,
        experts=_more,
        head="qk_rope_head_dim",
    ),
    modules=modules,
    layer=layer,
    adapts_experts=True,
    several=False,
    liger=False,
    apart=one_by_one,
)
