"""SmolLM3: Llama, whose every fourth layer does not rotate (transformers 5.23, models/smollm3)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.errors import shown
from memplan.families import Family
from memplan.parts.config import COMMON, Config, Layers, as_listed, window
from memplan.parts.layer import llama_like
from memplan.parts.module import plain


def _rotated(fields: Fields, layers: int) -> tuple[bool, ...]:
    listed = fields.get("no_rope_layers")
    if listed is None:
        interval = fields.size("no_rope_layer_interval")
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not (isinstance(listed, list) and len(listed) >= layers and all(one in (0, 1) for one in listed)):
        fields.fail(
            f"no_rope_layers is {shown(listed)}, but it must be a list of 0 and 1, one for each layer"
        )
    return tuple(map(bool, listed[:layers]))


def _layers(fields: Fields, layers: int) -> Layers:
    size = window(fields) if fields.flag("use_sliding_window") else None
    rotated = _rotated(fields, layers)
    return as_listed(fields, layers, size, lambda layer: size is not None and not rotated[layer])


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    return {"rotated_layers": _rotated(fields, layers)}


FAMILY = Family(
    config=Config(
        architecture="SmolLM3ForCausalLM",
        defaults={
            **COMMON,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "layer_types": None,
        },
        layers=_layers,
        nullable=("num_key_value_heads", "sliding_window", "no_rope_layers", "layer_types"),
        experts=_more,
    ),
    modules=plain,
    layer=llama_like(),
    several=False,
)
