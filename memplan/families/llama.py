"""Llama, and what has its architecture (transformers 5.23, models/llama)."""

from memplan.families import Family
from memplan.parts.config import COMMON, Config, full
from memplan.parts.layer import llama_like
from memplan.parts.module import plain

FAMILY = Family(
    config=Config(
        architecture="LlamaForCausalLM",
        defaults={**COMMON, "max_position_embeddings": 2048, "mlp_bias": False},
        layers=full,
        nullable=("num_key_value_heads", "head_dim"),
        heads_divide_hidden=True,
    ),
    modules=plain,
    layer=llama_like(),
)
