"""Everything that differs between the CPU that traces and the CUDA that is traced, put in force.

==================  ===================================================================================
operators           :mod:`~memplan.trace.attention`, :mod:`~memplan.trace.kernels`,
                    :mod:`~memplan.trace.quantization`, :mod:`~memplan.trace.nf4`: what CUDA kernels
                    allocate
functions           here: Python functions of the libraries that ask for values or for the device
autocast            :mod:`~memplan.trace.autocast`: CUDA's lists of operators
optimizers          :mod:`~memplan.trace.optimizers`: step counts, which live on the host
==================  ===================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from memplan.asked.recipe import Batches
from memplan.cuda.card import Card
from memplan.trace import attention, indexing, kernels, nf4, quantization
from memplan.trace.autocast import cuda_rules
from memplan.trace.operators import OPERATORS
from memplan.trace.optimizers import as_on_cuda, fake_safe

__all__ = ["ANSWERS", "OF_BATCHES", "OPERATORS", "in_force"]
assert indexing and nf4  # imported for the operators that they register


# Values that the libraries ask for, by the function that asks: the mask is all ones, nothing is packed
ANSWERS = {
    "_ignore_causal_mask_sdpa": True,  # transformers 5 masking_utils.py
    "flash_attention_mask": True,
    "create_recurrent_attention_mask": True,  # Mamba, linear attention
    "_is_packed_sequence": False,  # modeling_flash_attention_utils.py
    "_flash_attention_forward": False,  # which asks whether it is
}

# and where some of it is
OF_BATCHES: dict[Batches, dict[str, Any]] = {
    Batches.FULL: {},
    Batches.PADDED: {"_ignore_causal_mask_sdpa": False, "create_recurrent_attention_mask": False},
    Batches.PACKED: {"find_packed_sequence_indices": False},
}

_tensor = torch.tensor


def not_compiling(_tensor: object = None) -> bool:
    """transformers' ``is_tracing``."""
    return False


def initialise_sliding_cache(layer: DynamicSlidingWindowLayer, key_states: Any, value_states: Any) -> None:
    """``DynamicSlidingWindowLayer.lazy_initialization`` (transformers 5 cache_utils.py): the window, a number
    made on the host, is moved to the card."""
    super(DynamicSlidingWindowLayer, layer).lazy_initialization(key_states, value_states)
    layer._sliding_window_tensor = torch.ops.aten._to_copy.default(layer._sliding_window_tensor)


def tensor_of(data: Any, *, device: Any = None, **options: Any) -> Any:
    """``torch.tensor``: where some tensor's device is named, what was made on the host is copied to it."""
    if isinstance(data, list) and data and isinstance(data[0], torch.Tensor):
        data = [one.item() for one in data]
    made = _tensor(data, device=device, **options)
    return torch.ops.aten._to_copy.default(made) if isinstance(device, torch.device) else made


def delta_weight(layer: Any, adapter: str) -> Any:
    """``lora.Linear.get_delta_weight`` (peft/tuners/lora/layer.py, 0.21) without the fp32 copies that it
    makes of 16-bit factors on a CPU: adapters on routers ask for it in every forward."""
    from peft.utils.other import transpose

    product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
    return transpose(product, layer.fan_in_fan_out) * layer.scaling[adapter]


@contextmanager
def in_force(card: Card, *, data: bool = False) -> Iterator[None]:
    """The patches of Python functions; operators' stand-ins are the recorder's. ``data``: tensors have
    values, so that optimizers may ask for them."""
    from peft.tuners import lora
    from transformers import masking_utils
    from transformers import modeling_flash_attention_utils as flash_utils

    with ExitStack() as stack:
        for owner, name, replacement in (
            (torch.nn.functional, "scaled_dot_product_attention", attention.sdpa_for(card)),
            (torch.nn.functional, "dropout", kernels.dropout),
            (torch, "tensor", tensor_of),
            # fake tensors would make transformers believe that it is being compiled, and make masks
            (masking_utils, "is_tracing", not_compiling),
            (DynamicSlidingWindowLayer, "lazy_initialization", initialise_sliding_cache),
            (flash_utils, "lazy_import_flash_attention", attention.flash_attn_package),
            (lora.Linear, "get_delta_weight", delta_weight),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(cuda_rules())
        stack.enter_context(quantization.told_of_autocast())
        stack.enter_context(kernels.half_to_float())
        stack.enter_context(as_on_cuda() if data else fake_safe())
        yield
