"""How a step is spread over ranks: one file a strategy, called as accelerate and the Trainer call it.

A file defines ``STRATEGY``: what it makes of a parameter, and what happens around the layers and after their
backward. What is played is one rank's part of one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memplan import rooms
from memplan.asked.recipe import Recipe
from memplan.optimizers import Group, State
from memplan.parts.context import Layer
from memplan.shadow import autograd
from memplan.shadow.autograd import AccumulateGrad
from memplan.shadow.tensor import DType, Shape, Tensor, empty, state
from memplan.tape import Category, Phase


EMBEDDING, NORM, HEAD = "embedding", "norm", "head"
Part = int | str  # a layer, by its position among those that are played, or what is before and behind them


class Spread:
    """A strategy while a step is played, by ``world`` ranks; as it is here it does nothing. ``autocast``: whether
    the forward runs under the recipe's."""

    world: int
    autocast: bool
    divides = True  # the loss, by the number of micro-steps
    rehearses = False  # one pass through the model before the one that is played
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None  # in the place of F.linear

    def begin(self, part: Part) -> None:
        """What is made from here on belongs to a part."""

    def parameter(self, shape: Shape, dtype: DType, kind: Category, trainable: bool) -> Tensor | None:
        """Write what rests of a parameter; what the model computes with, or None if that is all of it."""
        return None

    def updated(self, parameter: Tensor) -> Tensor:
        """What the optimizer updates in the place of what the model computes with."""
        return parameter

    def rest(self, groups: list[Group], arrived: list[Tensor] | None) -> None:
        """Write what else rests. ``arrived``: the trained parameters in the order in which their gradients
        come, where that is known."""

    def optimized(self, groups: list[Group]) -> list[Group]:
        """Write what is made of the trained parameters when all of them are there; what the optimizer is
        given."""
        return groups

    def rehearsed(self) -> None:
        """The rehearsal is over: let go of all that it has left."""

    def embed(self, run: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """The embedding's forward as the strategy has it."""
        return run(ids)

    def around(self, layer: int, run: Layer) -> Layer:
        """A layer's."""
        return run

    def normed(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """The last norm's."""
        return run(hidden)

    def head(self, head: Any) -> Any:
        """The output layer's."""
        return head

    def leaf(self, name: str, module: Any) -> Any:
        """A module of a layer, as it is called."""
        return module

    def module(self, name: str, run: Callable[..., Any], x: Tensor | None, *rest: Any) -> Any:
        """The call of a module that is no leaf, or is one of an adapter's: ``run(x, *rest)``, where ``x`` is
        the one tensor that it is given by position, if any."""
        return run(x, *rest)

    def before(self) -> None:
        """The model's forward begins."""

    def after(self, loss: Any, logits: Tensor | None) -> Any:
        """It is over, and returns these: both as the caller gets them."""
        return loss, logits

    def backward(self, loss: Tensor, last: bool) -> None:
        """All of a micro-step's backward; ``last``: the optimizer is next."""
        grad = empty((), loss.dtype, "ones_like")  # torch.autograd.backward holds it to the end
        autograd.backward(loss, grad)
        state.tape.begin(Phase.BACKWARD, "graph freed")
        self.finish()

    def arrived(self, node: AccumulateGrad) -> None:
        """A parameter's gradient has come."""

    def finish(self) -> None:
        """Backward is over."""

    def update(self, recipe: Recipe, kept: State) -> bool:
        """All that follows backward; False if it is as without a strategy."""
        return False

    def norm(self, stacked: Tensor) -> Tensor:
        """The stacked norms of what this rank has of the gradients, as norms of all of them."""
        return stacked


@dataclass(frozen=True, slots=True)
class Strategy:
    """A strategy. ``spread``: begins a step of the (resolved) recipe; ``folds``: like layers do alike, which
    is not so where what is done in one depends on how much there was before it."""

    spread: Callable[[Recipe], Spread]
    folds: bool = True


def of(recipe: Recipe) -> Strategy | None:
    """The recipe's. Raises UnknownName."""
    if recipe.parallel is None or recipe.gpus == 1:
        return None
    strategy: Strategy = rooms.thing("strategies", recipe.parallel, "STRATEGY", "strategy")
    return strategy
