"""GLM-4.7-Flash: GLM-4.5's experts behind latent attention; the first layer is dense unless the configuration
lists others (transformers 5.23, models/glm4_moe_lite)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.errors import shown
from memplan.families import Family
from memplan.families._latent import DEFAULTS, layer, modules, read
from memplan.parts import deepseek_moe
from memplan.parts.config import COMMON, Config, full
from memplan.parts.experts import one_by_one


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    found = read(fields, _sparse(fields, layers))
    for key, right in (("head_dim", fields.size("qk_rope_head_dim")), ("partial_rotary_factor", 1.0)):
        said = fields.inside(fields.nested("rope_parameters"), {key: fields.config.get(key)}).config.get(key)
        said = fields.config.get(key) if said is None else said
        if said not in (None, right):
            fields.fail(f"{key} is {shown(said)}, but its rotated part is all of qk_rope_head_dim ({right})")
    return found


def _sparse(fields: Fields, layers: int) -> tuple[bool, ...]:
    kinds = fields.strings("mlp_layer_types")
    if kinds is None:
        return deepseek_moe.from_the(1, layers)
    if len(kinds) < layers:
        fields.fail(f"mlp_layer_types has {len(kinds)} entries, but num_hidden_layers is {layers}")
    return tuple(kind == "sparse" for kind in kinds[:layers])


FAMILY = Family(
    config=Config(
        architecture="Glm4MoeLiteForCausalLM",
        defaults={
            **COMMON,
            **DEFAULTS,
            "num_key_value_heads": 20,
            "max_position_embeddings": 202_752,
            "moe_intermediate_size": 1536,
            "num_experts_per_tok": 4,
            "n_routed_experts": 64,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "mlp_layer_types": None,
        },
        nullable=("q_lora_rank", "mlp_layer_types"),
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
