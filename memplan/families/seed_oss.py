"""Seed-OSS: Llama with dropout in attention and at the end of both modules, and biases before attention
(transformers 5.23, models/seed_oss)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.families import Family
from memplan.parts.config import COMMON, Config, full
from memplan.parts.layer import llama_like
from memplan.parts.module import Modules, attention, linear, mlp, norms, widths


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    return {
        "residual_dropout": fields.probability("residual_dropout"),
        "attention_out_bias": fields.flag("attention_out_bias"),
    }


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    output = linear(widths(spec)[0], spec.hidden_size, spec.attention_out_bias)
    return {**attention(spec), "self_attn.o_proj": output, **mlp(spec), **norms(spec)}


FAMILY = Family(
    config=Config(
        architecture="SeedOssForCausalLM",
        defaults={
            **COMMON,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524_288,
            "attention_bias": True,
            "attention_out_bias": False,
            "attention_dropout": 0.1,
            "residual_dropout": 0.1,
            "mlp_bias": False,
        },
        layers=full,
        nullable=("num_key_value_heads", "head_dim"),
        experts=_more,
    ),
    modules=_modules,
    layer=llama_like(),
    several=False,
    liger=False,
)
