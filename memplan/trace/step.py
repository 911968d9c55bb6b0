"""The reference step: what a Hugging Face training loop does with one batch, in steady state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from memplan.recipe import Mode, Optimizer, Recipe
from memplan.tape import Category, Phase
from memplan.trace.build import DTYPES
from memplan.trace.recorder import Recorder


def make_batch(recipe: Recipe, vocab_size: int) -> dict[str, torch.Tensor]:
    """What a collator hands over: int64 ids, mask and labels."""
    shape = (recipe.batch_size, recipe.seq_len)
    return {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "labels": torch.zeros(shape, dtype=torch.int64),
    }


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """As transformers' Trainer makes it, with its two groups of parameters (with and without decay)."""
    import re

    patterns = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = any(re.search(pattern, name.lower()) for pattern in patterns)
            (rest if plain else decay).append(parameter)
    groups = [{"params": decay}, {"params": rest}]
    if recipe.optimizer is Optimizer.ADAMW_TORCH_FUSED:
        return torch.optim.AdamW(groups, lr=1e-4, fused=True)
    if recipe.optimizer is Optimizer.ADAMW_TORCH:
        return torch.optim.AdamW(groups, lr=1e-4, foreach=True)
    if recipe.optimizer is Optimizer.SGD:
        return torch.optim.SGD(groups, lr=1e-4, momentum=recipe.momentum, foreach=True)
    raise NotImplementedError(recipe.optimizer)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    recipe: Recipe,
    recorder: Recorder | None = None,
) -> None:
    """Forward, backward, clipping, update. ``recorder`` is told where the step is."""

    def at(phase: Phase, name: str) -> None:
        if recorder is not None:
            recorder.begin(phase, name)

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(recipe.gradient_accumulation_steps):
        at(Phase.FORWARD, "forward")
        context: Any = nullcontext()
        if recipe.autocast:
            context = torch.autocast("cpu", DTYPES[recipe.dtype] if recipe.dtype.value != "float32" else torch.bfloat16)
        with context:
            outputs = model(**batch)
        loss = outputs.loss
        del outputs
        if recipe.gradient_accumulation_steps > 1:
            loss = loss / recipe.gradient_accumulation_steps
        at(Phase.BACKWARD, "backward")
        loss.backward()
        if recorder is not None:
            recorder.gradients(parameters)
    at(Phase.OPTIMIZER, "clip")
    if recipe.max_grad_norm:
        nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm, foreach=True)  # CUDA's default
    at(Phase.OPTIMIZER, "step")
    optimizer.step()
    at(Phase.OPTIMIZER, "zero_grad")
    optimizer.zero_grad(set_to_none=True)
