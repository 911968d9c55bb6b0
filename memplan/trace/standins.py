"""Everything that differs between the CPU that traces and the CUDA that is traced, put in force.

==================  ===================================================================================
operators           :mod:`~memplan.trace.attention`, :mod:`~memplan.trace.kernels`,
                    :mod:`~memplan.trace.quantization`: what CUDA kernels allocate
functions           here: Python functions of the libraries that ask for values or for the device
autocast            :mod:`~memplan.trace.autocast`: CUDA's lists of operators
optimizers          :mod:`~memplan.trace.optimizers`: step counts, which live on the host
==================  ===================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from memplan.trace import attention, kernels, quantization
from memplan.trace.autocast import cuda_rules
from memplan.trace.card import Card
from memplan.trace.operators import OPERATORS
from memplan.trace.optimizers import fake_safe

__all__ = ["OPERATORS", "in_force"]
assert quantization  # imported for the operators that it registers


def all_true(tensor: torch.Tensor) -> bool:
    """transformers 5 masking_utils.py ``fast_all`` of a mask that is all ones: its sum and comparison."""
    torch.eq(tensor.sum(), tensor.numel())
    return True


@contextmanager
def in_force(card: Card) -> Iterator[None]:
    """The patches of Python functions; operators' stand-ins are the recorder's."""
    from transformers import masking_utils

    with ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(torch.nn.functional, "scaled_dot_product_attention", attention.sdpa_for(card)))
        stack.enter_context(patch(torch.nn.functional, "dropout", kernels.dropout))
        # fake tensors would make transformers believe that it is being compiled, and make masks
        stack.enter_context(patch(masking_utils, "is_tracing", lambda tensor=None: False))
        stack.enter_context(patch(masking_utils, "fast_all", all_true))
        stack.enter_context(cuda_rules())
        stack.enter_context(fake_safe())
        yield
