"""What several GPUs that share a step do differently from one, in hooks that do nothing by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memplan.shadow.tensor import DType, Shape, Tensor
from memplan.tape import Category


class Spread:
    """A strategy (:mod:`memplan.strategies`) while a step is played, by ``world`` ranks: what it does
    differently from one GPU.

    ``autocast``: whether the forward runs under the recipe's; ``last``: whether the pass that is played is
    the last one of its step.
    """

    autocast = True
    last = True

    def __init__(self, world: int) -> None:
        self.world = world

    def begin(self, part: int | str) -> None:
        """What is made from here on belongs to a layer, by its position among those that are played, or to
        what is before and behind them."""

    def parameter(self, shape: Shape, dtype: DType, kind: Category, trainable: bool) -> Tensor | None:
        """Write what rests of a parameter; what the model computes with, or None if that is all of it."""
        return None

    def updated(self, parameter: Tensor) -> Tensor:
        """What the optimizer updates in the place of what the model computes with."""
        return parameter

    def rest(self, groups: list[Any]) -> None:
        """Write what else rests beside the trained parameters, which come in the optimizer's groups, in
        segments of its own."""

    def before(self) -> None:
        """The model's forward begins."""

    def given(self, number: Tensor) -> Tensor:
        """A number that the model is given with its batch."""
        return number

    def embed(self, run: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """The embedding's forward."""
        return run(ids)

    def around(self, layer: int, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A layer's."""
        return run

    def normed(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """The last norm's."""
        return run(hidden)

    def head(self, head: Any) -> Any:
        """The output layer, which may be called or have its weight read."""
        return head

    def after(self, loss: Any, logits: Tensor | None) -> tuple[Any, Tensor | None]:
        """The model's forward is over, and returns these: both as the caller gets them."""
        return loss, logits

    def arrived(self, node: Any) -> None:
        """A parameter, whose ``AccumulateGrad`` this is, has its first gradient."""

    def finish(self) -> None:
        """Backward is over."""

    def norm(self, stacked: Tensor) -> Tensor:
        """The stacked norms of what this rank has of the gradients, as norms of all of them."""
        return stacked

    def again(self) -> Spread | None:
        """The same to play the step once more with, where what rests follows from a step."""
        return None
