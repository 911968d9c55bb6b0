"""What the model is fed: the rows of each forward pass of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from memplan import stacks, towers
from memplan.asked.recipe import Batches, Recipe
from memplan.asked.spec import ModelSpec
from memplan.losses import Labels
from memplan.parts.loop import WAITING
from memplan.parts.loop import waiting as blocks_of
from memplan.shadow.tensor import DTYPES, Storage, Tensor, category, empty, int32, int64
from memplan.tape import Category
from memplan.towers import Pictures

Lengths = Sequence[int]  # of the sequences of one forward pass


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a forward pass: the recipe as it is fed (its batch size is the rows, its ``seq_len``
    theirs), and how many labels count."""

    recipe: Recipe
    counted: int


@dataclass(slots=True)
class Batch:
    """The tensors of a forward pass; ``positions`` of packed sequences, which need no ``mask``; ``others``:
    what nobody reads; ``looks``: what there is of ``pictures``, by name."""

    rows: Rows
    ids: Tensor
    labels: Labels
    positions: Tensor | None
    mask: Tensor | None
    others: list[Tensor]
    pictures: Pictures | None = None
    looks: dict[str, Tensor] = field(default_factory=dict)


def whole(recipe: Recipe) -> Rows:
    """Every sequence as long as ``seq_len``. Of padded batches, too: next to nothing is missing."""
    fed = recipe.as_fed()
    return Rows(fed, fed.batch_size * (fed.seq_len - 1))


def of_lengths(recipe: Recipe, lengths: Lengths) -> Rows:
    """Sequences of these lengths, padded to the longest of them, or packed."""
    counted = sum(lengths) - len(lengths)
    if recipe.batches is Batches.PACKED:
        shape: dict[str, Any] = {"batch_size": 1, "seq_len": sum(lengths)}
    else:
        padded = recipe.batches is Batches.PADDED or min(lengths) < max(lengths)
        kind = Batches.PADDED if padded else Batches.FULL
        shape = {"batch_size": len(lengths), "seq_len": max(lengths), "batches": kind}
    return Rows(recipe.model_copy(update=shape), counted)


def widest(step: Sequence[Rows]) -> Recipe:
    """The recipe of the longest rows of a step, masked if some of its rows are."""
    longest = max((rows.recipe for rows in step), key=lambda recipe: recipe.seq_len)
    masked = next((rows.recipe for rows in step if rows.recipe.batches is not Batches.FULL), longest)
    return longest.model_copy(update={"batches": masked.batches})


def batch(spec: ModelSpec, rows: Rows, items: Tensor | None = None) -> Batch:
    """Token ids, attention mask and labels; of packed rows positions in the place of the mask, and what the
    trainer's collator says beside; what a tower is given of images. ``items`` as
    :class:`memplan.losses.Labels` has it."""
    recipe = rows.recipe
    pictures = None if spec.vision is None else towers.pictures(spec.vision, recipe)
    shape = (recipe.batch_size, recipe.seq_len)
    packed = recipe.batches is Batches.PACKED
    with category(Category.ACTIVATIONS):
        ids, second, third = (empty(shape, int64, "batch") for _ in range(3))
        others = []
        for name in (stacks.find(recipe.trainer).packed or ()) if packed else ():
            # up to 127 sequences begin in the block that two do
            others.append(empty(shape if name == "seq_idx" else (2,), int32, "batch"))
        looks = {}
        if pictures is not None:
            told = towers.find(pictures.vision.kind).batch(pictures, recipe.seq_len)
            looks = {name: empty(one.shape, DTYPES[one.dtype], "batch") for name, one in told.items()}
    if packed:
        labels = Labels(second, rows.counted, items, masked=False)
        return Batch(rows, ids, labels, third, None, others)
    labels = Labels(third, rows.counted, items, masked=True)
    return Batch(rows, ids, labels, None, second, others, pictures, looks)


def waiting(fed: Batch, count: int) -> list[Storage]:
    """What ``count`` more batches of these tensors have on the card."""
    told = [tensor for tensor in (fed.positions, fed.mask) if tensor is not None]
    tensors = [fed.ids, fed.labels, *told, *fed.others, *fed.looks.values()]
    sizes = [prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors]
    with category(Category.ACTIVATIONS):
        return [Storage(size, WAITING) for size in blocks_of(sizes, count)]
