"""What the Hugging Face Trainer's loop, in which every trainer of ``memplan.stacks`` runs its steps, keeps on
the card beside the step itself.

Read in transformers 5.23 (`trainer.py`), and the same in 5.20 and 5.6, and seen in dry runs of all four
trainers, on their tapes (``memplan dry-run --tape``). Each number has a block of 512 bytes. The loss of a
backward pass is there three times: as the model made it (`training_step`), divided by accelerate
(`accelerator.py`, `Accelerator.backward`), and that of the backward pass before. What more a trainer's own
code keeps is in its :attr:`memplan.stacks.Stack.keeps`.

A step without all this, as memplan's verifier takes it, is played, too: what was measured of such steps is
held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from memplan import stacks
from memplan.asked.recipe import DTypeName, Recipe
from memplan.tape import rounded

One = TypeVar("One")

# The names of numbers, and where they are. All but `found_inf` are there when a step begins, from the second
# step on; the first one makes the loss and the norm that "the one before" has left.
ITEMS = "num_items_in_batch"
_TRAINER, _SCALER = "transformers, `trainer.py`, ", "torch, `amp/grad_scaler.py`, `GradScaler`, "
KEPT: Mapping[str, str] = {
    "_tr_loss": f"{_TRAINER}`_inner_training_loop`: the sum of losses until it is logged",
    "tr_loss_step": f"{_TRAINER}`_run_epoch`: the loss of the backward pass before, until there is a new one",
    "grad_norm": f"{_TRAINER}`_run_epoch`: the norm of the step before, until clipping; then the new one; "
    "where nothing is clipped, too (`_get_grad_norm`)",
    ITEMS: f"{_TRAINER}`_get_num_items_in_batch`: labels that count in a step; losses are divided by it",
}
SCALER: Mapping[str, str] = {
    "_scale": f"{_SCALER}with fp16: by which each loss is multiplied",
    "_growth_tracker": f"{_SCALER}with fp16",
    "found_inf": f"{_SCALER}`unscale_`, with fp16: until the update has been made",
}
BATCHES = f"{_TRAINER}`get_batch_samples`: all batches of a step, before its first forward pass"

MODULE, WAITING = "Trainer", "waiting batch"  # on the tape: the module of the numbers; an operation
_APART = 256  # batches that wait, each in blocks of its own; what is beyond them, in one of each kind


class Loop(Generic[One]):
    """The names of a Trainer's loop when a step of ``recipe`` begins; what they hold stays on the card.
    ``one`` puts a number there, by its name; ``counts``: the model takes the number that losses are divided
    by (``accepts_loss_kwargs``), else each loss is divided by the passes of a step once more."""

    def __init__(self, recipe: Recipe, one: Callable[[str], One], *, counts: bool = True) -> None:
        self._one = one
        self.counts = counts
        self._held: dict[str, One | None] = {name: one(name) for name in kept(recipe, counts=counts)}

    @property
    def items(self) -> One | None:
        """By what losses are divided."""
        return self._held.get(ITEMS)

    @property
    def scale(self) -> One | None:
        """By what losses are multiplied before their backward pass, if they are."""
        return self._held.get("_scale")

    def backward(self, loss: One) -> None:
        """A backward pass has been made of this loss."""
        self._held["tr_loss_step"] = loss

    def clipping(self) -> None:
        """Norms are about to be computed."""
        self._held["grad_norm"] = None
        if self.scale is not None:
            self._held["found_inf"] = self._one("found_inf")

    def clipped(self, norm: One) -> None:
        """This is the norm of all gradients."""
        self._held["grad_norm"] = norm

    def updated(self) -> None:
        """The optimizer has made its step."""
        self._held.pop("found_inf", None)


def kept(recipe: Recipe, *, counts: bool = True) -> list[str]:
    """The names of the numbers that are there when a step begins. The norm of gradients that the host has is
    a number of the host's."""
    absent = {"grad_norm" if recipe.offload is not None else "", "" if counts else ITEMS}
    on_card = [name for name in KEPT if name not in absent]
    fp16 = recipe.autocast and recipe.dtype is DTypeName.FLOAT16
    scaler = ("_scale", "_growth_tracker") if fp16 else ()
    return [*on_card, *stacks.find(recipe.trainer).keeps, *scaler]


def waiting(batch: Sequence[int], count: int) -> Iterator[int]:
    """Bytes of the blocks of ``count`` batches that wait beside the one of these tensors."""
    for _ in range(min(count, _APART)):
        yield from batch
    if count > _APART:
        yield from ((count - _APART) * rounded(nbytes) for nbytes in batch)
