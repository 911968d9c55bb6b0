"""Families of decoders: one file each, called as transformers calls it (``model_type``)."""

from __future__ import annotations

from collections.abc import Iterator

from memplan import rooms
from memplan.parts.family import Family


def find(model_type: str) -> Family:
    """The family of a spec. Raises UnknownName."""
    family: Family = rooms.thing("families", model_type, "FAMILY", "model type")
    return family


def names() -> tuple[str, ...]:
    """The model types of all families."""
    return rooms.names("families")


def everyone() -> Iterator[tuple[str, Family]]:
    """Every family with its model type."""
    return ((name, find(name)) for name in names())
