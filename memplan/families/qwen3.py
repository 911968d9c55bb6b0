"""Qwen3: norms over each head of queries and keys (transformers 5.23, models/qwen3)."""

from __future__ import annotations

from memplan.asked.spec import ModelSpec
from memplan.families import Family, _qwen
from memplan.parts.config import Config, above_max_window_layers
from memplan.parts.layer import llama_like, project_and_norm_heads
from memplan.parts.module import Modules, attention, head_norms, mlp, norms


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    return {**attention(spec), **head_norms(spec.head_dim, spec.head_dim), **mlp(spec), **norms(spec)}


FAMILY = Family(
    config=Config(
        architecture="Qwen3ForCausalLM",
        defaults={**_qwen.DEFAULTS, "head_dim": 128},
        layers=above_max_window_layers,
        nullable=_qwen.NULLABLE,
    ),
    modules=_modules,
    layer=llama_like(project_and_norm_heads),
)
