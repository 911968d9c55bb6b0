"""memplan's own LoRA kernel in the shadow: what kernels/nf4_lora_linear.py allocates, line by line."""

from __future__ import annotations

from math import prod
from typing import Any

from memplan.adapters.lora import Lora
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, save_output, unpack
from memplan.shadow.matmul import product
from memplan.shadow.tensor import DType, Tensor, empty, int64, state
from memplan.weights._memplan_kernels import NF4Linear, cast, few, flat, forward, input_gradient


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
            _down = cast(self.down, x.dtype, name)
            state.tape.multiply()
            del _down
        _up = cast(self.up, x.dtype, name)
        return forward(x, base, name), hidden


def _lora_backward(node: Node, grad: Tensor) -> Any:
    lora, shape, dropout = node.context
    name = "nf4_lora_linear_grad"
    x, hidden, down, up = (unpack(saved) for saved in node.saved[:4])
    _seed = unpack(node.saved[4]) if dropout else None
    grad, x = flat(grad, name), flat(x, name, dropout)
    up_cast = cast(up, grad.dtype, name)
    hidden_grad = product(hidden.shape, grad.dtype, name)
    del up_cast
    for_up = _product(up.shape, grad.dtype, up.dtype, name)
    for_down = (
        empty(down.shape, down.dtype, name) if dropout else _product(down.shape, grad.dtype, down.dtype, name)
    )
    if node.edges[0] is None:
        return None, for_down, for_up
    _down = None if dropout else cast(down, grad.dtype, name)
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
