"""torch's AdamW, in either of its implementations (torch/optim/adam.py, 2.13)."""

from __future__ import annotations

from memplan.asked.recipe import Recipe
from memplan.optimizers import Shapes
from memplan.shadow.tensor import DType, Shape


def moments(shape: Shape, dtype: DType, recipe: Recipe, embedding: bool) -> Shapes:
    """Two, in the parameter's dtype."""
    return [(shape, dtype), (shape, dtype)]
