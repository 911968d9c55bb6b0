"""Pointwise operations, reductions, casts and views: what each allocates, and what it saves.

Names on the tape are ATen's. The backward of each is that of tools/autograd/derivatives.yaml
(torch 2.13), spelled out with its intermediates: a C++ temporary lives until the end of its full
expression, so it is a named local here. Gradients are computed in alphabetical order of argument
names, as the code generator sorts them.
"""

from __future__ import annotations

from typing import Any

from memplan.shadow.autograd import Backward, Node, attach, save, save_output, unpack
from memplan.shadow.tensor import (
    DType,
    Shape,
    Tensor,
    bool_,
    empty,
    float16,
    float32,
    int64,
    iterator_strides,
    normalized,
    state,
    strides_of,
    view_strides,
)


def tracked(*inputs: Tensor | None) -> bool:
    """Whether an operation on ``inputs`` is recorded for backward."""
    if state.grad:
        for tensor in inputs:
            if tensor is not None and tensor.node is not None:
                return True
    return False


def broadcast(one: Shape, two: Shape) -> Shape:
    """Numpy's broadcasting of two shapes."""
    if one == two:
        return one
    if len(one) < len(two):
        one, two = two, one
    lead = len(one) - len(two)
    return one[:lead] + tuple(a if b == 1 else b for a, b in zip(one[lead:], two, strict=True))


def promote(one: Tensor, two: Tensor) -> DType:
    """torch.result_type of two tensors with at least one axis each."""
    a, b = one.dtype, two.dtype
    if a is b:
        return a
    if not a.floating:
        return b
    if not b.floating:
        return a
    return float32


def pointwise(operation: str, x: Tensor, y: Tensor | None = None, dtype: DType | None = None) -> Tensor:
    """A fresh result of a pointwise kernel on one or two tensors."""
    if y is None:
        strides = None if x.strides is None else iterator_strides(x.shape, [x])
        return empty(x.shape, dtype or x.dtype, operation, strides)
    shape = x.shape if x.shape == y.shape else broadcast(x.shape, y.shape)
    strides = None
    if x.strides is not None or y.strides is not None:
        strides = iterator_strides(shape, [x, y])
    return empty(shape, dtype or (x.dtype if x.dtype is y.dtype else promote(x, y)), operation, strides)


# -- casts -------------------------------------------------------------------------------------------


def to(x: Tensor, dtype: DType) -> Tensor:
    """``x.to(dtype)``: itself if it has that dtype already."""
    if x.dtype is dtype:
        return x
    if tracked(x):
        node = Node(to_backward, x)
        out = pointwise("_to_copy", x, dtype=dtype)
        attach(node, out)
        return out
    return pointwise("_to_copy", x, dtype=dtype)


def to_backward(node: Node, grad: Tensor) -> Any:
    edge = node.edges[0]
    dtype = edge[0].meta[edge[1]][1] if edge else grad.dtype
    return (pointwise("_to_copy", grad, dtype=dtype),)


# -- arithmetic --------------------------------------------------------------------------------------


def add(x: Tensor, y: Tensor) -> Tensor:
    """``x + y``. Saves nothing."""
    if tracked(x, y):
        node = Node(_add_backward, x, y)
        out = pointwise("add", x, y)
        attach(node, out)
        return out
    return pointwise("add", x, y)


def _add_backward(node: Node, grad: Tensor) -> Any:
    for_x, for_y = node.edges
    return grad if for_x else None, grad if for_y else None


def add_(x: Tensor, y: Tensor | None = None) -> Tensor:
    """``x.add_(constant)`` or ``x.add_(y)``: the same storage with one more step of history."""
    if not tracked(x, y):
        return x
    node = Node(pass_backward, x) if y is None else Node(_add_backward, x, y)
    out = x.detach()
    attach(node, out)
    return out


def sub(x: Tensor, y: Tensor) -> Tensor:
    """``x - y``. Saves nothing."""
    if tracked(x, y):
        node = Node(_sub_backward, x, y)
        out = pointwise("sub", x, y)
        attach(node, out)
        return out
    return pointwise("sub", x, y)


def _sub_backward(node: Node, grad: Tensor) -> Any:
    for_x, for_y = node.edges
    return grad if for_x else None, pointwise("neg", grad) if for_y else None


