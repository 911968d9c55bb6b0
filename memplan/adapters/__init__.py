"""Adapters: what is trained beside a frozen base; one file a kind.

A file defines ``ADAPTER``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memplan import rooms
from memplan.asked.recipe import Recipe
from memplan.parts.leaves import Base
from memplan.shadow.tensor import DType, Shape, Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter.

    ``around``: a module around a linear one, with factors of a dtype; its ``trainable`` are in the order of
    ``parameters()``; ``count``: parameters around a matrix of a shape. ``parameter``: the same of a router's
    or the experts' weight, which no linear module owns, with a rank; None where PEFT has no such thing.
    """

    around: Callable[[Base, Recipe, DType], Any]
    count: Callable[[Shape, Recipe], int]
    parameter: Callable[[Tensor, str, int, DType], Any] | None = None


def of(recipe: Recipe) -> Adapter:
    """The kind that a recipe trains."""
    adapter: Adapter = rooms.thing("adapters", recipe.adapter, "ADAPTER", "adapter")
    return adapter
