"""Mistral: one window for all layers or for none (transformers 5.23, models/mistral)."""

from memplan.families import Family
from memplan.parts.config import COMMON, Config, all_or_none
from memplan.parts.layer import llama_like
from memplan.parts.module import plain

FAMILY = Family(
    config=Config(
        architecture="MistralForCausalLM",
        defaults={
            **COMMON,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096 * 32,
            "sliding_window": 4096,
        },
        layers=all_or_none,
        nullable=("head_dim", "sliding_window"),
        attention_bias=False,
    ),
    modules=plain,
    layer=llama_like(),
)
