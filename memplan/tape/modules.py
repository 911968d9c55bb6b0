"""What a module's name tells: the decoder layer that it lies in, and what it is there."""

from __future__ import annotations

import re

_TOWER = r"(?!(?:.*\.)?(?:visual|vision_tower|vision_model)\.)"  # whose blocks are no layers
_LAYER = re.compile(rf"^{_TOWER}.*?(?:^|\.)(?:layers|h|blocks|block)\.(\d+)(?:\.|$)")
_WRAPPERS = re.compile(r"(?:\.(?:base_layer|lora_\w+|default))+$")


def plain_name(name: str) -> str:
    """A module's name without PEFT's wrappers around the model."""
    return "" if name in ("base_model", "base_model.model") else name.removeprefix("base_model.model.")


def layer_of(module: str) -> int | None:
    """The number of the decoder layer, None outside of layers."""
    found = _LAYER.match(module)
    return int(found[1]) if found else None


def kind_of(module: str) -> str:
    """The name inside its layer, the wrappers that PEFT puts around it left out."""
    return _WRAPPERS.sub("", _LAYER.sub("", module))
