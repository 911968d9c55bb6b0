"""The reference step: what a Hugging Face training loop does with one batch, in steady state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from memplan import losses, stacks
from memplan.asked.recipe import Batches, DTypeName, Recipe
from memplan.parts.loop import Loop
from memplan.tape import Part, Phase

AUTOCAST_DTYPES = {
    # TrainingArguments(fp16=True); bf16=True for the rest
    DTypeName.FLOAT16: torch.float16,
    DTypeName.BFLOAT16: torch.bfloat16,
    DTypeName.FLOAT32: torch.bfloat16,
}


class Listener(Protocol):
    """Who is told where a step is: :class:`memplan.trace.recorder.Recorder`, for one."""

    def begin(self, phase: Phase, name: str, layer: int | None = None, part: Part = Part.STEP) -> None: ...

    def gradients(self, parameters: list[nn.Parameter]) -> None: ...


def make_batch(recipe: Recipe) -> dict[str, torch.Tensor]:
    """What a collator hands over: int64 ids, mask and labels; of packed batches, positions in the place of
    the mask, and what the trainer's collator says beside."""
    fed = recipe.as_fed()
    shape = (fed.batch_size, fed.seq_len)
    made = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "labels": torch.zeros(shape, dtype=torch.int64),
    }
    if recipe.batches is Batches.PACKED:
        made["position_ids"] = made.pop("attention_mask")
        for name in stacks.find(recipe.trainer).packed or ():
            size = shape if name == "seq_idx" else (2,)
            made[name] = torch.zeros(size, dtype=torch.int32)
    return made


def forward(model: nn.Module, recipe: Recipe, device: str) -> Callable[..., Any]:
    """``model``, or what ``Accelerator.prepare_model`` makes of its forward under mixed precision: autocast
    around it, and all 16-bit outputs, logits too, converted to fp32 (accelerate 1.15 accelerator.py)."""
    if not recipe.autocast:
        return model
    from accelerate.utils.operations import convert_outputs_to_fp32

    context = torch.autocast(device, dtype=AUTOCAST_DTYPES[recipe.dtype])
    wrapped: Callable[..., Any] = convert_outputs_to_fp32(context(model.__call__))
    return wrapped


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    recipe: Recipe,
    recorder: Listener | None = None,
    device: str = "cpu",
    loop: Loop[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Forward, backward, clipping, update. ``recorder`` is told where the step is; ``loop``: that of the
    Trainer whose step it is, which names what it makes. The loss of the last forward, which a Trainer keeps
    that long, too."""

    def at(phase: Phase, name: str, part: Part = Part.STEP) -> None:
        if recorder is not None:
            recorder.begin(phase, name, part=part)

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    run = forward(model, recipe, device)
    counts = loop is None or loop.counts
    if loop is not None and counts:
        batch = {**batch, "num_items_in_batch": loop.items}
    for _ in range(recipe.gradient_accumulation_steps):
        at(Phase.FORWARD, "embedding")
        loss = losses.find(recipe.loss).loss_of(model, run, batch)
        if not counts:
            loss = loss / recipe.gradient_accumulation_steps
        lost = None if loop is None else loss.detach()  # the name in Trainer.training_step
        if loop is not None or recipe.gradient_accumulation_steps > 1:
            loss = loss / recipe.gradient_accumulation_steps
        unscaled = loss
        if loop is not None and loop.scale is not None:
            loss = loss * loop.scale
        at(Phase.BACKWARD, "head")
        loss.backward()
        del unscaled
        # what Trainer.training_step returns; the graph goes with its frame
        loss = loss.detach() if lost is None else lost
        del lost
        if loop is not None:
            loop.backward(loss)
        if recorder is not None:
            recorder.gradients(parameters)
    at(Phase.OPTIMIZER, "clip")
    if loop is not None:
        loop.clipping()
        loop.clipped(nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf))
    elif recipe.max_grad_norm:
        nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
    at(Phase.OPTIMIZER, "step", Part.UPDATE)
    optimizer.step()
    if loop is not None:
        loop.updated()
    at(Phase.OPTIMIZER, "zero_grad")
    optimizer.zero_grad(set_to_none=True)
    result: torch.Tensor = loss
    return result
