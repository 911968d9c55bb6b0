"""Qwen3.5 and 3.6, of a checkpoint with images its language model: three layers of four have linear
attention, the fourth gates what full attention gives (transformers 5.23, models/qwen3_5)."""

from __future__ import annotations

from memplan.asked.spec import ModelSpec
from memplan.families import Family, _qwen3_5
from memplan.parts import delta_rule
from memplan.parts.config import Config
from memplan.parts.layer import mlp
from memplan.parts.module import Modules, norms
from memplan.parts.module import mlp as mlp_modules
from memplan.parts.rotary import of_three_grids


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    return {**_qwen3_5.attention_modules(spec), **mlp_modules(spec), **norms(spec)}


def _linear_modules(spec: ModelSpec, sparse: bool) -> Modules:
    return {**delta_rule.modules(spec), **mlp_modules(spec), **norms(spec)}


FAMILY = Family(
    config=Config(
        architecture="Qwen3_5ForCausalLM",
        defaults={**_qwen3_5.DEFAULTS, "num_key_value_heads": 4},
        layers=_qwen3_5.layers,
        nullable=_qwen3_5.NULLABLE,
        experts=_qwen3_5.linear_sizes,
        images=("Qwen3_5ForConditionalGeneration", "qwen3_5"),
        rope_types=_qwen3_5.ROPE_TYPES,
        rotates_part=True,
    ),
    modules=_modules,
    linear_modules=_linear_modules,
    layer=_qwen3_5.layer(mlp),
    norm=_qwen3_5.norm,
    cos_sin=of_three_grids,
    several=False,
)
