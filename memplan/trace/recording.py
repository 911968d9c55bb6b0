"""A step of one's own: ``record()`` around any training step, of any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memplan.cuda.card import Card
from memplan.tape import Part, Phase, Tape
from memplan.tape.categories import categorise
from memplan.trace import existing, standins
from memplan.trace.layers import Segments
from memplan.trace.recorder import Recorder


@contextmanager
def record(*there: Any, card: Card | None = None) -> Iterator[Tape]:
    """Record the training step that runs inside; the tape is complete when the context ends.

    ``there`` is what exists before the step and takes memory: modules, optimizers, tensors, mappings and
    sequences of tensors. Record a second step, for the first one makes the optimizer's state::

        with FakeTensorMode():
            model, optimizer, batch = ...
            step()
            with record(model, optimizer, batch) as tape:
                step()
        print(replay(tape))

    Under fake tensors the tape is what CUDA would allocate on ``card``, as that of
    :func:`memplan.trace.trace`. On a real device it is what operators return there: scratch memory inside
    their kernels is not seen. Phases follow from calls: a module of ``there`` runs forward,
    ``torch.autograd`` backward, and what comes after backward is the optimizer's.
    """
    modules = [item for item in there if isinstance(item, nn.Module)]
    optimizers = [item for item in there if isinstance(item, torch.optim.Optimizer)]
    others = [item for item in there if not isinstance(item, nn.Module | torch.optim.Optimizer)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    tensors += existing.tensors_in(others)
    fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
    card = card or Card()
    recorder = (
        Recorder(Tape(provenance="traced"), standins.OPERATORS, card, standins.ANSWERS)
        if fake
        else Recorder(Tape(provenance="traced"), card=card)
    )
    # a GPU's memory is asked about, not the host's beside it
    recorder.device = next((tensor.device.type for tensor in tensors if tensor.device.type != "cpu"), None)
    for module in modules:
        existing.note_module(recorder, module)
    for optimizer in optimizers:
        existing.note_optimizer(recorder, optimizer)
    if fake:
        existing.note_workspaces(recorder)
    existing.note_batch(recorder, others)
    recorder.on_module = Segments(recorder)
    with ExitStack() as stack:
        if fake:
            stack.enter_context(standins.in_force(card))
        for module in modules:
            stack.enter_context(recorder.follow(module))
        stack.enter_context(phases(recorder, modules))
        stack.enter_context(recorder)
        recorder.begin(Phase.FORWARD, "forward")
        yield recorder.tape
    recorder.finish()
    categorise(recorder)


@contextmanager
def phases(recorder: Recorder, modules: list[nn.Module]) -> Iterator[None]:
    """Tell forward, backward and optimizer apart by what is called."""
    running = 0  # backward within backward: reentrant checkpointing

    def backward(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal running
            if not running:
                recorder.begin(Phase.BACKWARD, "backward")
            running += 1
            try:
                return function(*args, **kwargs)
            finally:
                running -= 1
                if not running:
                    recorder.gradients(parameter for module in modules for parameter in module.parameters())
                    recorder.begin(Phase.OPTIMIZER, "optimizer", part=Part.UPDATE)

        return wrapped

    def forward(module: nn.Module, _args: Any) -> None:
        if recorder.phase is Phase.OPTIMIZER and module in modules:
            recorder.begin(Phase.FORWARD, "forward")

    handles = [nn.modules.module.register_module_forward_pre_hook(forward)]
    with (
        mock.patch.object(torch.autograd, "backward", backward(torch.autograd.backward)),
        mock.patch.object(torch.autograd, "grad", backward(torch.autograd.grad)),
    ):
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
