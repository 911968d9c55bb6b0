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

from memplan.asked.recipe import Mode, Recipe
from memplan.trace.build import DTYPES, base_model, prepare, quantize, with_kernels


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
        if recipe.mode is Mode.QLORA:
            quantize(model, recipe, linear_4bit)
            model.hf_quantizer = quantizer(recipe)
        source.check(model)
        materialise(model, device, source)
        model = with_kernels(prepare(model, recipe, data=True), recipe)
    model.train()
    return model


def quantizer(recipe: Recipe) -> Any:
    """transformers' own, which has done nothing here but which a Trainer asks whether it may train."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    return AutoHfQuantizer.from_config(
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quant_type.value,
            bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=DTYPES[recipe.dtype],
        )
    )


def linear_4bit(source: nn.Linear, recipe: Recipe) -> nn.Module:
    """The 4-bit layer in the place of ``source``, not quantised yet."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = {"compress_statistics": recipe.double_quant, "quant_type": recipe.quant_type.value}
    layer: nn.Module = Linear4bit(
        source.in_features,
        source.out_features,
        bias=False,
        compute_dtype=DTYPES[recipe.dtype],
        device="meta",
        **options,
    )
    weight = torch.empty(source.out_features, source.in_features, dtype=source.weight.dtype, device="meta")
    layer.weight = Params4bit(weight, requires_grad=False, module=layer, **options)
    layer.bias = source.bias
    if source.bias is not None:
        source.bias.requires_grad_(False)
    return layer


@torch.no_grad()
def materialise(model: nn.Module, device: torch.device, source: Source) -> None:
    """Give every parameter and buffer its data on the device, one after another, tied ones once."""
    from bitsandbytes.nn import Params4bit

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
            done[id(parameter)] = module._parameters[key] = _with_data(parameter, data)
            del data
        if new:
            model._init_weights(module)
        for parameter in module._parameters.values():
            if isinstance(parameter, Params4bit) and not parameter.bnb_quantized:
                parameter.to(device)  # quantises in place
                if device.type == "cuda":
                    # else later weights would be cut from what this one had in 16 bits, and hold all of it
                    torch.cuda.empty_cache()
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def _with_data(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    from bitsandbytes.nn import Params4bit

    if isinstance(parameter, Params4bit):
        weight: nn.Parameter = Params4bit(
            data,
            requires_grad=False,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            module=parameter.module,
        )
        return weight
    return nn.Parameter(data, parameter.requires_grad)
