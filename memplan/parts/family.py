"""What a family of decoders is to memplan: how its configuration is read, and how a layer of it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memplan.asked.recipe import Attention
from memplan.asked.spec import ModelSpec
from memplan.parts.config import Config
from memplan.parts.context import Layer
from memplan.parts.module import Module
from memplan.parts.norms import RMSNorm
from memplan.parts.rotary import cos_sin
from memplan.shadow.tensor import Tensor


def _as_asked(attn: Attention | None) -> Attention | None:
    return attn


@dataclass(frozen=True, slots=True)
class Family:
    """A family, as its file in :mod:`memplan.families` describes it.

    ``modules``: the modules of a layer by name, in the library's order, of one with experts or without;
    ``layer``: its forward; ``cos_sin``: the rotary embedding's forward, for tables of a length and hidden
    states; ``attention``: which implementation is used of what was asked for, where transformers does not
    leave the choice. Raises RecipeError for one that it refuses.
    """

    config: Config
    modules: Callable[[ModelSpec, bool], dict[str, Module]]
    layer: Layer
    norm: type[RMSNorm] = RMSNorm
    cos_sin: Callable[[ModelSpec, int, Tensor], tuple[Tensor, Tensor]] = cos_sin
    attention: Callable[[Attention | None], Attention | None] = _as_asked
    scaled_embedding: bool = False  # embeddings are multiplied by a buffer
    rotates_by_layer: bool = False  # each kind of layer has its rotary embedding
    makes_both_masks: bool = (
        False  # of full and of sliding attention, whether a layer of the kind is there or not
    )