def mul(x: Tensor, y: Tensor) -> Tensor:
    """``x * y``."""
    if tracked(x, y):
        node = Node(_mul_backward, x, y)
        node.saved = (
            None if x.node is None else save(y),
            None if y.node is None else save(x),
        )
        out = pointwise("mul", x, y)
        attach(node, out)
        return out
    return pointwise("mul", x, y)


def _mul_backward(node: Node, grad: Tensor) -> Any:
    other, this = (None if saved is None else unpack(saved) for saved in node.saved)
    for_y = pointwise("mul", grad, this) if this is not None else None
    for_x = pointwise("mul", grad, other) if other is not None else None
    return for_x, for_y


def mul_(x: Tensor, y: Tensor) -> Tensor:
    """``x *= y`` by a ``y`` that wants no gradient: the same storage with one more step of history."""
    if not tracked(x):
        return x
    node = Node(_mul_backward, x, None)
    node.saved = (save(y), None)
    out = x.detach()
    attach(node, out)
    return out


def divide(x: Tensor, y: Tensor) -> Tensor:
    """``x / y`` by a ``y`` that wants no gradient."""
    if tracked(x):
        node = Node(_divide_backward, x)
        node.saved = save(y)
        out = pointwise("div", x, y)
        attach(node, out)
        return out
    return pointwise("div", x, y)


def _divide_backward(node: Node, grad: Tensor) -> Any:
    other = unpack(node.saved)
    return (pointwise("div", grad, other),)


def scale(x: Tensor, operation: str = "mul") -> Tensor:
    """``x * number`` or ``x / number``. A Python number is no tensor on the device: nothing is saved."""
    if tracked(x):
        node = Node(_scale_backward, x)
        node.context = operation
        out = pointwise(operation, x)
        attach(node, out)
        return out
    return pointwise(operation, x)


def _scale_backward(node: Node, grad: Tensor) -> Any:
    return (pointwise(node.context, grad),)


def shift(x: Tensor, operation: str = "add") -> Tensor:
    """``x + number`` or ``x - number``."""
    if tracked(x):
        node = Node(pass_backward, x)
        out = pointwise(operation, x)
        attach(node, out)
        return out
    return pointwise(operation, x)


def pass_backward(node: Node, grad: Tensor) -> Any:
    return (grad,)


def neg(x: Tensor) -> Tensor:
    """``-x``."""
    if tracked(x):
        node = Node(_neg_backward, x)
        out = pointwise("neg", x)
        attach(node, out)
        return out
    return pointwise("neg", x)


def _neg_backward(node: Node, grad: Tensor) -> Any:
    return (pointwise("neg", grad),)


def square(x: Tensor) -> Tensor:
    """``x.pow(2)``."""
    if tracked(x):
        node = Node(_square_backward, x)
        node.saved = save(x)
        out = pointwise("pow", x)
        attach(node, out)
        return out
    return pointwise("pow", x)


def _square_backward(node: Node, grad: Tensor) -> Any:
    x = unpack(node.saved)
    power = pointwise("pow", x)
    scaled = pointwise("mul", power)
    return (pointwise("mul", grad, scaled),)


def rsqrt(x: Tensor) -> Tensor:
    """``torch.rsqrt``; saves its result."""
    if tracked(x):
        node = Node(_rsqrt_backward, x)
        out = pointwise("rsqrt", x)
        node.saved = save_output(out)
        attach(node, out)
        return out
    return pointwise("rsqrt", x)


def _rsqrt_backward(node: Node, grad: Tensor) -> Any:
    result = unpack(node.saved)
    cubed = pointwise("pow", result)
    scaled = pointwise("mul", grad)
    return (pointwise("mul", scaled, cubed),)


def power(x: Tensor) -> Tensor:
    """``torch.pow(x, number)``; saves what it is given."""
    if tracked(x):
        node = Node(_power_backward, x)
        node.saved = save(x)
        out = pointwise("pow", x)
        attach(node, out)
        return out
    return pointwise("pow", x)


def _power_backward(node: Node, grad: Tensor) -> Any:
    x = unpack(node.saved)
    risen = pointwise("pow", x)
    scaled = pointwise("mul", risen)
    return (pointwise("mul", grad, scaled),)


