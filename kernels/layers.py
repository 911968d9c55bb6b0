"""The layers that :func:`memplan.kernels.apply` puts in place of bitsandbytes' and PEFT's.

Subclasses without state of their own: an object becomes one by changing its class and turns back the same
way, so parameters, names and what is saved stay the library's. Whatever they are not made for they hand to
the library.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor, nn

from memplan.kernels.nf4_linear import nf4_linear
from memplan.kernels.nf4_lora_linear import nf4_lora_linear
from memplan.kernels.strips import FEW_ROWS
from memplan.kernels.weight import DTYPES


class NF4Linear(Linear4bit):
    """``bnb.nn.Linear4bit`` without its dequantised weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N], in the dtype of x."""
        if not _suits(self, x):
            return super().forward(x)
        dtype, bias = _compute(self, x)
        return nf4_linear(x, self.weight, self.weight.quant_state, bias, dtype=dtype)


class NF4LoraLinear(LoraLinear4bit):
    """PEFT's ``lora.Linear4bit`` as one operator."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] to [..., N], in the dtype of x."""
        base = self.get_base_layer()
        if (
            args
            or kwargs
            or self.disable_adapters
            or self.merged
            or not _suits(base, x)
            or not _plain_lora(self)
        ):
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        dropout = self.lora_dropout[adapter]
        dtype, bias = _compute(base, x)
        return nf4_lora_linear(
            x,
            base.weight,
            base.weight.quant_state,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
            bias,
            dtype=dtype,
            dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        )


OURS = {Linear4bit: NF4Linear, LoraLinear4bit: NF4LoraLinear}


def _suits(base: Linear4bit, x: Tensor) -> bool:
    """Whether the operators take this input; a few rows are the library's own kernels' to multiply, and so
    is a weight that it packed anew on a CPU when there were few.
    """
    return (
        x.dtype in DTYPES
        and x.numel() > FEW_ROWS * x.shape[-1]
        and x.device == base.weight.device
        and x.shape[-1] == base.in_features
        and not getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False)
        and undisturbed(base)
    )


def _compute(base: Linear4bit, x: Tensor) -> tuple[torch.dtype, Tensor | None]:
    """The compute dtype, and the bias in it: the beginning of ``Linear4bit.forward`` (bitsandbytes 0.50)."""
    fix_4bit_weight_quant_state_from_module(base)
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    dtype = base.compute_dtype or x.dtype
    if base.bias is None:
        return dtype, None
    if base.bias.dtype is not dtype:
        base.bias.data = base.bias.data.to(dtype)
    return dtype, base.bias


def _plain_lora(layer: LoraLinear4bit) -> bool:
    """One active adapter, of the kind that the operator computes."""
    active = layer.active_adapters
    if len(active) != 1 or active[0] not in layer.lora_A or active[0] in layer.lora_variant:
        return False
    down, up = layer.lora_A[active[0]], layer.lora_B[active[0]]
    return (
        type(down) is type(up) is nn.Linear
        and up.bias is None
        and getattr(layer, "cast_input_dtype_enabled", True)
        and undisturbed(down)
        and undisturbed(up)
    )


def undisturbed(module: nn.Module) -> bool:
    """Whether nobody hooked into the module or replaced its forward (accelerate does, to offload it): what we
    don't call can't be hooked.
    """
    return not (
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
