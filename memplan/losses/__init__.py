"""Losses, from hidden states on: one file each.

A file defines ``LOSS``: what memplan plays, and what the library's own code needs to be traced and trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from memplan import rooms
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.libraries import Library
from memplan.shadow.tensor import Tensor

# The output layer, hidden states [B, S, E], labels, what the routers said where their loss is added,
# and the model's spec -> the loss, and the logits, which live until the caller drops them.
Head = Callable[[Any, Tensor, "Labels", "list[Tensor] | None", ModelSpec], tuple[Any, "Tensor | None"]]


class Labels(Tensor):
    """Labels [B, S], of which ``counted`` count. ``items``: how many do in all batches of a step, a number on
    the card, by which a loss is divided in a Trainer's loop (``num_items_in_batch``). ``masked``: a mask
    comes with them."""

    __slots__ = ("counted", "items", "masked")

    def __init__(self, of: Tensor, counted: int, items: Tensor | None, *, masked: bool) -> None:
        super().__init__(of.shape, of.dtype, of.storage, of.strides)
        self.counted, self.items, self.masked = counted, items, masked

    def divided_by(self, items: Tensor) -> Labels:
        """The same with another number."""
        return Labels(self, self.counted, items, masked=self.masked)


Patch = tuple[Any, str, Any]  # an object, its attribute, and what stands there while a step is traced


class StandIns(Protocol):
    """What the tracer lends for code that was written for a GPU."""

    def launch(self) -> Any:
        """A Triton kernel whose launches do nothing."""

    def on_cuda(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its questions about the device answered as on CUDA."""


def same(loss: Any) -> Any:
    return loss


def unpatched(base: Any) -> None:
    """The model's own forward makes the loss."""


def of_outputs(model: Any, run: Callable[..., Any], batch: dict[str, Any]) -> Any:
    """What ``Trainer.compute_loss`` takes; in its loop, ``num_items_in_batch`` is in the batch."""
    outputs = run(**batch)
    return outputs.loss


def nothing(stand_ins: StandIns, card: Card) -> list[Patch]:
    return []


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss.

    ``head`` as above; ``finish``: what the trainer makes of the model's loss, outside of autocast. ``tiled``:
    never makes all logits, and so reads the head's weight instead of calling it. ``sft``: it is TRL's
    SFTTrainer's, which turns the cache of keys and values off, adds the routers' loss where the model weighs
    it, and casts adapters back to the base's bf16.

    Of the library's own code: ``library``: where it comes from; ``attach`` patches a model (PEFT's taken off)
    as its trainer does, and raises TraceError if it can't; ``loss_of`` is the loss that the trainer takes of
    a model, its forward as prepared, and a batch; ``patches`` are made while it is traced; ``answers`` are
    the values that its code asks for, by the function that asks.
    """

    head: Head
    finish: Callable[[Any], Tensor] = same
    tiled: bool = True
    sft: bool = False
    library: Library | None = None
    attach: Callable[[Any], None] = unpatched
    loss_of: Callable[[Any, Callable[..., Any], dict[str, Any]], Any] = of_outputs
    patches: Callable[[StandIns, Card], list[Patch]] = nothing
    answers: Mapping[str, Any] = field(default_factory=dict)


def find(name: str) -> Loss:
    """The loss of that name. Raises UnknownName."""
    loss: Loss = rooms.thing("losses", name, "LOSS", "loss")
    return loss