def activation(name: str, x: Tensor) -> Tensor:
    """silu, gelu: one kernel that saves its input."""
    if tracked(x):
        node = Node(_activation_backward, x)
        node.context = name
        node.saved = save(x)
        out = pointwise(name, x)
        attach(node, out)
        return out
    return pointwise(name, x)


def _activation_backward(node: Node, grad: Tensor) -> Any:
    return (pointwise(node.context + "_backward", grad, unpack(node.saved)),)


def result_activation(name: str, x: Tensor) -> Tensor:
    """tanh, sigmoid: one kernel that saves its result."""
    if tracked(x):
        node = Node(_activation_backward, x)
        node.context = name
        out = pointwise(name, x)
        node.saved = save_output(out)
        attach(node, out)
        return out
    return pointwise(name, x)


def clamp(x: Tensor, *, both: bool) -> Tensor:
    """``x.clamp(min, max)``, or with a max alone; saves its input."""
    if tracked(x):
        node = Node(_clamp_backward, x)
        node.context = both
        node.saved = save(x)
        out = pointwise("clamp", x)
        attach(node, out)
        return out
    return pointwise("clamp", x)


def _clamp_backward(node: Node, grad: Tensor) -> Any:
    """FunctionsManual.cpp, ``clamp_backward``: the gradient where the input lies within, else zero."""
    x = unpack(node.saved)
    zero = empty((), grad.dtype, "scalar_tensor")
    within = pointwise("ge" if node.context else "le", x, dtype=bool_)
    if node.context:
        below = pointwise("le", x, dtype=bool_)  # and joined to the first in place
        out = pointwise("where", within, grad, grad.dtype)
        del below
    else:
        out = pointwise("where", within, grad, grad.dtype)
    del zero, within
    return (out,)


def masked_fill(x: Tensor, mask: Tensor) -> Tensor:
    """``x.masked_fill(mask, number)``."""
    if tracked(x):
        node = Node(_masked_fill_backward, x)
        node.saved = save(mask)
        out = pointwise("masked_fill", x)
        attach(node, out)
        return out
    return pointwise("masked_fill", x)


def _masked_fill_backward(node: Node, grad: Tensor) -> Any:
    return (pointwise("masked_fill", grad, unpack(node.saved), dtype=grad.dtype),)


def dropout(x: Tensor, p: float) -> Tensor:
    """``nn.functional.dropout`` in training on CUDA: native_dropout, which makes a mask of bools, then its
    result, and saves the mask (aten/src/ATen/native/cuda/Dropout.cu ``dropout_cuda``)."""
    if not p:
        return x
    needs = tracked(x)
    node = Node(_dropout_backward, x) if needs else None
    mask = pointwise("native_dropout", x, dtype=bool_)
    out = pointwise("native_dropout", x)
    if node is not None:
        node.saved = save_output(mask)
        attach(node, out)
    return out


def _dropout_backward(node: Node, grad: Tensor) -> Any:
    return (pointwise("native_dropout_backward", grad, unpack(node.saved), dtype=grad.dtype),)


# -- reductions and softmax ------------------------------------------------------------------------


def mean_last(x: Tensor) -> Tensor:
    """``x.mean(-1, keepdim=True)``."""
    return _reduce_last(x, "mean", _mean_backward)


def sum_last(x: Tensor) -> Tensor:
    """``x.sum(dim=-1, keepdim=True)``, which autocast makes in fp32 (ATen/autocast_mode.h,
    AT_FORALL_FP32_SET_OPT_DTYPE)."""
    return _reduce_last(x, "sum", _expand_backward, x.dtype if state.autocast is None else float32)


def sum_over(x: Tensor, axis: int) -> Tensor:
    """``x.sum(axis)`` of floats, which autocast makes in fp32."""
    node = Node(_sum_over_backward, x) if tracked(x) else None
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    out = empty(shape, x.dtype if state.autocast is None else float32, "sum")
    if node is not None:
        node.context = axis
        attach(node, out)
    return out


def _sum_over_backward(node: Node, grad: Tensor) -> Any:
    shape, axis = _input_shape(node), node.context
    return (expanded(grad.viewed((*grad.shape[:axis], 1, *grad.shape[axis:])), shape),)


