"""Matrix products."""

from __future__ import annotations

from math import prod
from typing import Any

from memplan.shadow.autograd import AccumulateGrad, Node, attach, save, unpack
from memplan.shadow.ops import clone, pointwise, to, tracked, view
from memplan.shadow.tensor import DType, Shape, Tensor, empty, float32, state, view_strides


def product(shape: Shape, dtype: DType, operation: str, *operands: Tensor) -> Tensor:
    """What cuBLAS multiplies into. Of ``operands``, those that it can't read as they lie are copied for as
    long as that takes (aten/src/ATen/native/cuda/Blas.cpp, prepare_batch_matrix_for_cublas)."""
    out = empty(shape, dtype, operation)
    copies = [empty(x.shape, x.dtype, operation) for x in operands if x.strides is not None]
    state.tape.multiply()
    del copies
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x [..., in], weight [out, in] -> [..., out]; one mm (addmm with a bias) on x
    folded to two axes (aten/src/ATen/native/Linear.cpp). Under autocast weights are cast, cached."""
    if state.spread is not None and state.spread.linear is not None:
        return state.spread.linear(x, weight, bias)
    if state.autocast is not None:
        # casts run in the order in which the compiler evaluates the arguments: from the last
        _held = x, weight  # the caller's own arguments
        bias = None if bias is None else autocast(bias)
        weight = autocast(weight)
        x = autocast(x)
    if x.strides is not None and view_strides(x.shape, x.strides, (prod(x.shape[:-1]), x.shape[-1])) is None:
        x = clone(x)
    shape = (*x.shape[:-1], weight.shape[0])
    operation = "mm" if bias is None else "addmm"
    if bias is not None and len(shape) > 2:
        # _flatten_nd_linear: a node of its own, behind which the gradients of weight and bias come first
        x = view(x, x.shape)
    if tracked(x, weight, bias):
        node = Node(_linear_backward, x, weight, bias)
        node.saved = (
            None if weight.node is None else save(x),
            None if x.node is None else save(weight),
        )
        node.context = x.shape, weight.shape, bias is not None
        out = product(shape, x.dtype, operation)
        attach(node, out)
        return out
    return product(shape, x.dtype, operation)


def _linear_backward(node: Node, grad: Tensor) -> Any:
    x, weight = (None if saved is None else unpack(saved) for saved in node.saved)
    x_shape, weight_shape, _ = node.context
    if (
        grad.strides is not None
        and view_strides(grad.shape, grad.strides, (prod(grad.shape[:-1]), grad.shape[-1])) is None
    ):
        grad = clone(grad)
    folded = _viewed if len(x_shape) > 2 else _same  # a matrix goes into the product as it is
    for_weight = for_x = for_bias = None
    # mm's arguments sort as (mat2, self), addmm's as (mat1, mat2, self).
    if weight is not None and node.context[2]:
        for_x = folded(product(x_shape, grad.dtype, "mm"))
    if x is not None:
        for_weight = _viewed(product(weight_shape, grad.dtype, "mm"))
    if weight is not None and not node.context[2]:
        for_x = folded(product(x_shape, grad.dtype, "mm"))
    if node.edges[2]:
        for_bias = grad  # summed by the engine, when addmm's backward has let go of what it saved
    return for_x, for_weight, for_bias


def _same(x: Tensor) -> Tensor:
    return x


def _viewed(x: Tensor) -> Tensor:
    """The gradient behind the view or transposition that the product was fed through."""
    return x.viewed(x.shape)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """``torch.matmul`` of two batched matrices with equal leading axes: one bmm. Operands whose axes
    can't be folded into one batch axis are copied (reshape in aten/src/ATen/native/LinearAlgebra.cpp)."""
    _held: Any = x, y  # arguments and locals live until the product is there
    if state.autocast is not None:
        y = autocast(y)
        x = autocast(x)
        _held = _held, x, y
    x, y = _batched(x), _batched(y)
    shape = (*x.shape[:-1], y.shape[-1])
    flat = (prod(x.shape[:-2]), x.shape[-2], y.shape[-1])
    if tracked(x, y):
        node = Node(_matmul_backward, x, y)
        node.saved = (
            None if y.node is None else save(x),
            None if x.node is None else save(y),
        )
        node.context = x.shape, y.shape
        out = product(flat, x.dtype, "bmm")
        attach(node, out)
    else:
        out = product(flat, x.dtype, "bmm")
    return view(out, shape)


def _batched(x: Tensor) -> Tensor:
    if x.strides is None or view_strides(x.shape, x.strides, (prod(x.shape[:-2]), *x.shape[-2:])) is not None:
        return x
    return clone(x)


def _matmul_backward(node: Node, grad: Tensor) -> Any:
    x, y = (None if saved is None else unpack(saved) for saved in node.saved)
    x_shape, y_shape = node.context
    for_y = for_x = None
    if x is not None:
        for_y = _viewed(product(y_shape, grad.dtype, "bmm"))
    if y is not None:
        for_x = _viewed(product(x_shape, grad.dtype, "bmm"))
    return for_x, for_y


def mm(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` of two matrices."""
    if state.autocast is not None:
        y = autocast(y)
        x = autocast(x)
    shape = x.shape[0], y.shape[1]
    if not tracked(x, y):
        return product(shape, x.dtype, "mm")
    node = Node(_mm_backward, x, y)
    node.saved = (
        None if y.node is None else save(x),
        None if x.node is None else save(y),
    )
    node.context = x.shape, y.shape
    out = product(shape, x.dtype, "mm")
    attach(node, out)
    return out


def _mm_backward(node: Node, grad: Tensor) -> Any:
    x, y = (None if saved is None else unpack(saved) for saved in node.saved)
    x_shape, y_shape = node.context
    for_y = None if x is None else product(y_shape, grad.dtype, "mm")
    for_x = None if y is None else product(x_shape, grad.dtype, "mm")
    return for_x, for_y


def baddbmm(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """``torch.baddbmm(x, y, z, alpha=...)``."""
    node = Node(_baddbmm_backward, x, y, z) if tracked(x, y, z) else None
    saved = (save(y), save(z)) if node is not None else None
    out = product(x.shape, x.dtype, "baddbmm", y, z)
    if node is not None:
        node.saved = saved
        attach(node, out)
    return out


def _baddbmm_backward(node: Node, grad: Tensor) -> Any:
    y, z = (unpack(saved) for saved in node.saved)
    unscaled = product(y.shape, grad.dtype, "bmm", grad, z)
    for_y = pointwise("mul", unscaled)
    del unscaled
    unscaled = product(z.shape, y.dtype, "bmm", y, grad)
    for_z = pointwise("mul", unscaled)
    del unscaled
    return (grad if node.edges[0] else None), for_y, for_z


def autocast(x: Tensor) -> Tensor:
    """What autocast feeds to an operation of its lower-precision list: leaves that require no cast
    stay, parameters' casts are cached until the region ends (aten/src/ATen/autocast_mode.cpp)."""
    dtype = state.autocast
    if dtype is None or not x.dtype.floating or x.dtype is dtype:
        return x
    if x.dtype is not float32 or type(x.node) is not AccumulateGrad:
        return to(x, dtype)
    cached = state.autocast_cache.get(id(x))
    if cached is None:
        cached = state.autocast_cache[id(x)] = to(x, dtype)
    return cached
