"""Indexing on CUDA: masks become indices first, and gradients are added to rows in sorted order
(:mod:`memplan.cuda.indexing`).
"""

from __future__ import annotations

from math import prod
from typing import Any

from memplan.cuda import indexing as cuda
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, unpack
from memplan.shadow.tensor import Shape, Tensor, bool_, empty, int64, uint8


def by_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` along the first axis."""
    return _index(x, rows, (*rows.shape, *x.shape[1:]))


def by_mask(x: Tensor, mask: Tensor, count: int) -> Tensor:
    """``x[mask]`` along the mask's axes, where ``count`` of it are true."""
    indices = nonzero(len(mask.shape), count, "index")
    out = _index(x, mask, (count, *x.shape[len(mask.shape) :]))
    del indices
    return out


def _index(x: Tensor, by: Tensor, shape: Shape) -> Tensor:
    node = Node(_index_backward, x) if ops.tracked(x) else None
    saved = save(by) if node is not None else None
    out = empty(shape, x.dtype, "index")
    if node is not None:
        node.saved = saved
        node.context = x.shape
        attach(node, out)
    return out


def _index_backward(node: Node, grad: Tensor) -> Any:
    """Rows added to zeros in place (cuda/Indexing.cu, index_put_with_sort_kernel)."""
    by = unpack(node.saved)
    out = empty(node.context, grad.dtype, "new_zeros")
    linear = _linear_index(by, grad.shape[0] if by.dtype is bool_ else prod(by.shape))
    _values = ops.contiguous(grad)
    _sorting = [empty((nbytes,), uint8, "index_put_") for nbytes in cuda.sorting(prod(linear.shape))]
    return (out,)


def _linear_index(by: Tensor, count: int) -> Tensor:
    """``makeLinearIndex``: each axis's index modulo its size, times its stride; one sum."""
    operation = "index_put_"
    mask = by.dtype is bool_
    indices: Any = nonzero(len(by.shape), count, operation) if mask else by
    linear: Tensor | None = None
    for _ in range(len(by.shape) if mask else 1):
        remainder = empty((count,), int64, operation)
        product = empty((count,), int64, operation)
        del remainder
        if linear is None:
            linear = product
        del product
    del indices
    assert linear is not None
    return linear


def nonzero(axes: int, count: int, operation: str) -> Tensor:
    """Of a mask of which ``count`` elements are true (cuda/Nonzero.cu): how many, then a row of indices for
    each axis."""
    counted = empty((cuda.COUNT,), uint8, operation)
    indices = empty((cuda.nonzero(axes, count),), uint8, operation)
    del counted
    return indices


def masked_scatter(mask: Tensor, source: Tensor) -> Tensor:
    """``source.new_zeros(mask.shape).masked_scatter(mask, source)`` (cuda/IndexKernel.cpp)."""
    zeros = empty(mask.shape, source.dtype, "new_zeros")
    node = Node(_masked_scatter_backward, source) if ops.tracked(source) else None
    out = empty(mask.shape, source.dtype, "masked_scatter")
    prefix_sum = empty((cuda.places(prod(mask.shape)),), uint8, "masked_scatter")
    del prefix_sum, zeros
    if node is not None:
        node.saved = save(mask)
        node.context = source.shape
        attach(node, out)
    return out


def _masked_scatter_backward(node: Node, grad: Tensor) -> Any:
    """``masked_select`` of the gradient: indexing by the mask."""
    operation = "masked_scatter_backward"
    mask = unpack(node.saved)
    _indices = nonzero(len(mask.shape), node.context[0], operation)
    return (empty(node.context, grad.dtype, operation),)


def gather_last(x: Tensor, index: Tensor) -> Tensor:
    """``x.gather(-1, index)``, which saves both."""
    node = Node(_gather_backward, x) if ops.tracked(x) else None
    saved = None if node is None else (save(x), save(index))
    out = empty(index.shape, x.dtype, "gather")
    if node is not None:
        node.saved = saved
        attach(node, out)
    return out


def _gather_backward(node: Node, grad: Tensor) -> Any:
    """Added to zeros in place (TensorAdvancedIndexing.cpp, ``gather_backward``)."""
    x, _index = (unpack(saved) for saved in node.saved)
    return (empty(x.shape, grad.dtype, "new_zeros"),)