def max_last(x: Tensor) -> Tensor:
    """``x.max(dim=-1, keepdim=True).values``, whose indices are saved."""
    node = Node(_max_backward, x) if tracked(x) else None
    shape = (*x.shape[:-1], 1)
    values = empty(shape, x.dtype, "max")
    indices = empty(shape, int64, "max")
    if node is not None:
        node.saved = save_output(indices)
        attach(node, values)
    return values


def _max_backward(node: Node, grad: Tensor) -> Any:
    """FunctionsManual.cpp, ``value_selecting_reduction_backward``: scattered into zeros, in place."""
    indices = unpack(node.saved)
    out = empty(_input_shape(node), grad.dtype, "new_zeros")
    del indices
    return (out,)


def _reduce_last(x: Tensor, operation: str, backward: Backward, dtype: DType | None = None) -> Tensor:
    node = Node(backward, x) if tracked(x) else None
    out = empty((*x.shape[:-1], 1), dtype or x.dtype, operation)
    if node is not None:
        attach(node, out)
    return out


def _mean_backward(node: Node, grad: Tensor) -> Any:
    return (empty(_input_shape(node), grad.dtype, "div"),)


def _expand_backward(node: Node, grad: Tensor) -> Any:
    return (expanded(grad, _input_shape(node)),)


def _input_shape(node: Node) -> Shape:
    edge = node.edges[0]
    assert edge is not None
    return edge[0].meta[edge[1]][0]


def count(shape: Shape) -> Tensor:
    """``mask.sum()`` of bools, which are cast first (aten/src/ATen/native/ReduceOpsUtils.h
    ``make_reduction_from_ty``)."""
    total = empty((), int64, "sum")
    cast = empty(shape, int64, "sum")
    del cast
    return total


def softmax(x: Tensor, dtype: DType) -> Tensor:
    """``softmax(x, dim=-1, dtype=dtype)``: on CUDA fp16 to fp32 is one kernel, the rest casts first
    (aten/src/ATen/native/SoftMax.cpp)."""
    fused = x.dtype is float16 and dtype is float32
    if not fused:
        x = to(x, dtype)
    if tracked(x):
        node = Node(_softmax_backward, x)
        node.context = x.dtype
        out = empty(x.shape, dtype, "_softmax")
        node.saved = save_output(out)
        attach(node, out)
        return out
    return empty(x.shape, dtype, "_softmax")


