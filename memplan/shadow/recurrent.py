"""What linear attention does beside the operations of :mod:`memplan.shadow.ops`: a depthwise convolution,
sums along an axis, triangular systems, slices that are written in place. Formulas as there: derivatives.yaml
and FunctionsManual.cpp (torch 2.13).
"""

from __future__ import annotations

from math import prod
from typing import Any

from memplan.cuda.triangular import pointers
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, save_output, unpack
from memplan.shadow.matmul import autocast, product
from memplan.shadow.tensor import (
    DType,
    Shape,
    Tensor,
    bool_,
    contiguous_strides,
    empty,
    iterator_strides,
    normalized,
    state,
    strides_of,
    uint8,
)

# -- pointwise -----------------------------------------------------------------------------------------


def exp(x: Tensor) -> Tensor:
    """``torch.exp``; saves its result."""
    node = Node(_exp_backward, x) if ops.tracked(x) else None
    out = ops.pointwise("exp", x)
    if node is not None:
        node.saved = save_output(out)
        attach(node, out)
    return out


def _exp_backward(node: Node, grad: Tensor) -> Any:
    return (ops.pointwise("mul", grad, unpack(node.saved)),)


def masked_fill(x: Tensor, mask: Tensor) -> Tensor:
    """``x.masked_fill(mask, number)``."""
    node = Node(_masked_fill_backward, x) if ops.tracked(x) else None
    saved = save(mask) if node is not None else None
    out = empty(x.shape, x.dtype, "masked_fill")
    if node is not None:
        node.saved = saved
        attach(node, out)
    return out


def _masked_fill_backward(node: Node, grad: Tensor) -> Any:
    _mask = unpack(node.saved)
    return (empty(grad.shape, grad.dtype, "masked_fill"),)


def strictly_upper(size: int) -> Tensor:
    """``torch.ones(size, size, dtype=torch.bool).triu(1)``."""
    ones = empty((size, size), bool_, "ones")
    out = empty((size, size), bool_, "triu")
    del ones
    return out


def to_contiguous(x: Tensor, dtype: DType) -> Tensor:
    """``x.to(dtype, memory_format=torch.contiguous_format)``: itself if it has that dtype already, however it
    lies, for no format but channels-last is told apart (TensorConversions.cpp, ``to_will_alias``)."""
    if x.dtype is dtype:
        return x
    node = Node(ops.to_backward, x) if ops.tracked(x) else None
    out = empty(x.shape, dtype, "_to_copy")
    if node is not None:
        attach(node, out)
    return out


# -- sums and systems ------------------------------------------------------------------------------------


def cumsum_last(x: Tensor) -> Tensor:
    """``x.cumsum(-1)``."""
    node = Node(_cumsum_backward, x) if ops.tracked(x) else None
    out = empty(x.shape, x.dtype, "cumsum")
    if node is not None:
        attach(node, out)
    return out


def _cumsum_backward(node: Node, grad: Tensor) -> Any:
    """``grad.flip(dim).cumsum(dim).flip(dim)``."""
    if prod(grad.shape) <= 1 or grad.shape[-1] == 1:
        return (grad,)
    turned = ops.pointwise("flip", grad)
    summed = empty(grad.shape, grad.dtype, "cumsum")
    out = empty(grad.shape, grad.dtype, "flip")
    del turned, summed
    return (out,)


def solve_triangular(system: Tensor, x: Tensor) -> Tensor:
    """``torch.linalg.solve_triangular(system, x, upper=False, unitriangular=True)``."""
    node = Node(_solve_backward, system, x) if ops.tracked(system, x) else None
    saved = save(system) if node is not None else None
    out = _solution(system, x)
    if node is not None:
        node.saved = saved, save_output(out)
        attach(node, out)
    return out


def _solution(system: Tensor, x: Tensor) -> Tensor:
    """BatchLinearAlgebra.cpp ``linalg_solve_triangular_out``: column by column."""
    *batch, rows, columns = x.shape
    operation = "linalg_solve_triangular"
    *lead, _, _ = contiguous_strides(x.shape)
    strides = normalized(x.shape, (*lead, 1, rows))
    out = empty(x.shape, x.dtype, operation, strides)
    told = [empty((nbytes,), uint8, operation) for nbytes in pointers(prod(batch), rows)]
    del told
    return out


def _solve_backward(node: Node, grad: Tensor) -> Any:
    system, result = (unpack(saved) for saved in node.saved)
    for_x = _solution(system, grad)
    for_system = None
    if node.edges[0]:
        multiplied = product(system.shape, grad.dtype, "bmm")
        negative = ops.pointwise("neg", multiplied)
        del multiplied
        for_system = ops.pointwise("tril", negative)
        del negative
    del result
    return for_system, for_x if node.edges[1] else None


# -- slices ----------------------------------------------------------------------------------------------


def select(x: Tensor, axis: int) -> Tensor:
    """``x.select(axis, index)``, a view; its backward fills a tensor of the full shape."""
    strides = strides_of(x)
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    strides_out = normalized(shape, strides[:axis] + strides[axis + 1 :])
    return ops.view_of(x, shape, strides_out, _select_backward, x.shape)


