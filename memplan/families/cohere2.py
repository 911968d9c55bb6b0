"""Command R7B and Command A: Cohere's first, where only the layers that slide rotate (transformers 5.23,
models/cohere2)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.families import Family, _cohere
from memplan.parts.config import SLIDING, Config, by_pattern
from memplan.parts.module import Modules, attention, mlp, norms
from memplan.parts.norms import CenteredNorm


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    _, kinds = by_pattern(fields, layers)
    return {
        "logit_scale": fields.number("logit_scale", "a number", lambda value: True),
        "rotated_layers": tuple(kind == SLIDING for kind in kinds),
    }


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    return {**attention(spec), **mlp(spec), **norms(spec, "input_layernorm")}


FAMILY = Family(
    config=Config(
        architecture="Cohere2ForCausalLM",
        defaults={
            **_cohere.DEFAULTS,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        layers=by_pattern,
        nullable=("num_key_value_heads", "sliding_window", "layer_types"),
        experts=_more,
    ),
    modules=_modules,
    layer=_cohere.side_by_side(),
    norm=CenteredNorm,
    makes_both_masks=True,
    several=False,
    liger=False,
)
