"""``apply(model)`` and ``remove(model)``: the kernels in a PEFT + bitsandbytes model, and out of it."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memplan.errors import KernelError
from memplan.kernels.launch import refusal
from memplan.kernels.weight import check_code, weight_of


def apply(model: nn.Module) -> int:
    """Let the model's NF4 layers, with PEFT's adapters or without, run on memplan's kernels; how many now do.

    Parameters and whatever is saved stay as they are. Layers that the kernels are not made for (DoRA, several
    or special adapters, hooks) stay the library's, with one warning that counts them. Raises KernelError
    where nothing can be done: no NF4 layer, no Triton, a GPU too old.
    """
    from memplan.kernels.layers import OURS

    ours = tuple(OURS.values())
    skipped: Counter[str] = Counter()
    for module, base in list(_layers(model)):
        if type(module) in ours:
            continue
        reason = _unfit(module, base)
        if reason:
            skipped[reason] += 1
        else:
            module.__class__ = OURS[type(module)]
    count = sum(type(module) in ours for module in model.modules())
    if not count:
        reasons = "; ".join(skipped) or "it has no 4-bit layers of bitsandbytes"
        raise KernelError(f"nothing in this model can run on memplan's kernels: {reasons}")
    if skipped:
        told = "; ".join(f"{number} layers: {reason}" for reason, number in skipped.items())
        warnings.warn(f"some layers stay as they are: {told}", stacklevel=2)
    return count


def remove(model: nn.Module) -> int:
    """Undo :func:`apply`; how many layers were put back."""
    from memplan.kernels.layers import OURS

    theirs = {ours: library for library, ours in OURS.items()}
    count = 0
    for module in model.modules():
        if type(module) in theirs:
            module.__class__ = theirs[type(module)]
            count += 1
    return count


def _layers(model: nn.Module) -> Any:
    """The 4-bit layers, each with the one that has the weight; a layer under adapters that are not ours to
    replace is left out with them.
    """
    from memplan.kernels.layers import Linear4bit, LoraLinear4bit, _plain_lora

    unfit = set()
    for module in model.modules():
        if isinstance(module, LoraLinear4bit):
            yield module, module.get_base_layer()
            if not _plain_lora(module):
                unfit.add(module.get_base_layer())
    for module in model.modules():
        if isinstance(module, Linear4bit) and module not in unfit:
            yield module, module


def _unfit(module: nn.Module, base: Any) -> str | None:
    """Why a layer can't run on the kernels. Raises KernelError where its device can't either."""
    from memplan.kernels.layers import OURS, LoraLinear4bit, _plain_lora, undisturbed

    device = base.weight.device
    if device.type == "cuda":
        reason = refusal(device)
        if reason:
            raise KernelError(reason)
    elif device.type != "cpu":
        raise KernelError(f"the kernels run on NVIDIA GPUs, and this model is on {device.type}")
    if type(module) not in OURS:
        return f"{type(module).__name__} is a class of its own"
    if isinstance(module, LoraLinear4bit) and not _plain_lora(module):
        return "DoRA, several adapters, adapters with a bias or hooks are PEFT's"
    if not undisturbed(module) or not undisturbed(base):
        return "somebody's hooks are on them"
    try:
        weight = weight_of(base.weight, getattr(base.weight, "quant_state", None))
        if not isinstance(weight.code, FakeTensor):
            check_code(weight)
    except KernelError as error:
        return str(error)
    return None
