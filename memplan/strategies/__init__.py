"""How a step is spread over ranks: one file a strategy, called as accelerate and the Trainer call it.

A file defines ``STRATEGY``: what it makes of a parameter, and what happens around the layers and after their
backward. What is played is one rank's part of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from memplan import rooms, weights
from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.shadow.spread import Spread
from memplan.shadow.tensor import Shape, Tensor
from memplan.tape import Tape
from memplan.weights import LoadStep, Temporary

EMBEDDING, NORM, HEAD = "embedding", "norm", "head"
Lying = Mapping[str, list[int]]
Whole = Mapping[int | str, int]
Resting = list[tuple[int, str, int]]
Forward = Callable[[Tensor], Tensor]
Part = int | str  # a layer, by its position among those that are played, or what is before and behind them


@dataclass(frozen=True, slots=True)
class Coming:
    """What a model brings when it is loaded. ``resting``: storages by number, full name and bytes; ``whole``:
    bytes of each whole parameter by that number, or by its name where nothing rests of it alone; ``lying``:
    where those lie that are whole on the card already, by name, and ``sizes`` their bytes; ``temporary``:
    takes what is there for a while; ``capacity``: bytes of the card, None for as many as it takes."""

    resting: Resting
    whole: Whole
    lying: Lying
    temporary: Temporary
    capacity: int | None = None
    sizes: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Strategy:
    """A strategy. ``spread``: begins a step of the (resolved) recipe on a rank, on the one that
    takes the most unless it is given. ``shards``: whether ranks
    have parts of parameters, along their first axis unless ``flat``: then of all that lie end to end, and the
    one that takes the most stands for all; ``folds``: whether like layers do alike, which is not
    so where what is done in one depends on how much there was before it; ``copies``: whether that is done
    where gradients arrive and nowhere else; ``units``: of layers that tell the others.

    ``load``: the steps by which what rests comes onto the card once the model is made, None if as on one GPU;
    ``itemsize``: of what comes, where it is cast before. ``wrap``: what follows, of the tape of a step; what
    it does not drop goes after the first step. ``part``: of a model that is loaded straight onto the card in
    parts, the shape that this rank has of a parameter, by its full name, its shape and the world.
    ``rehearses``: whether a run's first step is another one than those behind it, of a recipe.

    ``worlds``: those that can share a model's step, where not every number of ranks can; ``check``: raises
    RecipeError where a (resolved) recipe does not suit a model, with the full names of what is adapted.
    """

    spread: Callable[[Recipe, int | None], Spread]
    shards: bool = False
    flat: bool = False
    load: Callable[[Recipe, Coming], Iterator[LoadStep]] | None = None
    wrap: Callable[[Recipe, Tape, Temporary], Iterator[LoadStep]] | None = None
    part: Callable[[str, Shape, int], Shape] | None = None
    worlds: Callable[[ModelSpec], list[int]] | None = None
    check: Callable[[ModelSpec, Recipe, Iterable[str]], None] | None = None
    folds: bool = True
    copies: bool = False
    units: int = 3
    itemsize: int | None = None
    rehearses: Callable[[Recipe], bool] = lambda _: False


def of(recipe: Recipe) -> Strategy | None:
    """The recipe's. Raises UnknownName."""
    return None if recipe.parallel is None else find(recipe.parallel)


def find(name: str) -> Strategy:
    """The strategy of that name. Raises UnknownName."""
    strategy: Strategy = rooms.thing("strategies", name, "STRATEGY", "strategy")
    return strategy


def folds(recipe: Recipe) -> bool:
    """Whether like layers of a step do alike."""
    strategy = of(recipe)
    return strategy is None or strategy.folds


def loads_whole(recipe: Recipe) -> bool:
    """Whether a rank that keeps parts of weights loads all of them first, which more is reserved for."""
    strategy = of(recipe)
    return strategy is not None and strategy.shards and weights.of(recipe) is not None
