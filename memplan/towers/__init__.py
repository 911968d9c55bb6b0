"""Vision towers: one file each, called as the model type of the models that see with it.

A file defines ``TOWER``: how its configuration is read, how an image becomes patches and tokens, its modules
and its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from memplan import rooms
from memplan.asked.fields import Fields
from memplan.asked.recipe import Recipe
from memplan.asked.spec import Vision
from memplan.errors import RecipeError
from memplan.parts.context import Leaves
from memplan.parts.module import Modules
from memplan.shadow.tensor import Shape, Tensor


class Grid(NamedTuple):
    """An image as a tower sees it: rows and columns of patches, and the tokens that the decoder is given."""

    rows: int
    columns: int
    tokens: int

    @property
    def patches(self) -> int:
        """All of them."""
        return self.rows * self.columns


class Pictures(NamedTuple):
    """The images of a batch, all of one size: so many ``each`` of so many ``sequences``."""

    vision: Vision
    grid: Grid
    sequences: int
    each: int

    @property
    def number(self) -> int:
        """All of them."""
        return self.sequences * self.each

    @property
    def patches(self) -> int:
        """Of all of them."""
        return self.number * self.grid.patches

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return self.number * self.grid.tokens


class Fed(NamedTuple):
    """A tensor of a batch: its shape and dtype, and its value where a step's shapes depend on that."""

    shape: Shape
    dtype: str
    value: Any = None


class Features(NamedTuple):
    """What a tower makes: the tokens [T, E] of each image, those of earlier blocks likewise, and what its
    output keeps alive beside them."""

    tokens: list[Tensor]
    deepstack: list[list[Tensor]]
    kept: Any


class Plain(NamedTuple):
    """What attention reads of a specification: a tower has none of it."""

    attention_dropout: float = 0.0
    attn_logit_softcapping: float | None = None


PLAIN = Plain()
Look = Callable[..., tuple[Tensor, "Tensor | None"]]  # an attention interface, as decoders have it


# Runs a block of hidden states, checkpointed or not.
Run = Callable[[Callable[[Leaves, Tensor, Any], Tensor], Leaves, Tensor, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Tower:
    """A tower.

    ``read``: its configuration, and the width of the decoder; ``modules``: by name within it, in the
    library's order; ``grid``: an image of so many pixels, raises RecipeError; ``batch``: what a batch has of
    images beside token ids, of sequences of a length; ``forward``: of modules, pixels, the images, attention,
    and how a block is run.
    """

    root: str  # its name in the model
    read: Callable[[Fields, int], Vision]
    modules: Callable[[Vision], Modules]
    grid: Callable[[Vision, int, int], Grid]
    batch: Callable[[Pictures, int], dict[str, Fed]]
    forward: Callable[[Leaves, dict[str, Tensor], Pictures, Look, Run], Features]


def find(kind: str) -> Tower:
    """The tower of that name. Raises UnknownName."""
    tower: Tower = rooms.thing("towers", kind, "TOWER", "vision tower")
    return tower


def names() -> tuple[str, ...]:
    """All of them."""
    return rooms.names("towers")


def read(kind: str, config: Mapping[str, Any], name: str) -> Vision | None:
    """That of a model's configuration; None for a model type that sees with none of these. Raises
    SpecError."""
    if kind not in names():
        return None
    fields = Fields(config, {}, frozenset(), name)
    vision, text = fields.nested("vision_config"), fields.nested("text_config")
    if not vision:
        fields.fail("vision_config is missing, which says what its vision tower is")
    width = fields.inside(text, {}).size("hidden_size")
    return find(kind).read(fields.inside(vision, {}), width)


def pictures(vision: Vision, recipe: Recipe) -> Pictures | None:
    """The images of a recipe's batch. Raises RecipeError where a sequence has no room for them."""
    if not recipe.images:
        return None
    grid = find(vision.kind).grid(vision, *recipe.image_size)
    least = recipe.images * (grid.tokens + 1) + 1
    if recipe.seq_len < least:
        width, height = recipe.image_size
        raise RecipeError(
            f"an image of {width}x{height} pixels is {grid.tokens} tokens, so that a sequence with "
            f"{recipe.images} has at least {least}: give --seq-len {least} or more, or a smaller --image-size"
        )
    return Pictures(vision, grid, recipe.batch_size, recipe.images)


def places(seen: Pictures, length: int) -> list[int]:
    """Which tokens of a sequence are an image's (1): a token of text stands before each, the rest of the text
    behind all."""
    before = [mark for _ in range(seen.each) for mark in (0, *[1] * seen.grid.tokens)]
    return [*before, *[0] * (length - len(before))]
