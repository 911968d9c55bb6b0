"""Leaf modules: parameters on the tape, and forwards that read like the library's.

Sources: torch.nn, transformers' norms and embeddings, and bitsandbytes/nn/modules.py,
autograd/_functions.py and backends/cuda/ops.py (0.50).
"""

from __future__ import annotations

from math import prod
from typing import Any

from memplan.cuda.embedding import sorting, summing
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, require_grad
from memplan.shadow.matmul import linear
from memplan.shadow.tensor import DType, Shape, Tensor, category, empty, state, uint8
from memplan.tape import Category


def parameter(shape: Shape, dtype: DType, name: str, kind: Category, trainable: bool) -> Tensor:
    """A leaf tensor, as it is spread over ranks."""
    state.tape.module = name
    if state.spread is not None:
        spread = state.spread.parameter(shape, dtype, kind, trainable)
        if spread is not None:
            return spread
    with category(kind):
        tensor = empty(shape, dtype, "parameter")
    if trainable:
        require_grad(tensor, parameter=True)
    return tensor


def buffer(shape: Shape, dtype: DType, name: str, kind: Category) -> Tensor:
    """A tensor that is only kept."""
    state.tape.module = name
    with category(kind):
        return empty(shape, dtype, "parameter")


class Base:
    """A linear layer that an adapter may go around; ``shape`` is that of its weight [out, in]."""

    __slots__ = ("bias", "name", "shape")

    name: str
    shape: Shape
    bias: Tensor | None
    quantised = False  # PEFT has layers of its own around those that are

    @property
    def compute(self) -> DType:
        """The dtype that it multiplies in, where no autocast says another."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weight as one tensor of numbers."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Linear(Base):
    """``nn.Linear``."""

    __slots__ = ("weight",)

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        self.name, self.weight, self.bias = name, weight, bias
        self.shape = weight.shape

    @property
    def compute(self) -> DType:
        return self.weight.dtype

    def dense(self) -> Tensor:
        return self.weight

    def __call__(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        return linear(x, self.weight, self.bias)


class Embedding:
    """``nn.Embedding``; Gemma's multiplies by a scalar buffer."""

    __slots__ = ("name", "requires_grad_hook", "scale", "weight")

    def __init__(
        self, name: str, weight: Tensor, scale: Tensor | None = None, requires_grad_hook: bool = False
    ) -> None:
        self.name = name
        self.weight, self.scale, self.requires_grad_hook = weight, scale, requires_grad_hook

    def __call__(self, ids: Tensor) -> Tensor:
        state.tape.module = self.name
        weight = self.weight
        shape = (*ids.shape, weight.shape[1])
        out = empty(shape, weight.dtype, "embedding")
        if ops.tracked(weight):
            node = Node(embedding_backward, weight)
            node.saved = ids
            node.context = weight.shape
            attach(node, out)
        return self.finished(out)

    def finished(self, out: Tensor) -> Tensor:
        """What was looked up, multiplied and hooked."""
        if self.scale is not None:
            scale = ops.to(self.scale, self.weight.dtype)
            out = ops.mul(out, scale) if out.requires_grad else ops.pointwise("mul", out)
        if self.requires_grad_hook and out.node is None:
            require_grad(out, parameter=False)
        return out


def embedding_backward(node: Node, grad: Tensor) -> Any:
    """``embedding_dense_backward_cuda``."""
    operation = "embedding_dense_backward"
    entries, width = node.context
    rows = prod(grad.shape[:-1])
    scratch = [empty((nbytes,), uint8, operation) for nbytes in sorting(rows)]
    out = empty(node.context, grad.dtype, operation)
    scratch += [empty((nbytes,), uint8, operation) for nbytes in summing(rows, entries, width)]
    return (out,)
