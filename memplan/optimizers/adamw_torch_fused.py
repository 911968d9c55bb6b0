"""torch's AdamW in one kernel, in place (torch/optim/adam.py ``_fused_adamw``, 2.13)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.asked.recipe import Recipe
from memplan.optimizers import Optimizer, Shapes
from memplan.optimizers._torch import moments
from memplan.shadow.tensor import DType, Shape, float32

if TYPE_CHECKING:
    import torch


def _states(shape: Shape, dtype: DType, recipe: Recipe, embedding: bool) -> Shapes:
    """The step count is on the device, other than with foreach (``_init_group``)."""
    return [((), float32), *moments(shape, dtype, recipe, embedding)]


def _real(parameters: list[dict[str, Any]], model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    from torch.optim import AdamW

    return AdamW(parameters, lr=1e-4, fused=True)


OPTIMIZER = Optimizer(_states, _real)
