"""memplan's own operators: what they allocate on the way is what their own code allocates, so that code is
run without its launches (``memplan.kernels.launch.dry``)."""

from __future__ import annotations

from typing import Any

import torch

from memplan.kernels.launch import dry
from memplan.kernels.nf4_linear import forward, input_gradient
from memplan.kernels.nf4_lora_linear import lora_forward, lora_gradients
from memplan.kernels.weight import Weight
from memplan.trace.operators import operator

ours = torch.ops.memplan


@operator(ours.nf4_linear.default)
def nf4_linear(recorder: Any, x: Any, bias: Any, *rest: Any) -> Any:
    """A strip of the weight at a time; a copy of x in the compute dtype and 16-bit results where dtypes
    differ.
    """
    with torch.autocast("cpu", enabled=False), dry():
        return forward(x, Weight(*rest[:10]), bias, *rest[10:])


@operator(ours.nf4_linear_grad.default)
def nf4_linear_grad(recorder: Any, grad: Any, *rest: Any) -> Any:
    """The same of the gradient."""
    with torch.autocast("cpu", enabled=False), dry():
        return input_gradient(grad, Weight(*rest[:10]), *rest[10:])


@operator(ours.nf4_lora_linear.default)
def nf4_lora_linear(recorder: Any, x: Any, down: Any, up: Any, bias: Any, *rest: Any) -> Any:
    """The rank-r product, factors in the dtype of x, and the above."""
    with torch.autocast("cpu", enabled=False), dry():
        return lora_forward(x, down, up, bias, Weight(*rest[:10]), *rest[10:])


@operator(ours.nf4_lora_linear_grad.default)
def nf4_lora_linear_grad(
    recorder: Any, grad: Any, x: Any, hidden: Any, down: Any, up: Any, *rest: Any
) -> Any:
    """Three gradients."""
    with torch.autocast("cpu", enabled=False), dry():
        return lora_gradients(grad, x, hidden, down, up, Weight(*rest[:10]), *rest[10:])