def _softmax_backward(node: Node, grad: Tensor) -> Any:
    """CUDA multiplies the gradient by the result first, into a tensor of its own
    (aten/src/ATen/native/cuda/SoftMax.cu ``softmax_backward_cuda_out``)."""
    result = unpack(node.saved)
    out = empty(result.shape, node.context, "_softmax_backward_data")
    product = empty(result.shape, result.dtype, "_softmax_backward_data")
    del product
    return (out,)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.layer_norm`` over the last axis: one kernel, which saves all its arguments, and fp32 means and
    deviations (aten/src/ATen/native/cuda/layer_norm_kernel.cu). Autocast makes it fp32, and casts its
    arguments from the last."""
    if state.autocast is not None:
        bias = None if bias is None else to(bias, float32)
        weight = to(weight, float32)
        x = to(x, float32)
    node = Node(_layer_norm_backward, x, weight, bias) if tracked(x, weight, bias) else None
    saved = [] if node is None else [save(one) for one in (x, weight, bias) if one is not None]
    _contiguous = contiguous(x.detach())
    out = empty(x.shape, x.dtype, "native_layer_norm")
    stats = [empty((*x.shape[:-1], 1), float32, "native_layer_norm") for _ in range(2)]
    if node is not None:
        node.saved = [*saved, *map(save_output, stats)]
        attach(node, out)
    return out


def _layer_norm_backward(node: Node, grad: Tensor) -> Any:
    operation = "native_layer_norm_backward"
    x, weight, *_rest = (unpack(saved) for saved in node.saved)
    for_x, for_weight, for_bias = node.edges
    _contiguous = contiguous(x.detach())
    shapes = (
        x.shape if for_x else None,
        weight.shape if for_weight else None,
        weight.shape if for_bias else None,
    )
    gradients = tuple(None if shape is None else empty(shape, x.dtype, operation) for shape in shapes)
    _grad = contiguous(grad)
    return gradients


# -- views -------------------------------------------------------------------------------------------


def view_of(x: Tensor, shape: Shape, strides: Shape | None, backward: Any, context: Any = None) -> Tensor:
    out = x.viewed(shape, strides)
    if state.grad and x.node is not None:
        node = Node(backward, x)
        node.context = context
        attach(node, out)
    return out


def view(x: Tensor, shape: Shape) -> Tensor:
    """``x.view(shape)``; the tensor must allow it."""
    strides = None
    if x.strides is not None:
        found = view_strides(x.shape, x.strides, shape)
        assert found is not None, f"view of {x.shape} with strides {x.strides} as {shape} needs a copy"
        strides = normalized(shape, found)
    return view_of(x, shape, strides, _view_backward, x.shape)


def _view_backward(node: Node, grad: Tensor) -> Any:
    return (reshape(grad, node.context),)


def reshape(x: Tensor, shape: Shape) -> Tensor:
    """``x.reshape(shape)``: a view where strides allow it, else a copy."""
    if x.strides is not None and view_strides(x.shape, x.strides, shape) is None:
        out = view(clone(x), shape)
        out.base = None  # at::_unsafe_view: no view to autograd, so that the engine may add into it
        return out
    return view(x, shape)


def clone(x: Tensor, *, preserve: bool = False) -> Tensor:
    """``x.clone()``: contiguous, or with the strides of a dense ``x`` if ``preserve``."""
    strides = iterator_strides(x.shape, [x]) if preserve and x.strides is not None else None
    if tracked(x):
        node = Node(pass_backward, x)
        out = empty(x.shape, x.dtype, "clone", strides)
        attach(node, out)
        return out
    return empty(x.shape, x.dtype, "clone", strides)


def contiguous(x: Tensor) -> Tensor:
    """``x.contiguous()``."""
    return x if x.strides is None else clone(x)


def transpose(x: Tensor, one: int, two: int) -> Tensor:
    """``x.transpose(one, two)``."""
    rank = len(x.shape)
    one, two = one % rank, two % rank
    shape, strides = list(x.shape), list(strides_of(x))
    shape[one], shape[two] = shape[two], shape[one]
    strides[one], strides[two] = strides[two], strides[one]
    new = tuple(shape)
    return view_of(x, new, normalized(new, tuple(strides)), _transpose_backward, (one, two))


def _transpose_backward(node: Node, grad: Tensor) -> Any:
    return (transpose(grad, *node.context),)


def permute(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """``x.permute(order)``."""
    strides = strides_of(x)
    shape = tuple(x.shape[axis] for axis in order)
    inverse = tuple(sorted(range(len(order)), key=order.__getitem__))
    return view_of(
        x, shape, normalized(shape, tuple(strides[axis] for axis in order)), _permute_backward, inverse
    )


def _permute_backward(node: Node, grad: Tensor) -> Any:
    return (permute(grad, node.context),)


def expanded(x: Tensor, shape: Shape) -> Tensor:
    """``x.expand(shape)`` without history."""
    lead = len(shape) - len(x.shape)
    strides = [0] * lead + [
        0 if size == 1 and wanted != 1 else stride
        for size, wanted, stride in zip(x.shape, shape[lead:], strides_of(x), strict=True)
    ]
    return x.viewed(shape, normalized(shape, tuple(strides)))


def expand(x: Tensor, shape: Shape) -> Tensor:
    """``x.expand(shape)``."""
    out = expanded(x, shape)
    if tracked(x):
        attach(Node(pass_backward, x), out)  # the engine sums it back (at::sum_to)
    return out


def narrow_last(x: Tensor, start: int, stop: int) -> Tensor:
    """``x[..., start:stop]``; its backward fills a tensor of the full shape.

    All of it is the tensor itself (torch/csrc/autograd/python_variable_indexing.cpp, applySlice).
    """
    if start == 0 and stop >= x.shape[-1]:
        return x
    shape = (*x.shape[:-1], stop - start)
    out = view_of(x, shape, normalized(shape, strides_of(x)), _narrow_backward, x.shape)
    return out


def _narrow_backward(node: Node, grad: Tensor) -> Any:
    return (empty(node.context, grad.dtype, "slice_backward"),)


def select(x: Tensor, axis: int) -> Tensor:
    """``x`` at one place of an axis."""
    strides = strides_of(x)
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    kept = normalized(shape, strides[:axis] + strides[axis + 1 :])
    return view_of(x, shape, kept, _select_backward, x.shape)


def _select_backward(node: Node, grad: Tensor) -> Any:
    return (empty(node.context, grad.dtype, "select_backward"),)


def alias(x: Tensor) -> Tensor:
    """``x[:]`` in all axes: another tensor, the same elements."""
    return view_of(x, x.shape, x.strides, pass_backward)


def every_second(x: Tensor, first: int) -> Tensor:
    """``x[..., first::2]``."""
    strides = strides_of(x)
    shape = (*x.shape[:-1], (x.shape[-1] - first + 1) // 2)
    return view_of(x, shape, (*strides[:-1], 2 * strides[-1]), _narrow_backward, x.shape)


def narrow(x: Tensor, shape: Shape) -> Tensor:
    """The first elements of ``x`` along each axis."""
    return view_of(x, shape, normalized(shape, strides_of(x)), _narrow_backward, x.shape)


def cat_last(*parts: Tensor) -> Tensor:
    """``torch.cat(parts, dim=-1)``; its backward hands out views."""
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    dtype = max((part.dtype for part in parts), key=lambda one: one.itemsize)
    if tracked(*parts):
        node = Node(_cat_backward, *parts)
        node.context = tuple(part.shape[-1] for part in parts)
        out = empty(shape, dtype, "cat")
        attach(node, out)
        return out
    return empty(shape, dtype, "cat")


def _cat_backward(node: Node, grad: Tensor) -> Any:
    result, start = [], 0
    for size, need in zip(node.context, node.edges, strict=True):
        shape = (*grad.shape[:-1], size)
        part = grad.viewed(shape, normalized(shape, strides_of(grad))) if need else None
        result.append(part)
        start += size
    return result


def interleave(x: Tensor, y: Tensor) -> Tensor:
    """``torch.stack([x, y], dim=-1).flatten(-2)``; its backward hands out every second column."""
    shape = (*x.shape[:-1], 2 * x.shape[-1])
    node = Node(_interleave_backward, x, y) if tracked(x, y) else None
    out = empty(shape, x.dtype, "stack")
    if node is not None:
        attach(node, out)
    return out


def _interleave_backward(node: Node, grad: Tensor) -> Any:
    strides, shape = strides_of(grad), (*grad.shape[:-1], grad.shape[-1] // 2)
    halves = [grad.viewed(shape, (*strides[:-1], 2 * strides[-1])) for _ in node.edges]
    return [half if edge else None for half, edge in zip(halves, node.edges, strict=True)]


def copy_into_cache(x: Tensor, dtype: DType) -> Tensor:
    """``torch.cat([empty, x], dim=-2)``: what transformers' DynamicCache does with keys and values, in
    the keys' ``dtype`` (transformers/cache_utils.py, DynamicLayer.update, 5.23). Backward narrows: a view."""
    if dtype.itemsize < x.dtype.itemsize:
        dtype = x.dtype
    if tracked(x):
        node = Node(_narrowed_backward, x)
        out = empty(x.shape, dtype, "cat")
        attach(node, out)
        return out
    return empty(x.shape, dtype, "cat")


def _narrowed_backward(node: Node, grad: Tensor) -> Any:
    return (grad.viewed(grad.shape, grad.strides),)


def chunk_last(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x.chunk(2, dim=-1)``: two views whose gradients are joined by one cat (SplitBackward)."""
    half = x.shape[-1] // 2
    shape = (*x.shape[:-1], half)
    strides = normalized(shape, strides_of(x))
    one, two = x.viewed(shape, strides), x.viewed(shape, strides)
    if tracked(x):
        node = Node(chunk_backward, x)
        node.context = x.shape
        attach(node, one)
        attach(node, two)
    return one, two


def chunk_backward(node: Node, grads: Any) -> Any:
    dtype = next(grad.dtype for grad in grads if grad is not None)
    return (empty(node.context, dtype, "cat"),)
