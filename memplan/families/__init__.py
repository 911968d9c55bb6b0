"""Families of decoders: one file each, called as transformers calls it (``model_type``).

A file defines ``FAMILY``: how the family's configuration is read, and how a layer of it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from memplan import rooms
from memplan.asked.spec import ModelSpec
from memplan.parts.config import Config
from memplan.parts.context import Layer
from memplan.parts.module import Module
from memplan.parts.norms import RMSNorm
from memplan.parts.rotary import cos_sin
from memplan.shadow.tensor import Shape, Tensor
from memplan.towers import Features, Pictures


class Seen(NamedTuple):
    """What a decoder is given of images beside hidden states: positions, and what comes between layers
    (``after`` the one of a number). ``stays``: what the model keeps from step to step, by name; ``kept``:
    what lives as long as the decoder runs."""

    positions: Tensor
    after: Callable[[int, Tensor], Tensor]
    stays: dict[str, Tensor]
    kept: Any


# Features, the embeddings in a list, in whose place come those with images, token ids, what the batch has of
# images, the images
Sees = Callable[[Features, "list[Tensor]", Tensor, dict[str, Tensor], Pictures], Seen]


def _nothing(sequences: int) -> dict[str, Shape]:
    return {}


def _as_asked(attn: str | None) -> str | None:
    return attn


@dataclass(frozen=True, slots=True)
class Family:
    """A family.

    ``modules``: the modules of a layer by name, in the library's order, of one with experts or without;
    ``layer``: its forward; ``cos_sin``: the rotary embedding's forward, for tables of a length and hidden
    states; ``attention``: which implementation is used of what was asked for, where transformers does not
    leave the choice. Raises RecipeError for one that it refuses. Of a model that sees, ``root``: the
    decoder's name in it; ``sees``: what it makes of a tower's features, and ``stays`` of what it keeps from
    step to step the shapes, by sequences."""

    config: Config
    modules: Callable[[ModelSpec, bool], dict[str, Module]]
    layer: Layer
    norm: Callable[..., RMSNorm] = RMSNorm
    norm_bias: bool = False  # the last norm has one
    apart: Callable[[str], str] | None = None  # see memplan.predict.published
    linear_modules: Callable[[ModelSpec, bool], dict[str, Module]] | None = None  # where attention is linear
    cos_sin: Callable[[ModelSpec, int, Tensor], tuple[Tensor, Tensor]] = cos_sin
    attention: Callable[[str | None], str | None] = _as_asked
    scaled_embedding: bool = False  # embeddings are multiplied by a buffer
    multiplied_embedding: bool = False  # or by a number, after what hooks the embedding
    rotates_by_layer: bool = False  # each kind of layer has its rotary embedding
    makes_both_masks: bool = False  # for full and for sliding attention, whichever its layers have
    masks_of_positions: bool = True  # its masks see positions, which keep packed sequences apart
    # PEFT's all-linear means the experts, too (peft/utils/transformers_weight_conversion.py)
    adapts_experts: bool = False
    root: str = "model"
    sees: Sees | None = None
    stays: Callable[[int], dict[str, Shape]] = _nothing
    counts_items: bool = True  # losses are divided by num_items_in_batch (accepts_loss_kwargs)
    several: bool = True  # its step was compared on several GPUs
    liger: bool = True  # Liger-Kernel 0.8.5 has a loss for it that runs with transformers 5.23
    float16: bool = True  # it is loaded so as a whole (not in _keep_in_fp32_modules)


def find(model_type: str) -> Family:
    """The family of a spec. Raises UnknownName."""
    family: Family = rooms.thing("families", model_type, "FAMILY", "model type")
    return family


def names() -> tuple[str, ...]:
    """The model types of all families."""
    return rooms.names("families")


def everyone() -> Iterator[tuple[str, Family]]:
    """Every family with its model type."""
    return ((name, find(name)) for name in names())
