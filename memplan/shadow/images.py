"""What images take beside the operations of :mod:`memplan.shadow.ops`: patches, parts of a tensor apart and
together, and rows that are put where a mask is true. Formulas as there: derivatives.yaml and
FunctionsManual.cpp (torch 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

from memplan.cuda import indexing as cuda
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, split_sum, unpack
from memplan.shadow.indexing import nonzero
from memplan.shadow.matmul import autocast
from memplan.shadow.tensor import Shape, Tensor, bool_, empty, normalized, state, strides_of, uint8

# -- patches ----------------------------------------------------------------------------------------------


class Patches:
    """A convolution whose kernels are patches that don't overlap: each image patch [N] becomes a row. cuDNN's
    workspace is left out."""

    __slots__ = ("bias", "name", "weight")

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        self.name, self.weight, self.bias = name, weight, bias

    def __call__(self, x: Tensor, rows: int) -> Tensor:
        """Of ``rows`` patches."""
        state.tape.module = self.name
        weight, bias = self.weight, self.bias
        x = ops.to(x, weight.dtype)
        if state.autocast is not None:
            bias = None if bias is None else autocast(bias)
            weight = autocast(weight)
            x = autocast(x)
        node = Node(_patches_backward, x, weight, bias) if ops.tracked(x, weight, bias) else None
        saved = None if node is None else (save(x), save(weight))
        out = empty((rows, weight.shape[0]), x.dtype, "convolution")
        if node is None:
            return out
        node.saved = saved
        attach(node, out)
        return ops.view(out, out.shape)


def _patches_backward(node: Node, grad: Tensor) -> Any:
    """Convolution.cpp ``convolution_backward``: the bias' gradient is a sum over rows, made last."""
    operation = "convolution_backward"
    x, weight = (unpack(saved) for saved in node.saved)
    for_x, for_weight, for_bias = node.edges
    grad = ops.contiguous(grad)
    grad_x = empty(x.shape, grad.dtype, operation) if for_x else None
    grad_weight = empty(weight.shape, grad.dtype, operation) if for_weight else None
    grad_bias = None
    if for_bias:
        grad_bias = empty((grad.shape[-1],), grad.dtype, "sum")
        split_sum(grad.shape)
    return grad_x, grad_weight, grad_bias


# -- parts --------------------------------------------------------------------------------------------------


def unbind(x: Tensor) -> list[Tensor]:
    """``x.unbind(0)``: views, whose gradients are stacked."""
    return _views(x, x.shape[1:], strides_of(x)[1:], x.shape[0], _unbind_backward)


def _unbind_backward(node: Node, grads: Any) -> Any:
    dtype = next(grad.dtype for grad in grads if grad is not None)
    missing = [empty(node.context[1:], dtype, "zeros") for grad in grads if grad is None]
    out = empty(node.context, dtype, "stack")
    del missing
    return (out,)


def split(x: Tensor, axis: int, count: int) -> list[Tensor]:
    """``torch.split`` into ``count`` equal parts: views, whose gradients are laid together, even of one."""
    size = list(x.shape)
    size[axis] //= count
    return _views(x, tuple(size), strides_of(x), count, _split_backward)


def _views(x: Tensor, shape: Shape, strides: Shape, count: int, backward: Callable[..., Any]) -> list[Tensor]:
    """Parts of one shape, of one node."""
    parts = [x.viewed(shape, normalized(shape, strides)) for _ in range(count)]
    if ops.tracked(x):
        node = Node(backward, x)
        node.context = x.shape
        for part in parts:
            attach(node, part)
    return parts


def _split_backward(node: Node, grads: Any) -> Any:
    grads = grads if isinstance(grads, list) else [grads]
    dtype = next(grad.dtype for grad in grads if grad is not None)
    return (empty(node.context, dtype, "cat"),)


def join(parts: Sequence[Tensor], axis: int) -> Tensor:
    """``torch.cat(parts, dim=axis)`` of equal parts: a copy, even of one."""
    size = list(parts[0].shape)
    size[axis] *= len(parts)
    shape = tuple(size)
    node = Node(_join_backward, *parts) if ops.tracked(*parts) else None
    out = empty(shape, parts[0].dtype, "cat")
    if node is not None:
        node.context = parts[0].shape
        attach(node, out)
    return out


def _join_backward(node: Node, grad: Tensor) -> Any:
    shape = node.context
    strides = normalized(shape, strides_of(grad))
    return [grad.viewed(shape, strides) if edge else None for edge in node.edges]


# -- where a mask is true ----------------------------------------------------------------------------------


class Mask(NamedTuple):
    """A mask of bools [B, S], of which so many are true."""

    marks: Tensor
    true: int


def masked_scatter(x: Tensor, mask: Mask, source: Tensor) -> Tensor:
    """``x.masked_scatter(mask[..., None], source)`` of x [B, S, E]: a copy of it, the mask spread out, and
    where each element lies in the source (cuda/IndexKernel.cu ``launch_masked_scatter_kernel``)."""
    node = Node(_masked_scatter_backward, x, source) if ops.tracked(x, source) else None
    saved = None if node is None else save(mask.marks)
    out = empty(x.shape, x.dtype, "masked_scatter")
    places = empty((cuda.places(prod(x.shape)),), uint8, "masked_scatter")
    spread = empty(x.shape, bool_, "masked_scatter")
    del places, spread
    if node is not None:
        node.saved = saved
        node.context = source.shape
        attach(node, out)
    return out


def _masked_scatter_backward(node: Node, grad: Tensor) -> Any:
    """``masked_fill``; and ``masked_select``, which indexes by the mask spread out."""
    unpack(node.saved)
    for_x = empty(grad.shape, grad.dtype, "masked_fill") if node.edges[0] else None
    for_source = None
    if node.edges[1]:
        operation = "masked_scatter_backward"
        indices = nonzero(len(grad.shape), prod(node.context), operation)
        for_source = empty(node.context, grad.dtype, operation)
        del indices
    return for_x, for_source


def put_rows_(x: Tensor, mask: Mask, rows: Tensor) -> Tensor:
    """``x[mask] = rows`` of x [B, S, E]: the same storage with one more step of history."""
    operation = "index_put_"
    node = Node(_put_rows_backward, x, rows) if ops.tracked(x, rows) else None
    saved = None if node is None else save(mask.marks)
    indices = nonzero(len(mask.marks.shape), mask.true, operation)
    del indices
    if node is None:
        return x
    node.saved = saved
    node.context = rows.shape, mask.true, len(mask.marks.shape)
    out = x.detach()
    attach(node, out)
    return out


def _put_rows_backward(node: Node, grad: Tensor) -> Any:
    """``grad.index_put(indices, zeros_like(values))``, ``grad.index(indices)``."""
    unpack(node.saved)
    shape, count, axes = node.context
    for_x = for_rows = None
    if node.edges[0]:
        zeros = empty(shape, grad.dtype, "zeros")
        for_x = empty(grad.shape, grad.dtype, "index_put")
        indices = nonzero(axes, count, "index_put")
        del indices, zeros
    if node.edges[1]:
        indices = nonzero(axes, count, "index")
        for_rows = empty(shape, grad.dtype, "index")
        del indices
    return for_x, for_rows
