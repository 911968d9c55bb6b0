"""The traced writer: the real transformers + PEFT + bitsandbytes step under fake tensors, on a CPU.

``trace(config, recipe)`` builds the model without data, runs one steady-state training step and records
every storage's birth and death as a :class:`memplan.tape.Tape`. Where the CPU's code allocates otherwise
than CUDA's, :mod:`memplan.trace.standins` does what CUDA does. ``record()`` is the recorder alone.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan.card import Card
from memplan.errors import MemplanError, TraceError
from memplan.recipe import Loss, Recipe
from memplan.tape import Category, Phase, Tape
from memplan.trace import standins
from memplan.trace.build import build, fake_modules
from memplan.trace.categories import categorise
from memplan.trace.layers import Segments
from memplan.trace.optimizers import make_optimizer, on_card, warm_up
from memplan.trace.recorder import Recorder, plain_name, record
from memplan.trace.step import make_batch, train_step

__all__ = ["record", "trace"]


def trace(config: dict[str, Any], recipe: Recipe, *, compute_capability: tuple[int, int] = (8, 0)) -> Tape:
    """Record one steady-state training step of the model that ``config`` (a config.json) describes.

    Raises TraceError if the model or the recipe can't be traced.
    """
    recipe = recipe.resolved()
    if recipe.loss is not Loss.STANDARD:
        raise TraceError(
            f"the loss {recipe.loss.value!r} runs kernels of its own, which a CPU can't trace: use 'standard'"
        )
    card = Card(compute_capability)
    recorder = Recorder(Tape(provenance="traced"), standins.OPERATORS, card, standins.ANSWERS)
    with quiet(), standins.in_force(card), FakeTensorMode(allow_non_fake_inputs=True), fake_modules():
        try:
            _play(recorder, config, recipe)
        except MemplanError:
            raise
        except Exception as error:  # whatever the libraries raise at a model that they can't run
            where = f" in {recorder.tape.module}" if recorder.tape.module else ""
            reason = str(error).strip().partition("\n")[0]
            raise TraceError(f"can't trace this model{where}: {type(error).__name__}: {reason}") from error
    categorise(recorder)
    return recorder.tape


def _play(recorder: Recorder, config: dict[str, Any], recipe: Recipe) -> None:
    model = build(config, recipe)
    optimizer = make_optimizer(model, recipe)
    batch = make_batch(recipe)
    warm_up(optimizer)
    setup(recorder, model, optimizer, batch)
    recorder.on_module = Segments(recorder)
    # Nothing that a step leaves waits for the garbage collector, which would come at an arbitrary moment.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with recorder, recorder.follow(model):
            train_step(model, optimizer, batch, recipe, recorder)
    finally:
        if collecting:
            gc.enable()
    recorder.finish()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from advising on a training that nobody runs."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def setup(
    recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> None:
    """Note what exists before the step: weights, adapters, optimizer states, cuBLAS workspaces, the batch."""
    tape = recorder.tape
    recorder.begin(Phase.SETUP, "weights")
    quantised = False
    for module_name, module in model.named_modules():
        tape.module = plain_name(module_name)
        own = "lora_" in module_name or "modules_to_save" in module_name
        for name, parameter in module.named_parameters(recurse=False):
            recorder.born(parameter, name, Category.ADAPTERS if own else Category.WEIGHTS)
            state = getattr(parameter, "quant_state", None)
            while state is not None:
                quantised = quantised or state.nested
                for key in ("absmax", "code", "offset"):
                    if getattr(state, key) is not None:
                        recorder.born(getattr(state, key), f"quant_state.{key}", Category.QUANTIZATION_STATE)
                state = state.state2
        for name, buffer in module.named_buffers(recurse=False):
            recorder.born(buffer, name, Category.WEIGHTS)
    tape.module = ""
    if quantised:
        # name2qmap["dynamic"], made on the card by the first layer's double quantisation and kept
        # (bitsandbytes 0.50 functional.py quantize_blockwise)
        recorder.reserve(1024, "name2qmap", Category.QUANTIZATION_STATE)
    recorder.begin(Phase.SETUP, "optimizer_state")
    for parameter, states in optimizer.state.items():
        for key, value in states.items():
            if isinstance(value, torch.Tensor) and on_card(optimizer, parameter, key):
                recorder.born(value, f"optimizer.{key}", Category.OPTIMIZER_STATE)
    recorder.begin(Phase.SETUP, "workspaces")
    for _ in range(2):  # one a thread: the forward's and autograd's
        recorder.reserve(recorder.card.cublas_workspace, "cublas_workspace", Category.TEMPORARIES)
    recorder.begin(Phase.SETUP, "inputs")
    for name, tensor in batch.items():
        recorder.born(tensor, name, Category.ACTIVATIONS)
