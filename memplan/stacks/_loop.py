"""What the Hugging Face Trainer's loop, in which every trainer here runs its steps, keeps on the card beside
the step itself.

Read in transformers 5.23 (`trainer.py`), and the same in 5.20 and 5.6, and seen in dry runs of all four
trainers, on their tapes (``memplan dry-run --tape``). ``_run_epoch`` names the loss of the backward pass
before and the norm of the step before until it has new ones, ``get_batch_samples`` fetches the batches of all
backward passes of a step at once, and each of these numbers has a block of 512 bytes. What more a trainer's
own code keeps is in its :attr:`memplan.stacks.Stack.keeps`.

A step without all this, as memplan's verifier takes it, is played, too: what was measured of such steps is
held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from memplan import stacks
from memplan.tape import rounded

One = TypeVar("One")

KEPT: Mapping[str, str] = {
    "tr_loss": "transformers, `trainer.py`, `_inner_training_loop`: the sum of losses until it is logged",
    "tr_loss_step": "`_run_epoch`: the loss of the backward pass before, until the next one has been made",
    "grad_norm": "`_run_epoch`: the norm of the step before, until clipping; then the new one",
    "num_items_in_batch": "`_get_num_items_in_batch`: the labels that count in the batches of a step",
}
DIVIDED = (
    "accelerate, `accelerator.py`, `Accelerator.backward`: the loss over its own accumulation steps, of which "
    "the Trainer has it make one; the loss itself stays, in `Trainer.training_step`"
)
BATCHES = "`get_batch_samples`: all batches of a step, fetched before its first forward pass"

MODULE, WAITING = "Trainer", "waiting batch"  # on the tape: the module of its numbers; an operation
_APART = 256  # batches that wait, each in blocks of its own; what is beyond them, in one of each kind


class Loop(Generic[One]):
    """The names of a Trainer's loop when a step begins; what they hold stays on the card. ``one`` puts a
    number there, by its name."""

    def __init__(self, trainer: str, one: Callable[[str], One]) -> None:
        self._held: dict[str, One | None] = {name: one(name) for name in (*KEPT, *stacks.find(trainer).keeps)}

    def backward(self, loss: One) -> None:
        """A backward pass has been made of this loss."""
        self._held["tr_loss_step"] = loss

    def clipping(self) -> None:
        """Norms are about to be computed; the Trainer has them also where it does not clip."""
        self._held["grad_norm"] = None

    def clipped(self, norm: One) -> None:
        """This is the norm of all gradients."""
        self._held["grad_norm"] = norm


def waiting(batch: Sequence[int], count: int) -> Iterator[int]:
    """Bytes of the blocks of ``count`` batches that wait beside the one of these tensors."""
    for _ in range(min(count, _APART)):
        yield from batch
    if count > _APART:
        yield from ((count - _APART) * rounded(nbytes) for nbytes in batch)
