"""Gemma, the first: Llama with Gemma's norm and a scaled embedding (transformers 5.23, models/gemma)."""

from __future__ import annotations

from memplan.families import Family
from memplan.parts.config import COMMON, Config, full
from memplan.parts.layer import llama_like
from memplan.parts.module import plain
from memplan.parts.norms import GemmaNorm

FAMILY = Family(
    config=Config(
        architecture="GemmaForCausalLM",
        defaults={
            **COMMON,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
        },
        layers=full,
        activation_aliases={"gelu": "gelu_pytorch_tanh"},  # which the first checkpoints meant
        heads_divide_hidden=True,
    ),
    modules=plain,
    layer=llama_like(),
    norm=GemmaNorm,
    scaled_embedding=True,
    several=False,
)
