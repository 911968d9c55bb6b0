"""transformers' Adafactor (transformers/optimization.py, 5.23), with the Trainer's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.asked.recipe import Recipe
from memplan.optimizers import Group, Optimizer, Shapes, State
from memplan.optimizers._lists import by_decay, gradient
from memplan.shadow.ops import pointwise
from memplan.shadow.tensor import DType, Shape, Tensor, category, empty, float32, state
from memplan.tape import Category, Phase

if TYPE_CHECKING:
    import torch


def _states(shape: Shape, dtype: DType, recipe: Recipe, embedding: bool) -> Shapes:
    rms: tuple[Shape, DType] = ((), float32)
    if len(shape) >= 2:
        return [(shape[:-1], float32), ((*shape[:-2], shape[-1]), float32), rms]
    return [(shape, float32), rms]


def _real(parameters: list[dict[str, Any]], model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-4, scale_parameter=False, relative_step=False)


def _step(groups: list[Group], kept: State) -> None:
    """Parameter by parameter, in fp32. Names keep the last parameter's tensors
    alive into the next, as the loop's own do."""
    tape = state.tape
    grad = weight = update = None
    for name, chosen in by_decay(groups):
        for layer, parameters in chosen:
            tape.begin(Phase.OPTIMIZER, f"adafactor, {name}", layer)
            for parameter in parameters:
                grad = gradient(parameter)
                if grad is None:
                    continue
                if grad.dtype.itemsize == 2:
                    grad = pointwise("_to_copy", grad, dtype=float32)
                weight = parameter
                if weight.dtype.itemsize == 2:
                    weight = pointwise("_to_copy", weight, dtype=float32)
                with category(Category.OPTIMIZER_STATE):
                    kept[parameter][-1] = _rms(weight)
                power = pointwise("pow", grad)
                update = pointwise("add", power)
                del power
                if len(parameter.shape) >= 2:
                    row = empty(parameter.shape[:-1], float32, "mean")
                    del row
                    column = empty((*parameter.shape[:-2], parameter.shape[-1]), float32, "mean")
                    del column
                    update = _approximate_square(parameter.shape)
                else:
                    update = pointwise("rsqrt", update)
                rms = _rms(update)
                ratio = empty((), float32, "div")
                del rms, ratio
                negative = pointwise("neg", update)
                del negative
        tape.begin(Phase.OPTIMIZER, f"adafactor, {name}, done")
    del grad, weight, update


def _rms(x: Tensor) -> Tensor:
    norm = empty((), float32, "linalg_vector_norm")
    rms = empty((), float32, "div")
    del norm
    return rms


def _approximate_square(shape: Shape) -> Tensor:
    """``_approx_sq_grad``: the product of a row and a column factor."""
    mean = empty((*shape[:-2], 1), float32, "mean")
    row = empty(shape[:-1], float32, "div")
    del mean
    column = empty((*shape[:-2], shape[-1]), float32, "rsqrt")
    product = empty(shape, float32, "mul")
    del row, column
    return product


OPTIMIZER = Optimizer(_states, _real, _step)
