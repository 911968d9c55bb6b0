"""How a step is spread over ranks: one file a strategy, called as accelerate and the Trainer call it.

A file defines ``STRATEGY``: what it makes of a parameter, and what happens around the layers and after their
backward. What is played is one rank's part of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memplan import rooms
from memplan.asked.recipe import Recipe
from memplan.optimizers import Group, State
from memplan.parts.context import Layer
from memplan.parts.loop import Loop
from memplan.shadow import autograd
from memplan.shadow.autograd import AccumulateGrad
from memplan.shadow.tensor import DType, Shape, Tensor, empty, state
from memplan.tape import Category, Phase, Tape
from memplan.weights import LoadStep, Temporary

EMBEDDING, NORM, HEAD = "embedding", "norm", "head"
Resting = list[tuple[int, str, int]]
Forward = Callable[[Tensor], Tensor]
Part = int | str  # a layer, by its position among those that are played, or what is before and behind them


class Spread:
    """A strategy while a step is played, by ``world`` ranks: what it does differently from one GPU.

    ``autocast``: whether the forward runs under the recipe's; ``last``: whether the pass that is played is
    the last one of its step; ``looped``: whether a Trainer's loop is around it.

    ``divides``: whether the loss is divided by the number of passes; ``rehearses``: whether a pass is played
    before the step, and forgotten; ``linear``: what is in the place of ``F.linear``.
    """

    autocast = True
    last = True
    looped = False
    divides = True
    rehearses = False
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None

    def __init__(self, world: int) -> None:
        self.world = world

    def begin(self, part: Part) -> None:
        """What is made from here on belongs to a part."""

    def parameter(self, shape: Shape, dtype: DType, kind: Category, trainable: bool) -> Tensor | None:
        """Write what rests of a parameter; what the model computes with, or None if that is all of it."""
        return None

    def updated(self, parameter: Tensor) -> Tensor:
        """What the optimizer updates in the place of what the model computes with."""
        return parameter

    def optimized(self, groups: list[Group]) -> list[Group]:
        """Write what is made of the trained parameters when all are there, in segments of its own; what the
        optimizer is given of them."""
        return groups

    def rest(self, groups: list[Group]) -> None:
        """Write what else rests beside the trained parameters, in segments of its own."""

    def rehearsed(self) -> None:
        """The rehearsal is over: let go of all that it has left."""

    def gathered(self) -> None:
        """Write what rests that the rehearsal would have taken."""

    def leaf(self, name: str, module: Any) -> Any:
        """A leaf module of a layer, as it is called."""
        return module

    def module(self, name: str, run: Callable[..., Any], x: Tensor | None, *rest: Any) -> Any:
        """The call of a module that is no leaf of a layer: ``run(x, *rest)``, where ``x`` is the one tensor
        that it is given by position, if any."""
        return run(x, *rest)

    def before(self) -> None:
        """The model's forward begins."""

    def given(self, number: Tensor) -> Tensor:
        """A number that the model is given with its batch."""
        return number

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """The embedding's forward."""
        return run(ids)

    def around(self, layer: int, run: Layer) -> Layer:
        """A layer's."""
        return run

    def normed(self, run: Forward, hidden: Tensor) -> Tensor:
        """The last norm's."""
        return run(hidden)

    def head(self, head: Any) -> Any:
        """The output layer, which may be called or have its weight read."""
        return head

    def after(self, loss: Any, logits: Tensor | None) -> tuple[Any, Tensor | None]:
        """The model's forward is over, and returns these: both as the caller gets them."""
        return loss, logits

    def backward(self, loss: Tensor) -> None:
        """All of a backward pass."""
        grad = empty((), loss.dtype, "ones_like")  # torch.autograd.backward holds it to the end
        autograd.backward(loss, grad)
        state.tape.begin(Phase.BACKWARD, "graph freed")
        self.finish()

    def arrived(self, node: AccumulateGrad) -> None:
        """A parameter has its first gradient."""

    def accumulated(self, node: AccumulateGrad) -> None:
        """A parameter has one, or one more was added to it."""

    def finish(self) -> None:
        """Backward is over."""

    def update(self, recipe: Recipe, kept: State, loop: Loop[Tensor] | None) -> bool:
        """All that follows backward; False if it is as on one GPU."""
        return False

    def norm(self, stacked: Tensor) -> Tensor:
        """The stacked norms of what this rank has of the gradients, as norms of all of them."""
        return stacked

    def again(self) -> Spread | None:
        """The same to play the step once more with, where what rests follows from a step."""
        return None


@dataclass(frozen=True, slots=True)
class Strategy:
    """A strategy. ``spread``: begins a step of the (resolved) recipe on a rank. ``shards``: whether ranks
    have parts of parameters, along their first axis; ``folds``: whether like layers do alike, which is not
    so where what is done in one depends on how much there was before it.

    ``load``: the steps by which what rests comes onto the card once the model is made, of storages by number,
    full name and bytes, and of the bytes of each parameter by name; None if as on one GPU. ``wrap``: what
    follows, of the tape of a step; what it does not drop goes after the first step.
    """

    spread: Callable[[Recipe, int], Spread]
    shards: bool = False
    load: Callable[[Resting, Mapping[str, int], Temporary], Iterator[LoadStep]] | None = None
    wrap: Callable[[Tape, Temporary], Iterator[LoadStep]] | None = None
    folds: bool = True


def of(recipe: Recipe) -> Strategy | None:
    """The recipe's. Raises UnknownName."""
    if recipe.parallel is None:
        return None
    strategy: Strategy = rooms.thing("strategies", recipe.parallel, "STRATEGY", "strategy")
    return strategy
