"""Weight formats: how the frozen weights of linear layers lie in memory and are multiplied by; one file each.

A file defines ``WEIGHTS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memplan import rooms
from memplan.asked.recipe import Recipe
from memplan.shadow.tensor import DType, Shape, Tensor
from memplan.tape import Category

if TYPE_CHECKING:
    import torch
    from torch import nn

# ("alloc", storage of the step) | ("scratch", bytes), known by how many came before | ("drop", that number)
# | ("empty_cache", 0)
LoadStep = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Brought:
    """A storage that loading leaves on the card: its number on a step's tape; the full name of the parameter
    or buffer that it is of, or of what a quantised one keeps beside it (``.absmax``); its category; whether
    it is made there, not read."""

    storage: int
    name: str
    category: Category
    made: bool


Temporary = Callable[[int], tuple[LoadStep, int]]  # by its bytes: the step that makes it, and its number


@dataclass(frozen=True, slots=True)
class Quantised:
    """What a format other than 16 or 32 bits is.

    Played: ``linear``: a layer of a name, of its parameters' shapes, made from weights of a dtype;
    ``shared``: what all layers have once.

    Loaded onto the card, each weight in 16 bits first: ``packed``: bytes that the warm-up counts for so many
    weights; ``made``: whether the storages by name have such a weight; ``load``: the steps from a weight's
    shape, the bytes of each of its numbers when it arrives, storages by name, its module, and what makes
    temporaries. ``stored``: the steps of a weight that a checkpoint has in this format already.

    The library's own: ``fake``: a layer of fake tensors in the place of a linear one; ``real``: the same with
    data to come; ``with_data``: a parameter of such a layer with its data, or None of one that is none of its
    own; ``finish``: quantises such a parameter on its device, and says whether it did; ``settle``: what a
    module's first step leaves changed; ``quantizer``: transformers' object; ``mark``: the attribute of a
    model by which libraries know it.
    """

    linear: Callable[[str, Mapping[str, Shape], Recipe, DType], Any]
    shared: Callable[[Recipe], list[Tensor]]
    packed: Callable[[int], int]
    made: Callable[[str, Mapping[str, Any]], bool]
    load: Callable[[Shape, int, dict[str, list[int]], str, Temporary], Iterator[LoadStep]]
    stored: Callable[[dict[str, list[int]], str, Temporary], Iterator[LoadStep]]
    fake: Callable[[nn.Linear, Recipe], nn.Module]
    real: Callable[[nn.Linear, Recipe], nn.Module]
    with_data: Callable[[nn.Parameter, torch.Tensor], nn.Parameter | None]
    finish: Callable[[nn.Parameter, torch.device], bool]
    settle: Callable[[nn.Module], None]
    quantizer: Callable[[Recipe], Any]
    mark: str


def of(recipe: Recipe) -> Quantised | None:
    """The format of a recipe's frozen linear layers; None of 16 and 32 bits."""
    if recipe.weight_format is None:
        return None
    weights: Quantised = rooms.thing("weights", recipe.weight_format, "WEIGHTS", "weight format")
    return weights
