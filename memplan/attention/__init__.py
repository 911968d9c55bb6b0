"""Attention implementations: one file each, called as transformers calls it (``attn_implementation``)."""

from __future__ import annotations

from memplan import rooms
from memplan.parts.context import Attention


def find(name: str) -> Attention:
    """The implementation of that name. Raises UnknownName."""
    attention: Attention = rooms.thing("attention", name, "ATTENTION", "attention implementation")
    return attention
