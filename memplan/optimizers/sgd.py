"""torch's SGD, which updates in place (torch/optim/sgd.py, 2.13)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.asked.recipe import Recipe
from memplan.optimizers import Optimizer, Shapes
from memplan.shadow.tensor import DType, Shape

if TYPE_CHECKING:
    import torch


def _states(shape: Shape, dtype: DType, recipe: Recipe, embedding: bool) -> Shapes:
    return [(shape, dtype)] if recipe.momentum else []


def _real(parameters: list[dict[str, Any]], model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    from torch.optim import SGD

    return SGD(parameters, lr=1e-4, momentum=recipe.momentum)


OPTIMIZER = Optimizer(_states, _real, momentum=True)
