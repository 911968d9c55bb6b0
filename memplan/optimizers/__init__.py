"""Optimizers: one file each, called as the Trainer calls it (``optim``, transformers ``OptimizerNames``).

A file defines ``OPTIMIZER``: the states it keeps and what a step takes beside them. Parameters come in
groups, one a decoder layer, in the order of ``model.parameters()``; a group of a repeated layer says how
often it repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memplan import rooms
from memplan.asked.recipe import Recipe
from memplan.shadow.tensor import DType, Shape, Tensor

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Group:
    """Trainable parameters of one place: a layer (``repeat`` of them in a folded play) or outside."""

    layer: int | None
    repeat: int
    parameters: list[Tensor]


State = dict[Tensor, list[Tensor]]
Shapes = list[tuple[Shape, DType]]


def in_place(groups: list[Group], kept: State) -> None:
    """A step that updates in place and takes nothing beside."""


@dataclass(frozen=True, slots=True)
class Optimizer:
    """An optimizer.

    ``states``: shapes and dtypes of a parameter's states on the card, by its shape and dtype, the recipe, and
    whether it is the embedding's weight, which the Trainer exempts from 8 bits; ``real``: the library's own
    object, of parameter groups of a model; ``step``: one ``optimizer.step()``, of the groups and the states
    that were made for each parameter; ``maps``: tables of 256 fp32 numbers that all parameters share;
    ``paged``: large states are in memory of card and host; ``bitsandbytes``: whose it is; ``momentum``: the
    recipe's is heard.

    A step says what it takes beside the states as the library's code allocates it: a segment for each group
    (``state.tape.begin(Phase.OPTIMIZER, name, group.layer)``), since one may stand for many layers, and one
    for what each group releases. ``adamw_torch.py`` is an example; ``_lists.py`` has the Trainer's two
    groups, decayed and not.
    """

    states: Callable[[Shape, DType, Recipe, bool], Shapes]
    real: Callable[[list[dict[str, Any]], Any, Recipe], torch.optim.Optimizer]
    step: Callable[[list[Group], State], None] = in_place
    maps: int = 0
    paged: bool = False
    bitsandbytes: bool = False
    momentum: bool = False


def find(name: str) -> Optimizer:
    """The optimizer of that name. Raises UnknownName."""
    optimizer: Optimizer = rooms.thing("optimizers", name, "OPTIMIZER", "optimizer")
    return optimizer
