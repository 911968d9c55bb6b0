"""Attention implementations: one file each, called as transformers calls it (``attn_implementation``).

A file defines ``ATTENTION``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memplan import rooms
from memplan.asked.recipe import Batches, Recipe
from memplan.parts.context import Attend
from memplan.shadow.tensor import DType, Tensor


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention implementation.

    ``masked``: whether a mask is made for a layer, whose window is shorter than the sequence or not, of such
    batches; ``mask``: the mask of such a batch of a shape [B, S], for hidden states of a dtype, of a layer
    with a window or without, which is shorter than the sequence or not. ``fused``: it never makes all
    scores; ``package``: it is a library beside PyTorch, whose kernels need Ampere.
    """

    attend: Attend
    masked: Callable[[bool, Batches], bool]
    mask: Callable[[tuple[int, int], DType, bool, bool, Batches | None], Tensor | None]
    fused: bool = True
    package: bool = False


def find(name: str) -> Attention:
    """The implementation of that name. Raises UnknownName."""
    attention: Attention = rooms.thing("attention", name, "ATTENTION", "attention implementation")
    return attention


def of(recipe: Recipe) -> Attention:
    """That of a recipe."""
    return find(recipe.attn or "sdpa")
