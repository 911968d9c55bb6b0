"""Qwen2 and Qwen2.5: biases on queries, keys and values, whatever the file says, and on nothing else
(transformers 5.23, models/qwen2)."""

from __future__ import annotations

from memplan.asked.spec import ModelSpec
from memplan.families import Family, _qwen
from memplan.parts.config import Config, above_max_window_layers
from memplan.parts.layer import llama_like
from memplan.parts.module import Modules, attention, mlp, norms


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    return {**attention(spec, output_bias=False), **mlp(spec), **norms(spec)}


FAMILY = Family(
    config=Config(
        architecture="Qwen2ForCausalLM",
        defaults=_qwen.DEFAULTS,
        layers=above_max_window_layers,
        nullable=_qwen.NULLABLE,
        attention_bias=True,
    ),
    modules=_modules,
    layer=llama_like(),
)
