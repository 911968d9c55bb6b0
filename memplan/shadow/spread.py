"""What several GPUs that share a step do differently from one, in hooks that do nothing by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memplan.shadow import autograd
from memplan.shadow.tensor import DType, Shape, Tensor, empty, state
from memplan.tape import Category, Phase, Tape


class Spread:
    """A strategy (:mod:`memplan.strategies`) while a step is played, by ``world`` ranks: what it does
    differently from one GPU, on one of them, ``rank``.

    ``autocast``: whether the forward runs under the recipe's; ``last``: whether the pass that is played is
    the last one of its step; ``looped``: whether a Trainer's loop is around it.

    ``divides``: whether the loss is divided by the number of passes; ``rehearses``: whether a pass is played
    before the step, and forgotten; ``shards``: whether what is not trained rests in parts, too; ``inside``:
    whether the optimizer's step is a part of the last backward pass to the loop; ``linear``: what is in the
    place of ``F.linear``; ``times``: how many layers the one stands for that is being made.
    """

    autocast = True
    last = True
    looped = False
    divides = True
    rehearses = False
    shards = False
    inside = False
    times = 1
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None

    def __init__(self, world: int, rank: int | None = None) -> None:
        self.world, self.rank = world, rank or 0

    def first(self) -> None:
        """The step is a run's first one."""
        self.rehearses = False

    def begin(self, part: int | str) -> None:
        """What is made from here on belongs to a layer, by its position among those that are played, or to
        what is before and behind them."""

    def parameter(self, shape: Shape, dtype: DType, kind: Category, trainable: bool) -> Tensor | None:
        """Write what rests of a parameter; what the model computes with, or None if that is all of it."""
        return None

    def updated(self, parameter: Tensor) -> Tensor:
        """What the optimizer updates in the place of what the model computes with."""
        return parameter

    def resting(self, parameter: Tensor) -> DType:
        """The dtype of what the model computes with, to who asks when it is not computed with."""
        return parameter.dtype

    def optimized(self, groups: list[Any]) -> list[Any]:
        """Write what is made of the trained parameters when all are there, in segments of its own; what the
        optimizer is given of them."""
        return groups

    def rest(self, groups: list[Any]) -> None:
        """Write what else rests beside the trained parameters, which come in the optimizer's groups, in
        segments of its own."""

    def host(self) -> tuple[int, int, int]:
        """What rests on the host: bytes of tensors, what they take there, and what of that is pinned."""
        return 0, 0, 0

    def rehearsed(self, layers: int, of: int) -> None:
        """The rehearsal is over, of so many layers of a model, whose middle one stands for all that are
        missing: let go of all that it has left."""

    def gathered(self) -> None:
        """Write what rests that the rehearsal would have taken."""

    def leaf(self, name: str, module: Any) -> Any:
        """A leaf module of a layer, as it is called."""
        return module

    def module(self, name: str, run: Callable[..., Any], x: Tensor | None, *rest: Any) -> Any:
        """The call of a module that is no leaf of a layer: ``run(x, *rest)``, where ``x`` is the one tensor
        that it is given by position, if any."""
        return run(x, *rest)

    def stacked(self, weights: Tensor) -> Tensor:
        """A parameter that all experts of a layer share, as they compute with it."""
        return weights

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

    def backward(self, loss: Tensor) -> None:
        """All of a backward pass."""
        grad = empty((), loss.dtype, "ones_like")  # torch.autograd.backward holds it to the end
        autograd.backward(loss, grad)
        state.tape.begin(Phase.BACKWARD, "graph freed")
        self.finish()

    def arrived(self, node: Any) -> None:
        """A parameter, whose ``AccumulateGrad`` this is, has its first gradient."""

    def accumulated(self, node: Any) -> None:
        """A parameter, whose ``AccumulateGrad`` this is, has a gradient, or one more was added to it."""

    def finish(self) -> None:
        """Backward is over."""

    def update(self, recipe: Any, kept: Any, loop: Any) -> bool:
        """All that follows backward, with the optimizer's states and what a Trainer's loop keeps; False if it
        is as on one GPU."""
        return False

    def clip(self, loop: Any) -> bool:
        """Gradients are clipped; False if that is as on one GPU."""
        return False

    def norm(self, stacked: Tensor) -> Tensor:
        """The stacked norms of what this rank has of the gradients, as norms of all of them."""
        return stacked

    def stepping(self) -> list[Tensor]:
        """Write what the optimizer's step takes beside what it does on one GPU, for as long as it runs."""
        return []

    def played(self, tape: Tape) -> None:
        """The step has been played: write anew what rests and follows from it."""
