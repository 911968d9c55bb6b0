"""OLMo 3: OLMo 2 with three layers that slide and a fourth that does not, each kind with its rotary embedding
(transformers 5.23, models/olmo3)."""

from __future__ import annotations

from functools import partial

from memplan.families import Family, _rope_by_kind
from memplan.families.olmo2 import layer, modules
from memplan.parts.config import COMMON, Config, all_but_every_fourth
from memplan.parts.norms import LateCastNorm
from memplan.parts.rotary import cos_sin

FAMILY = Family(
    config=Config(
        architecture="Olmo3ForCausalLM",
        defaults={
            **COMMON,
            "max_position_embeddings": 2048,
            "sliding_window": 4096,
            "layer_types": None,
        },
        layers=all_but_every_fourth,
        nullable=("num_key_value_heads", "sliding_window", "layer_types"),
        rope=_rope_by_kind.entries,
    ),
    modules=modules,
    layer=layer,
    norm=LateCastNorm,
    cos_sin=partial(cos_sin, cast=False),
    rotates_by_layer=True,
    makes_both_masks=True,
    several=False,
)
