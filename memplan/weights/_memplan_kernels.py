"""memplan's own kernels in the shadow: what kernels/nf4_linear.py and nf4_lora_linear.py allocate, line by
line.
"""

from __future__ import annotations

from math import prod
from typing import Any

from memplan.adapters.lora import Lora
from memplan.kernels.strips import FEW_ROWS, strip
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, save_output, unpack
from memplan.shadow.matmul import product
from memplan.shadow.tensor import DType, Tensor, empty, int64, state, view_strides
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


class NF4Lora(Lora):
    """``memplan.kernels.layers.NF4LoraLinear``: one operator that saves x, the rank-r product and the
    factors.
    """

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        base = self.base
        assert isinstance(base, NF4Linear)
        if few(x):
            return super().__call__(x)
        state.tape.module = self.name
        seed = empty((1,), int64, "randint") if self.dropout else None
        node = Node(_lora_backward, x, self.down, self.up) if ops.tracked(x, self.down, self.up) else None
        out, hidden = self._forward(x, base)
        if node is not None:
            node.context = self, x.shape, seed is not None
            node.saved = [save(x), save_output(hidden), save(self.down), save(self.up)]
            if seed is not None:
                node.saved.append(save(seed))
            attach(node, out)
        return out

    def _forward(self, x: Tensor, base: NF4Linear) -> tuple[Tensor, Tensor]:
        name = "nf4_lora_linear"
        x = flat(x, name, bool(self.dropout))
        hidden = empty((prod(x.shape[:-1]), self.down.shape[0]), x.dtype, name)
        if not self.dropout:
            _down = _cast(self.down, x.dtype, name)
            state.tape.multiply()
            del _down
        _up = _cast(self.up, x.dtype, name)
        return forward(x, base, name), hidden


def _lora_backward(node: Node, grad: Tensor) -> Any:
    lora, shape, dropout = node.context
    name = "nf4_lora_linear_grad"
    x, hidden, down, up = (unpack(saved) for saved in node.saved[:4])
    _seed = unpack(node.saved[4]) if dropout else None
    grad, x = flat(grad, name), flat(x, name, dropout)
    up_cast = _cast(up, grad.dtype, name)
    hidden_grad = product(hidden.shape, grad.dtype, name)
    del up_cast
    for_up = _product(up.shape, grad.dtype, up.dtype, name)
    for_down = (
        empty(down.shape, down.dtype, name) if dropout else _product(down.shape, grad.dtype, down.dtype, name)
    )
    if node.edges[0] is None:
        return None, for_down, for_up
    _down = None if dropout else _cast(down, grad.dtype, name)
    for_x = input_gradient(grad, lora.base, name)
    del hidden_grad
    return for_x, for_down, for_up


def _product(shape: tuple[int, ...], computed: DType, wanted: DType, name: str) -> Tensor:
    """A factor's gradient: fp32 straight from 16 bits, but 16 bits from fp32 by way of a copy."""
    if computed.itemsize <= wanted.itemsize:
        return product(shape, wanted, name)
    wide = product(shape, computed, name)
    short = empty(shape, wanted, name)
    del wide
    return short


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
    short = _cast(x, dtype, operation)
    converted = 0 if short is None else prod(x.shape[:-1])
    size = strip(made, summed, dtype.itemsize, converted)
    buffer = empty((size, summed), dtype, operation)
    result = empty((converted, size), dtype, operation) if converted else None
    state.tape.multiply()
    del short, buffer, result
    return out


def _cast(x: Tensor, dtype: DType, operation: str) -> Tensor | None:
    """``x.to(dtype)`` where that is a new tensor."""
    return None if x.dtype is dtype else empty(x.shape, dtype, operation)
