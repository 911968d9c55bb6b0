"""The model with data: real transformers modules, real 4-bit layers, real adapters.

Every weight is made in its final form where it stays. The module tree is built without storage ("meta");
then one parameter after another gets its data on the device, and a 4-bit one is quantised before the next
is made. So the most that is there in 16 bits at a time is one weight, on the card, and nothing on the host.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import nn

from memplan import weights
from memplan.asked.recipe import Recipe
from memplan.trace.modules import base_model, prepare, quantize, with_kernels
from memplan.weights import Quantised


class Source(Protocol):
    """Where weights come from."""

    def check(self, model: nn.Module) -> None:
        """Raise MemplanError unless there is a tensor of the right shape for every parameter of ``model``,
        which has no data yet."""

    def tensor(self, name: str, parameter: nn.Parameter, device: torch.device) -> torch.Tensor | None:
        """The parameter's data on the device, or None: whatever the library initialises it with."""


class Random:
    """Random weights, as transformers initialises a new model."""

    def check(self, model: nn.Module) -> None:
        """Nothing can be missing."""

    def tensor(self, name: str, parameter: nn.Parameter, device: torch.device) -> torch.Tensor | None:
        """None."""
        return None


def build(config: dict[str, Any], recipe: Recipe, device: torch.device, source: Source) -> nn.Module:
    """The model as a Trainer would get it, with data. ``recipe`` is resolved."""
    from accelerate import init_empty_weights

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries deprecate is for those who call them
        with init_empty_weights(include_buffers=False):  # buffers are small, and computed
            model = base_model(config, recipe)
        model.tie_weights()  # parameters that were registered anew lost their ties
        form = weights.of(recipe)
        if form is not None:
            quantize(model, recipe, form, form.real)
            model.hf_quantizer = form.quantizer(
                recipe
            )  # has done nothing here; a Trainer asks whether it may train
        source.check(model)
        materialise(model, device, source, form)
        model = with_kernels(prepare(model, recipe, data=True), recipe)
    model.train()
    return model


@torch.no_grad()
def materialise(model: nn.Module, device: torch.device, source: Source, form: Quantised | None) -> None:
    """Give every parameter and buffer its data on the device, one after another, tied ones once."""
    done: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []  # so that no address is used twice while ``done`` knows it
    for module_name, module in model.named_modules():
        new = False
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) in done:
                module._parameters[key] = done[id(parameter)]
                continue
            kept.append(parameter)
            name = f"{module_name}.{key}" if module_name else key
            given = source.tensor(name, parameter, device)
            new = new or given is None
            data = torch.empty_like(parameter, device=device) if given is None else given
            del given
            done[id(parameter)] = module._parameters[key] = _with_data(parameter, data, form)
            del data
        if new:
            model._init_weights(module)
        for parameter in module._parameters.values():
            quantised = form is not None and parameter is not None and form.finish(parameter, device)
            if quantised and device.type == "cuda":
                # else later weights would be cut from what this one had in 16 bits, and hold all of it
                torch.cuda.empty_cache()
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def _with_data(parameter: nn.Parameter, data: torch.Tensor, form: Quantised | None) -> nn.Parameter:
    quantised = None if form is None else form.with_data(parameter, data)
    return nn.Parameter(data, parameter.requires_grad) if quantised is None else quantised
