"""The traced writer: the real transformers + PEFT + bitsandbytes step under fake tensors, on a CPU.

``trace(config, recipe)`` builds the model without data, runs one steady-state training step and records
every storage's birth and death as a :class:`memplan.tape.Tape`. Where the CPU's code allocates otherwise
than CUDA's, :mod:`memplan.trace.standins` does what CUDA does. ``record()`` does the same around a step of
one's own.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan import losses as kinds
from memplan.asked.recipe import Mode, Recipe
from memplan.cuda.card import Card
from memplan.errors import MemplanError, TraceError
from memplan.tape import Phase, Tape
from memplan.tape.categories import categorise
from memplan.trace import existing, losses, standins
from memplan.trace.layers import Segments
from memplan.trace.modules import as_built, base_model, count, dressed, fake_modules
from memplan.trace.optimizers import make_optimizer, warm_up
from memplan.trace.pictures import pictures_of, unseen
from memplan.trace.recorder import Recorder
from memplan.trace.recording import record
from memplan.trace.step import make_batch, train_step
from memplan.weights import Brought

__all__ = ["Traced", "record", "trace", "trace_model"]

Progress = Callable[[Phase, "int | None"], None]


@dataclass(frozen=True, slots=True)
class Traced:
    """A traced step: the recipe as it was run, the model's class, its parameters (tied ones once), and what
    loading brings: the shapes of the base model's parameters by name, and the storages of the tape that they
    and all else become."""

    tape: Tape
    recipe: Recipe
    architecture: str
    parameters: int
    trainable: int
    shapes: dict[str, tuple[int, ...]]
    brought: tuple[Brought, ...]


def trace(config: dict[str, Any], recipe: Recipe, *, compute_capability: tuple[int, int] = (8, 0)) -> Tape:
    """The tape of :func:`trace_model`."""
    return trace_model(config, recipe, compute_capability=compute_capability).tape


def trace_model(
    config: dict[str, Any],
    recipe: Recipe,
    *,
    compute_capability: tuple[int, int] = (8, 0),
    progress: Progress | None = None,
    stored: bool = False,
    looped: bool = False,
) -> Traced:
    """Record one steady-state training step of the model that ``config`` (a config.json) describes.

    ``progress`` is told each phase and layer that the step comes to; ``stored``: the checkpoint has the
    weights in 4 bits already; ``looped``: a Trainer's loop is around the step, and keeps what memplan says
    that it does (:mod:`memplan.parts.loop`). Raises TraceError if the model or the recipe can't be traced.
    """
    with quiet():
        recipe = as_built(config, recipe.resolved())
    card = Card(compute_capability)
    loss = kinds.find(recipe.loss)
    answers = {**standins.ANSWERS, **standins.OF_BATCHES[recipe.batches], **loss.answers}
    recorder = Recorder(Tape(provenance="traced"), standins.OPERATORS, card, answers)
    recorder.on_segment = progress
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(standins.in_force(card))
        stack.enter_context(losses.in_force(loss, card))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(fake_modules())
        try:
            base = base_model(config, recipe)
            shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
            model = dressed(base, recipe)
            losses.attach(model, loss)
            brought = _play(recorder, model, recipe, stored, looped)
        except MemplanError:
            raise
        except Exception as error:  # whatever the libraries raise at a model that they can't run
            reason = " ".join(str(error).split())[:200] or "no reason given"
            where = recorder.place_of(error)
            raise TraceError(f"can't trace this model{where}: {type(error).__name__}: {reason}") from error
    categorise(recorder)
    return Traced(recorder.tape, recipe, type(base).__name__, *count(model), shapes, tuple(brought))


def _play(recorder: Recorder, model: nn.Module, recipe: Recipe, stored: bool, looped: bool) -> list[Brought]:
    optimizer = make_optimizer(model, recipe)
    base: Any = model if recipe.mode is Mode.FULL else model.get_base_model()
    counts = getattr(base, "accepts_loss_kwargs", True)
    pictures = pictures_of(base, recipe)
    batch = make_batch(recipe) if pictures is None else pictures.batch(make_batch(recipe), recorder.known)
    warm_up(optimizer, unseen(base, recipe))
    brought = existing.note_module(recorder, model, stored=stored)
    existing.note_optimizer(recorder, optimizer)
    existing.note_workspaces(recorder)
    loop = existing.note_loop(recorder, recipe, counts=counts) if looped else None
    existing.note_batch(recorder, batch)
    if pictures is not None:
        existing.note_batch(recorder, pictures.after_a_step(base))
    if looped:
        existing.note_waiting(recorder, batch, recipe.gradient_accumulation_steps - 1)
    recorder.on_module = Segments(recorder)
    tiled = kinds.find(recipe.loss).tiled
    # Nothing that a step leaves waits for the garbage collector, which would come at an arbitrary moment.
    collecting = gc.isenabled()
    gc.disable()
    try:
        # a tiled loss never calls the output layer: there, the head begins where the decoder ends
        with recorder, recorder.follow(model, decoder=base.base_model_prefix if tiled else None):
            train_step(model, optimizer, batch, recipe, recorder, loop=loop)
    finally:
        if collecting:
            gc.enable()
    recorder.finish()
    return brought


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers and Liger-Kernel from advising on a training that nobody runs, and torch from
    printing the traceback of an operator that refuses fake tensors: the error itself says which."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    fake_tensors = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, fake_tensors.disabled = fake_tensors.disabled, True
    liger = logging.getLogger("liger_kernel")
    level = liger.level
    liger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        liger.setLevel(level)
        fake_tensors.disabled = disabled
        transformers_logging.set_verbosity(verbosity)
