"""What a family's configuration class makes of a ``config.json`` (transformers 5.23).

Defaults are those of ``models/*/configuration_*.py``; which layers slide is decided in ``modeling_*.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from memplan.asked.fields import MAX_POSITIONS, Fields
from memplan.asked.spec import LayerKind
from memplan.errors import UnsupportedArchitecture, shown

FULL: LayerKind = "full_attention"
SLIDING: LayerKind = "sliding_attention"
LINEAR: LayerKind = "linear_attention"
_KINDS = {
    "full_attention": FULL,
    "sliding_attention": SLIDING,
    "attention": FULL,
}  # the last is a legacy name

Layers = tuple[int | None, tuple[LayerKind, ...]]  # the window, and the kind of each layer

# -- which layers attend within a window -----------------------------------------------------------------


def window(fields: Fields) -> int | None:
    return fields.size_or_none("sliding_window", most=MAX_POSITIONS)


def full(fields: Fields, layers: int) -> Layers:
    return None, (FULL,) * layers


def all_or_none(fields: Fields, layers: int) -> Layers:
    """One mask for all layers: ``create_causal_mask if self.config.sliding_window is None else ...``."""
    size = window(fields)
    return size, (FULL if size is None else SLIDING,) * layers


def all_if_switched_on(fields: Fields, layers: int) -> Layers:
    return all_or_none(fields, layers) if fields.flag("use_sliding_window") else full(fields, layers)


def above_max_window_layers(fields: Fields, layers: int) -> Layers:
    size = window(fields) if fields.flag("use_sliding_window") else None
    first = layers if size is None else fields.size("max_window_layers", least=0)
    return as_listed(fields, layers, size, lambda layer: layer >= first)


def every_second(fields: Fields, layers: int) -> Layers:
    return as_listed(fields, layers, window(fields), lambda layer: layer % 2 == 0)


def all_but_every_fourth(fields: Fields, layers: int) -> Layers:
    return as_listed(fields, layers, window(fields), lambda layer: (layer + 1) % 4 != 0)


def by_pattern(fields: Fields, layers: int) -> Layers:
    """Of each ``sliding_window_pattern`` layers all slide but the last."""
    pattern = 1 if fields.get("layer_types") else fields.size("sliding_window_pattern")
    return as_listed(fields, layers, window(fields), lambda layer: (layer + 1) % pattern > 0)


def as_listed(fields: Fields, layers: int, window: int | None, slides: Callable[[int], bool]) -> Layers:
    """``layer_types`` if the configuration lists them, else what the family's rule makes."""
    listed = fields.strings("layer_types")
    if listed is None:
        kinds = tuple(SLIDING if slides(layer) else FULL for layer in range(layers))
    else:
        if len(listed) != layers:
            fields.fail(f"layer_types has {len(listed)} entries, but num_hidden_layers is {layers}")
        for kind in listed:
            if kind not in _KINDS:
                raise UnsupportedArchitecture(
                    f"{shown(fields.name)} has layers of the type {shown(kind)}, but memplan predicts only "
                    f"{FULL} and {SLIDING}"
                )
        kinds = tuple(_KINDS[kind] for kind in listed)
    if window is None and SLIDING in kinds:
        fields.fail(f"it has {SLIDING} layers but no sliding_window, which must be a number of tokens")
    return window, kinds


# -- the rest ------------------------------------------------------------------------------------------

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

COMMON: Mapping[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "num_key_value_heads": None,
    "head_dim": None,
}


def no_experts(fields: Fields, layers: int) -> dict[str, Any]:
    return {}


def one_rope(fields: Fields, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The same for all layers."""
    return [old or new]


def either(fields: Fields, other: str, own: str) -> str:
    """Two names of one field (``attribute_map``): the one that isn't the class's own is set last and wins."""
    return other if other in fields.config else own


def router_loss(fields: Fields) -> float:
    """The weight of the load-balancing loss."""
    return fields.number("router_aux_loss_coef", "a number", lambda value: True)


@dataclass(frozen=True, slots=True)
class Config:
    """What one configuration class does with a ``config.json``.

    ``layers``: the window and the kind of each layer; ``nullable``: fields declared ``... | None``;
    ``attention_bias``: None where the configuration says, as ``bias``; ``dropout``: its name for what comes
    before the residual; ``activation``, ``inner``: the fields of the MLP's and of its width; ``head``: that
    of ``head_dim``, None where it is not read; ``heads_divide_hidden``: ``validate_architecture`` asks for it
    even where head_dim is given; ``experts``: what a spec says of them, or else of its layers;
    ``images``: architecture and model type of a checkpoint with images, of which this is the language model.
    ``rope``: the entries of
    rotary parameters, from those that transformers 4 and 5 write; ``rotates_part``: of a head. ``mxfp4``: its
    experts may be published so.
    """

    architecture: str
    defaults: Mapping[str, Any]
    layers: Callable[[Fields, int], Layers]
    nullable: tuple[str, ...] = ()
    attention_bias: bool | None = None
    bias: str = "attention_bias"
    dropout: str = "resid_pdrop"
    activation: str = "hidden_act"
    inner: str = "intermediate_size"
    head: str | None = "head_dim"
    activation_aliases: Mapping[str, str] = field(default_factory=dict)
    heads_divide_hidden: bool = False
    experts: Callable[[Fields, int], dict[str, Any]] = no_experts
    images: tuple[str, str] | None = None
    rope: Callable[[Fields, Mapping[str, Any], Mapping[str, Any]], list[Mapping[str, Any]]] = one_rope
    rope_types: tuple[str, ...] = ROPE_TYPES
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    rotates_part: bool = False
    mxfp4: bool = False
