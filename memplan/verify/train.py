"""memplan's plain loop: the reference step, some times over, on one batch, with proof that it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from memplan import losses, stacks
from memplan.asked.recipe import Batches, Recipe
from memplan.errors import MemplanError, reason, shown
from memplan.tape import Tape
from memplan.trace.losses import attach
from memplan.trace.optimizers import make_optimizer
from memplan.verify.checkpoint import Checkpoint, fetch
from memplan.verify.job import Job
from memplan.verify.made import Random, Source, build
from memplan.verify.measurement import Evidence, Step

Tell = Callable[[str, Any], None]

_CHUNK = 64 << 20  # bytes that a checksum looks at at once


class Backend(Protocol):
    """Where it trains, and how bytes are counted there. ``tape`` is the step that was recorded last,
    ``number`` that of the step that runs."""

    device: torch.device
    number: int
    tape: Tape | None

    def environment(self) -> AbstractContextManager[None]:
        """In force from the making of the model to the last step."""

    def uncounted(self) -> AbstractContextManager[None]:
        """What is allocated inside is no part of the step, where that can be told."""

    def step(
        self,
        number: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: dict[str, torch.Tensor],
        recipe: Recipe,
        last: bool,
    ) -> tuple[torch.Tensor, Step]:
        """Train a step, record it if it is the last; its loss and what it took."""


@dataclass(frozen=True, slots=True)
class Training:
    """What a run left."""

    steps: tuple[Step, ...]
    evidence: Evidence
    tape: Tape | None


def train(job: Job, backend: Backend, tell: Tell, steps: list[Step] | None = None) -> Training:
    """Build the model and train it. Whatever the libraries raise goes through; ``steps`` then has the steps
    that were done."""
    steps = [] if steps is None else steps
    recipe, run = job.recipe, job.run
    torch.manual_seed(run.seed)
    source = source_of(job)
    with backend.environment():
        tell("state", "building the model")
        model = build(job.model.config, recipe, backend.device, source)
        attach(model, losses.find(recipe.loss))
        del source
        optimizer = make_optimizer(model, recipe)
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate
        batch = {key: value.to(backend.device) for key, value in make_batch(job).items()}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        frozen = dict(frozen_tensors(model))
        before = checksums(trained), checksums(frozen)
        sound = _watch_gradients(optimizer, backend)
        for number in range(1, run.steps + 1):
            tell("state", f"step {number} of {run.steps}")
            began = time.perf_counter()
            loss, counters = backend.step(number, model, optimizer, batch, recipe, number == run.steps)
            steps.append(
                counters.model_copy(
                    update={
                        # the loop divides by the passes that it accumulates
                        "loss": finite(float(loss) * recipe.gradient_accumulation_steps),
                        "seconds": round(time.perf_counter() - began, 3),
                    }
                )
            )
            del loss
            tell("step", steps[-1].model_dump(mode="json"))
        tell("state", "checking that it trained")
        changed = count_changed(before[0], checksums(trained))
        frozen_changed = count_changed(before[1], checksums(frozen))
    first, last = (finite(steps[at].loss) for at in (0, -1))
    evidence = Evidence(
        first_loss=first,
        last_loss=last,
        trained_tensors=len(trained),
        changed_tensors=changed,
        frozen_tensors=len(frozen),
        frozen_changed=frozen_changed,
        gradients_finite=bool(sound) and all(sound),
    )
    return Training(tuple(steps), evidence, backend.tape)


def source_of(job: Job) -> Source:
    """Where the job's weights come from."""
    return Random() if job.model.weights == "random" else Checkpoint(fetch(job.model.weights))


def finite(loss: float | None) -> float | None:
    """A loss that is a number, else None. What the run took was measured all the same."""
    return loss if loss is not None and math.isfinite(loss) else None


# -- data --------------------------------------------------------------------------------------------------


def make_batch(job: Job) -> dict[str, torch.Tensor]:
    """What a collator hands over, on the host: int64 ids, mask and labels, from the seed or the text. Of
    padded batches, the first row lacks one token; in packed ones two sequences share a row."""
    recipe = job.recipe.as_fed()
    shape = (recipe.batch_size, recipe.seq_len)
    if job.run.text is None:
        generator = torch.Generator().manual_seed(job.run.seed)
        ids = torch.randint(0, int(job.model.config["vocab_size"]), shape, generator=generator)
    else:
        ids = _tokens(job, shape[0] * shape[1]).reshape(shape)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if recipe.batches is Batches.PADDED:
        batch["attention_mask"][0, -1] = 0
    if recipe.batches is Batches.PACKED:
        del batch["attention_mask"]
        batch["position_ids"] = torch.cat([torch.arange(length) for length in halves(shape[1])])[None]
        for name in stacks.find(recipe.trainer).packed or ():
            batch[name] = torch.zeros(shape if name == "seq_idx" else (2,), dtype=torch.int32)
    return batch


def halves(length: int) -> tuple[int, int]:
    """The lengths of two sequences that share a row."""
    return length - length // 2, length // 2


def _tokens(job: Job, count: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    where = job.model.weights if job.model.weights != "random" else job.model.hub_id
    text = Path(str(job.run.text))
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MemplanError(f"the text {shown(str(text))} can't be read: {reason(error)}") from None
    try:
        if where is None:
            raise FileNotFoundError
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception:  # whatever the Hub, its cache or a tokenizer's files raise
        raise MemplanError(
            f"there is no tokenizer for --text in {shown(str(where or job.model.name))}: "
            "give --weights with a folder that has one, or leave out --text"
        ) from None
    ids = tokenizer(words, truncation=True, max_length=count, return_tensors="pt")["input_ids"][0]
    if len(ids) < count:
        raise MemplanError(f"{shown(str(text))} has {len(ids)} tokens, but a batch needs {count}")
    return ids.to(torch.int64)


# -- evidence ----------------------------------------------------------------------------------------------


def frozen_tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Frozen parameters, and what bitsandbytes keeps beside them."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            for key in ("absmax", "code", "offset"):
                if getattr(state, key) is not None:
                    yield f"{name}.{key}{state.blocksize}", getattr(state, key)
            state = state.state2


def checksums(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """A checksum of each."""
    return {name: checksum(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """A number that changes when a tensor does: the sum of its bytes, eight at a time where that goes."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    total = 0
    for start in range(0, whole, _CHUNK):
        piece = flat[start : min(start + _CHUNK, whole)]
        total += int(piece.view(torch.int64).sum())
    return total + int(flat[whole:].sum(dtype=torch.int64))


def count_changed(before: dict[str, int], after: dict[str, int]) -> int:
    """How many checksums are others now."""
    return sum(before[name] != number for name, number in after.items())


def _watch_gradients(optimizer: torch.optim.Optimizer, backend: Backend) -> list[bool]:
    """Whether all gradients of the first step are finite; filled in when it comes. Later steps, which are
    the ones that count, are left alone."""
    found: list[bool] = []

    def look(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        with torch.no_grad(), backend.uncounted():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        found.append(bool(torch.linalg.vector_norm(parameter.grad).isfinite()))
        handle.remove()

    handle = optimizer.register_step_pre_hook(look)
    return found