def _select_backward(node: Node, grad: Tensor) -> Any:
    return (empty(node.context, grad.dtype, "select_backward"),)


def write(base: Tensor, axis: int, x: Tensor) -> Tensor:
    """``base.select(axis, index).copy_(x)``: ``base``, with one more step of history."""
    if not ops.tracked(base, x):
        return base
    node = Node(_write_backward, base, x)
    node.context = base.shape, base.strides, x.dtype
    out = base.detach()
    attach(node, out)
    return out


def _write_backward(node: Node, grad: Tensor) -> Any:
    """torch/csrc/autograd/functions/tensor.cpp, ``CopySlices`` around ``CopyBackwards``: the gradient is
    copied with zeros in the slice, which are made apart; the slice's own is a copy, too."""
    shape, strides, dtype = node.context
    for_base = empty(shape, grad.dtype, "new_empty_strided", strides)
    edge = node.edges[1]
    part = empty(_shape_of(edge) if edge else (), grad.dtype, "clone")
    zeros = ops.pointwise("zeros_like", part) if node.edges[0] else None
    part = ops.to(part, dtype)
    del zeros
    return for_base if node.edges[0] else None, part if edge else None


def _shape_of(edge: tuple[Node, int]) -> Shape:
    return edge[0].meta[edge[1]][0]


def copied_into(fresh: Tensor, x: Tensor) -> Tensor:
    """``fresh.copy_(x)`` of one that has no history."""
    if ops.tracked(x):
        attach(Node(ops.pass_backward, x), fresh)
    return fresh


def pad(x: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind it, ``F.pad``: a copy even where there are none (PadNd.cpp, ``constant_pad_nd``)."""
    node = Node(_pad_backward, x) if ops.tracked(x) else None
    shape = (*x.shape[:axis], x.shape[axis] + size, *x.shape[axis + 1 :])
    strides = None if size or x.strides is None else iterator_strides(x.shape, [x])
    out = empty(shape, x.dtype, "constant_pad_nd", strides)
    if node is not None:
        node.context = x.shape
        attach(node, out)
    return out


def pad_before(x: Tensor, length: int) -> Tensor:
    """Zeros before it along the last axis, up to ``length``."""
    node = Node(_pad_backward, x) if ops.tracked(x) else None
    out = empty((*x.shape[:-1], length), x.dtype, "constant_pad_nd")
    if node is not None:
        node.context = x.shape
        attach(node, out)
    return out


def _pad_backward(node: Node, grad: Tensor) -> Any:
    """The first part, copied in the order in which it lies."""
    part = grad.viewed(node.context, strides_of(grad))
    strides = None if grad.strides is None else iterator_strides(node.context, [part])
    return (empty(node.context, grad.dtype, "constant_pad_nd", strides),)


def split_last(x: Tensor, *sizes: int) -> list[Tensor]:
    """``torch.split(x, sizes, dim=-1)``: views whose gradients are joined by one cat."""
    parts = []
    for size in sizes:
        shape = (*x.shape[:-1], size)
        parts.append(x.viewed(shape, normalized(shape, strides_of(x))))
    if ops.tracked(x):
        node = Node(ops.chunk_backward, x)
        node.context = x.shape
        for part in parts:
            attach(node, part)
    return parts


def repeat_interleave(x: Tensor, times: int, axis: int) -> Tensor:
    """``x.repeat_interleave(times, axis)``: expanded and copied."""
    before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    x = ops.view(x, (*before, size, 1, *after))
    x = ops.expand(x, (*before, size, times, *after))
    return ops.view(ops.clone(x), (*before, size * times, *after))


# -- convolution -----------------------------------------------------------------------------------------


def depthwise_conv1d(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """``F.conv1d(x, weight, padding=padding, groups=channels)`` of x [B, C, S], weight [C, 1, K].

    Convolution.cpp ``_convolution``: what lies in another order is copied first, as long as it takes. 32 bits
    and bf16 run in a kernel of PyTorch's own (cuda/DepthwiseConv2d.cu), which needs nothing more; fp16 in
    cuDNN's (``use_cudnn_depthwise``), whose workspace is not modelled.
    """
    _held: Any = x, weight
    if state.autocast is not None:
        weight = autocast(weight)
        x = autocast(x)
    batch, channels, length = x.shape
    node = Node(_conv_backward, x, weight) if ops.tracked(x, weight) else None
    saved = (save(x), save(weight)) if node is not None else None
    straight = _straight(x)
    out = empty((batch, channels, length + 2 * padding - weight.shape[-1] + 1), x.dtype, "convolution")
    del straight
    if node is not None:
        node.saved = saved
        attach(node, out)
    return out


def _conv_backward(node: Node, grad: Tensor) -> Any:
    x, weight = (unpack(saved) for saved in node.saved)
    operation = "convolution_backward"
    held = [_straight(x, operation), _straight(grad, operation)]
    for_x = empty(x.shape, grad.dtype, operation) if node.edges[0] else None
    for_weight = empty(weight.shape, grad.dtype, operation) if node.edges[1] else None
    del held
    return for_x, for_weight


def _straight(x: Tensor, operation: str = "convolution") -> Tensor:
    return x if x.strides is None else empty(x.shape, x.dtype, operation)
