"""What Gemma 2 and Gemma 3 have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.asked.spec import ModelSpec
from memplan.parts.config import COMMON
from memplan.parts.module import Modules, norms

DEFAULTS: Mapping[str, Any] = {
    **COMMON,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
NULLABLE = ("sliding_window", "layer_types", "final_logit_softcapping", "attn_logit_softcapping")


def four_norms(spec: ModelSpec) -> Modules:
    return norms(
        spec,
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
