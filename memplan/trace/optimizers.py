"""The optimizer as transformers' Trainer makes it, and what of its state lies on the card."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memplan import optimizers
from memplan.asked.recipe import Recipe

# transformers 5 trainer.py get_decay_parameter_names
_NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """The Trainer's two groups: with weight decay and without."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = any(re.search(pattern, name.lower()) for pattern in _NO_DECAY)
            (rest if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """``Trainer.create_optimizer`` (transformers 5 trainer.py, trainer_optimizer.py)."""
    return optimizers.find(recipe.optimizer).real(groups(model), model, recipe)


def on_card(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, key: str) -> bool:
    """Whether a state is in the card's memory."""
    if key == "step":
        # _init_group: made on the parameter's device by fused optimizers, on the host by the others
        return bool(optimizer.defaults.get("fused"))
    if key in ("state1", "state2") and getattr(optimizer, "is_paged", False):
        # bitsandbytes 0.50 optim/optimizer.py get_state_buffer: large states are in managed memory, which
        # PyTorch's allocator never sees
        return parameter.numel() < 1e5
    return True


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Lets optimizers choose on a CPU what they choose on CUDA: ``foreach`` unless told otherwise
    (torch/optim/optimizer.py ``_default_to_fused_or_foreach``)."""
    import bitsandbytes
    from torch.optim import optimizer as base

    with (
        # a singleton that would remember this model's parameters
        mock.patch.object(bitsandbytes.optim.GlobalOptimManager, "_instance", None),
        mock.patch.object(base, "_get_foreach_kernels_supported_devices", return_value=["cpu"]),
    ):
        yield


@contextmanager
def fake_safe() -> Iterator[None]:
    """:func:`as_on_cuda`, on fake tensors, whose values optimizers may not ask for."""
    import bitsandbytes
    from torch.optim import adam
    from torch.optim import optimizer as base
    from torch.utils import _foreach_utils

    def code_of_256(*_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(256)

    def step_count(_value: Any) -> float:
        return 2.0  # on the host: any number past the first step

    with ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(bitsandbytes.functional, "create_dynamic_map", code_of_256))
        stack.enter_context(as_on_cuda())
        stack.enter_context(patch(adam, "_get_value", step_count))
        for module in (base, _foreach_utils):
            types = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(patch(module, "_foreach_supported_types", types))
        yield


def warm_up(optimizer: torch.optim.Optimizer, without: Container[nn.Parameter] = ()) -> None:
    """A first step on made-up gradients, so that the states exist, of all parameters but those that get
    none."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in without:
                parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
