"""What is there before a step: weights, adapters, optimizer states, workspaces, the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from memplan.cuda.card import Card
from memplan.tape import Category, Part, Phase, Tape
from memplan.tape.modules import plain_name
from memplan.trace.optimizers import on_card


class Notes(Protocol):
    """Who is told of what is there; ``standins`` is not empty where a CPU stands for a card."""

    tape: Tape
    card: Card
    standins: dict[Any, Any]

    def begin(self, phase: Phase, name: str, layer: int | None = None, part: Part = Part.STEP) -> None: ...

    def born(self, tensor: torch.Tensor, operation: str, category: Category = ...) -> int | None: ...

    def reserve(
        self, nbytes: int, operation: str, category: Category, *, workspace: bool = False
    ) -> int | None: ...


def note_module(recorder: Notes, model: nn.Module) -> None:
    """Parameters, what bitsandbytes keeps beside them, buffers, and gradients that are there already."""
    tape = recorder.tape
    recorder.begin(Phase.SETUP, "weights", part=Part.LOADED)
    nested = False
    for module_name, module in model.named_modules():
        tape.module = plain_name(module_name)
        own = "lora_" in module_name or "modules_to_save" in module_name
        for name, parameter in module.named_parameters(recurse=False):
            recorder.born(parameter, name, Category.ADAPTERS if own else Category.WEIGHTS)
            if parameter.grad is not None:
                recorder.born(parameter.grad, f"{name}.grad", Category.GRADIENTS)
            state = getattr(parameter, "quant_state", None)
            while state is not None:
                nested = nested or state.nested
                for key in ("absmax", "code", "offset"):
                    if getattr(state, key) is not None:
                        recorder.born(getattr(state, key), f"quant_state.{key}", Category.QUANTIZATION_STATE)
                state = state.state2
        for name, buffer in module.named_buffers(recurse=False):
            recorder.born(buffer, name, Category.WEIGHTS)
        if hasattr(module, "long_inv_freq"):  # a plain attribute of longrope's
            recorder.born(module.long_inv_freq, "long_inv_freq", Category.WEIGHTS)
    tape.module = ""
    if nested:
        # name2qmap["dynamic"], made on the card by the first layer's double quantisation and kept
        # (bitsandbytes 0.50 functional.py quantize_blockwise)
        recorder.reserve(1024, "name2qmap", Category.QUANTIZATION_STATE)


def note_optimizer(recorder: Notes, optimizer: torch.optim.Optimizer) -> None:
    """States, as far as they are on the card, where a CPU stands for one (the recorder has stand-ins)."""
    recorder.begin(Phase.SETUP, "optimizer_state", part=Part.RESTING)
    for parameter, states in optimizer.state.items():
        for key, value in states.items():
            counts = not recorder.standins or on_card(optimizer, parameter, key)
            if counts and isinstance(value, torch.Tensor):
                recorder.born(value, f"optimizer.{key}", Category.OPTIMIZER_STATE)


def note_workspaces(recorder: Notes) -> None:
    """cuBLAS's, one a thread: the forward's and autograd's."""
    recorder.begin(Phase.SETUP, "workspaces", part=Part.RESTING)
    for _ in range(2):
        nbytes = recorder.card.cublas_workspace
        recorder.reserve(nbytes, "cublas_workspace", Category.TEMPORARIES, workspace=True)


def note_batch(recorder: Notes, batch: Any) -> None:
    """Tensors, alone or in mappings and sequences."""
    recorder.begin(Phase.SETUP, "batch", part=Part.RESTING)
    for tensor in tensors_in(batch):
        recorder.born(tensor, "batch", Category.ACTIVATIONS)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested mappings (tokenizers return their own kind) and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
