"""What is there before a step: weights, adapters, optimizer states, workspaces, the batch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from memplan.asked.recipe import Recipe
from memplan.cuda.card import Card
from memplan.parts.loop import MODULE, WAITING, Loop, waiting
from memplan.tape import Category, Part, Phase, Tape
from memplan.tape.modules import plain_name
from memplan.trace.optimizers import on_card
from memplan.weights import Brought

_WRAPPERS = re.compile(r"\.(?:base_layer|original_module)(?=\.|$)")  # PEFT's, around what it adapts
# what a quantised weight keeps: bitsandbytes' attributes, and its names for them in checkpoints
_STATE = {"absmax": "absmax", "code": "quant_map", "offset": "offset"}


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


def note_module(recorder: Notes, model: nn.Module, *, stored: bool = False) -> list[Brought]:
    """Parameters, what bitsandbytes keeps beside them, buffers, and gradients that are there already: all but
    these, as they were brought here. ``stored``: the checkpoint has the weights quantised already."""
    tape, brought = recorder.tape, []

    def bring(tensor: torch.Tensor, operation: str, name: str, category: Category, made: bool) -> None:
        before = len(tape.sizes)
        index = recorder.born(tensor, operation, category)
        if index is not None and index >= before:  # no second name of a tensor that is there
            brought.append(
                Brought(index, _WRAPPERS.sub("", f"{tape.module}.{name}").lstrip("."), category, made)
            )

    recorder.begin(Phase.SETUP, "weights", part=Part.LOADED)
    nested = False
    for module_name, module in model.named_modules():
        tape.module = plain_name(module_name)
        own = "lora_" in module_name or "modules_to_save" in module_name
        for name, parameter in module.named_parameters(recurse=False):
            bring(parameter, name, name, Category.ADAPTERS if own else Category.WEIGHTS, made=False)
            if parameter.grad is not None:
                recorder.born(parameter.grad, f"{name}.grad", Category.GRADIENTS)
            state, level = quant_state(module, name), ""
            while state is not None:
                nested = nested or state.nested
                for key, known in _STATE.items():
                    if getattr(state, key) is not None:
                        kind = Category.QUANTIZATION_STATE
                        bring(getattr(state, key), f"quant_state.{key}", level + known, kind, made=False)
                state, level = state.state2, "nested_"
        for name, buffer in module.named_buffers(recurse=False):
            made = name in module._non_persistent_buffers_set
            bring(buffer, name, name, Category.WEIGHTS, made)
        if hasattr(module, "long_inv_freq"):  # a plain attribute of longrope's
            bring(module.long_inv_freq, "long_inv_freq", "long_inv_freq", Category.WEIGHTS, made=True)
    tape.module = ""
    if nested and not stored:
        # name2qmap["dynamic"], made on the card by the first layer's double quantisation and kept
        # (bitsandbytes 0.50 functional.py quantize_blockwise)
        index = recorder.reserve(1024, "name2qmap", Category.QUANTIZATION_STATE)
        if index is not None:
            brought.append(Brought(index, "bitsandbytes", Category.QUANTIZATION_STATE, made=True))
    return brought


def quant_state(module: nn.Module, name: str) -> Any:
    """What bitsandbytes keeps beside a parameter; of one that is sharded, the layer alone has it."""
    own = getattr(getattr(module, name), "quant_state", None)
    return own if own is not None or name != "weight" else getattr(module, "quant_state", None)


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


def note_loop(recorder: Notes, recipe: Recipe, *, counts: bool = True) -> Loop[torch.Tensor]:
    """What a Trainer's loop names when a step begins, all but batches; ``counts`` as the loop has it."""
    recorder.begin(Phase.SETUP, "loop", part=Part.RESTING)

    def one(name: str) -> torch.Tensor:
        number = torch.zeros(())
        recorder.born(number, name, Category.TEMPORARIES)
        return number

    recorder.tape.module = MODULE
    loop = Loop(recipe, one, counts=counts)
    recorder.tape.module = ""
    return loop


def note_waiting(recorder: Notes, batch: Any, count: int) -> None:
    """Batches like the one that there is, which wait to be trained on."""
    for nbytes in waiting([tensor.nbytes for tensor in tensors_in(batch)], count):
        recorder.reserve(nbytes, WAITING, Category.ACTIVATIONS)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested mappings (tokenizers return their own kind) and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
