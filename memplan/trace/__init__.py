"""The traced writer: the real transformers + PEFT + bitsandbytes step under fake tensors, on a CPU.

``trace(config, recipe)`` builds the model without data, runs one steady-state training step and records
every storage's birth and death as a :class:`memplan.tape.Tape`. Where the CPU's code allocates otherwise
than CUDA's, :mod:`memplan.trace.standins` does what CUDA does. ``record()`` is the recorder alone.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan.recipe import Recipe
from memplan.tape import Category, Phase, Tape
from memplan.trace import standins
from memplan.trace.build import build, without_swapping
from memplan.trace.recorder import Recorder, plain_name, record
from memplan.trace.step import make_batch, make_optimizer, train_step

__all__ = ["record", "trace"]


def trace(config: dict[str, Any], recipe: Recipe, *, compute_capability: tuple[int, int] = (8, 0)) -> Tape:
    """Record one steady-state training step of the model that ``config`` (a config.json) describes."""
    recipe = recipe.resolved()
    with FakeTensorMode(allow_non_fake_inputs=True), without_swapping():
        model = build(config, recipe)
        optimizer = make_optimizer(model, recipe)
        batch = make_batch(recipe, 0)
        warm_up(optimizer)
        recorder = Recorder(Tape(provenance="traced"), standins.OPERATORS)
        setup(recorder, model, optimizer, batch, compute_capability)
        recorder.on_module = Layers(recorder)
        with standins.patched(), recorder, recorder.follow(model):
            train_step(model, optimizer, batch, recipe, recorder)
        recorder.tape.finish()
        categorise(recorder)
        recorder.stop()
    return recorder.tape


def warm_up(optimizer: torch.optim.Optimizer) -> None:
    """A first optimizer step on made-up gradients, so that its states exist."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def setup(
    recorder: Recorder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    compute_capability: tuple[int, int],
) -> None:
    """Note what exists before the step."""
    tape = recorder.tape

    def adopt(tensor: Any, name: str, category: Category) -> None:
        if isinstance(tensor, torch.Tensor):
            recorder.born(tensor, name, category)

    recorder.begin(Phase.SETUP, "weights")
    for module_name, module in model.named_modules():
        tape.module = plain_name(module_name)
        for name, parameter in module.named_parameters(recurse=False):
            own = "lora_" in module_name or "modules_to_save" in module_name
            adopt(parameter, name, Category.ADAPTERS if own else Category.WEIGHTS)
            state = getattr(parameter, "quant_state", None)
            while state is not None:
                for key in ("absmax", "code", "offset"):
                    adopt(getattr(state, key), f"quant_state.{key}", Category.QUANTIZATION_STATE)
                state = state.state2
        for name, buffer in module.named_buffers(recurse=False):
            adopt(buffer, name, Category.WEIGHTS)
        for name in ("original_inv_freq",):
            adopt(getattr(module, name, None), name, Category.WEIGHTS)
    recorder.begin(Phase.SETUP, "optimizer_state")
    tape.module = ""
    for state in optimizer.state.values():
        for key, value in state.items():
            if key == "step" and not optimizer.defaults.get("fused"):
                continue  # on the host
            adopt(value, f"optimizer.{key}", Category.OPTIMIZER_STATE)
    recorder.begin(Phase.SETUP, "workspaces")
    for _ in range(2):  # the main thread's and autograd's
        tape.alloc(33554432 if compute_capability[0] >= 9 else 8519680, "cublas_workspace", Category.TEMPORARIES)
        recorder.born_in.append((Phase.SETUP, False))
        recorder.born_by.append(-1)
    recorder.begin(Phase.SETUP, "inputs")
    for name, tensor in batch.items():
        adopt(tensor, name, Category.TEMPORARIES)


class Layers:
    """Opens a segment whenever the step enters or leaves a decoder layer."""

    PATTERN = re.compile(r"\.layers\.(\d+)(?:\.|$)")

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __call__(self, module: str) -> None:
        if self.recorder.phase not in (Phase.FORWARD, Phase.BACKWARD):
            return
        found = self.PATTERN.search(module)
        layer = int(found[1]) if found else None
        here = self.recorder.tape.segments[-1]
        if layer != here.layer:
            if layer is not None:
                name = "layers"
            elif module.endswith("embed_tokens"):
                name = "embedding"
            else:
                name = "head"
            self.recorder.begin(self.recorder.phase, name, layer)


def categorise(recorder: Recorder) -> None:
    """Say what storages were for, from where they were born and when they died."""
    tape = recorder.tape
    first_head = head_node(recorder)
    forward_end = recorder.forward_end
    for index, (phase, grad) in enumerate(recorder.born_in):
        if tape.categories[index] is not Category.TEMPORARIES or phase is Phase.SETUP:
            continue
        died, died_grad = recorder.died_in.get(index, (None, False))
        module = tape.modules[index]
        if phase is Phase.FORWARD and module in HEAD_MODULES and past_decoder(recorder, index):
            tape.categories[index] = Category.LOGITS_AND_LOSS
        elif phase is Phase.BACKWARD and first_head < recorder.born_by[index] < forward_end and not grad:
            tape.categories[index] = Category.LOGITS_AND_LOSS
        elif (
            (phase is Phase.FORWARD and died is Phase.BACKWARD)
            or (phase is Phase.BACKWARD and grad and not (died is Phase.BACKWARD and died_grad))
        ):
            tape.categories[index] = Category.ACTIVATIONS


HEAD_MODULES = ("lm_head", "")


def head_node(recorder: Recorder) -> int:
    """The last autograd sequence number of the output layer itself in the forward."""
    numbers = [n for n, m in zip(recorder.boundaries[1:], recorder.boundary_modules) if m == "lm_head"]
    return numbers[0] - 1 if numbers else sys_max


sys_max = 1 << 62


def past_decoder(recorder: Recorder, index: int) -> bool:
    """Whether a storage was born after the last decoder layer of its forward."""
    return index >= recorder.head_from if recorder.head_from is not None else False
