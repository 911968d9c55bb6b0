"""memplan's own kernels in the shadow: what kernels/nf4_linear.py and nf4_lora_linear.py allocate, line by
line.
"""

from __future__ import annotations

from math import prod
from typing import Any

from memplan.kernels.strips import FEW_ROWS, strip
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach
from memplan.shadow.tensor import DType, Tensor, empty, state, view_strides
from memplan.weights.bnb_4bit import Linear4bit


class NF4Linear(Linear4bit):
    """``memplan.kernels.layers.NF4Linear``: strips, or bitsandbytes' own way for a few rows."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        if few(x):
            return super().__call__(x)
        state.tape.module = self.name
        node = Node(_linear_backward, x) if ops.tracked(x) else None
        out = forward(x, self, "nf4_linear")
        if node is not None:
            node.context = self
            attach(node, out)
        return out


def _linear_backward(node: Node, grad: Tensor) -> Any:
    return (input_gradient(grad, node.context, "nf4_linear_grad"),)


def few(x: Tensor) -> bool:
    """Whether so few rows are multiplied that the library's own kernels do it."""
    return bool(prod(x.shape[:-1]) <= FEW_ROWS)


def flat(x: Tensor, operation: str, contiguous: bool = False) -> Tensor:
    """``x.reshape(-1, x.shape[-1])``: a copy where it lies in no such order, or has to be ``contiguous``."""
    if x.strides is None:
        return x
    rows = prod(x.shape[:-1]), x.shape[-1]
    if not contiguous and view_strides(x.shape, x.strides, rows) is not None:
        return x
    return empty(x.shape, x.dtype, operation)


def forward(x: Tensor, module: Linear4bit, operation: str) -> Tensor:
    """``nf4_linear.forward``."""
    outputs, inputs = module.shape
    return _by_strips(x, outputs, inputs, module.compute_dtype, operation)


def input_gradient(grad: Tensor, module: Linear4bit, operation: str) -> Tensor:
    """``nf4_linear.input_gradient``."""
    outputs, inputs = module.shape
    return _by_strips(grad, inputs, outputs, module.compute_dtype, operation)


def _by_strips(x: Tensor, made: int, summed: int, dtype: DType, operation: str) -> Tensor:
    """A product with ``made`` columns, each a sum over ``summed``; a strip is some of the columns."""
    out = empty((*x.shape[:-1], made), x.dtype, operation)
    x = flat(x, operation)
    short = cast(x, dtype, operation)
    converted = 0 if short is None else prod(x.shape[:-1])
    size = strip(made, summed, dtype.itemsize, converted)
    buffer = empty((size, summed), dtype, operation)
    result = empty((converted, size), dtype, operation) if converted else None
    state.tape.multiply()
    del short, buffer, result
    return out


def cast(x: Tensor, dtype: DType, operation: str) -> Tensor | None:
    """``x.to(dtype)`` where that is a new tensor."""
    return None if x.dtype is dtype else empty(x.shape, dtype, operation)
