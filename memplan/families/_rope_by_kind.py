"""Rotary parameters of families whose kinds of layers have an entry each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.asked.fields import Fields
from memplan.parts.config import FULL, SLIDING


def entries(fields: Fields, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One entry per kind of layer (``convert_rope_params_to_dict``). The default entry has a rope_type, so
    that an old "type" in rope_scaling is not heard."""
    per_kind = fields.inside(new, {})
    entry = per_kind.nested(FULL) or {"rope_type": "default"}
    return [{**entry, **old}, per_kind.nested(SLIDING)]
