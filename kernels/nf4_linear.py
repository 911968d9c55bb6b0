"""A linear layer with an NF4 weight, forward and gradient of its input, that never holds the weight
dequantised.

``strips`` (the default): dequantise a strip of at most 32 MiB, let cuBLAS multiply it into its slice of the
output, take the next. Forward goes by output rows and the gradient by input columns, so that no sum is split.
``fused``: one Triton product that decodes in registers (:mod:`memplan.kernels.nf4_product`).
Shapes: M rows of x, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memplan.errors import KernelError
from memplan.kernels.nf4_dequantize import dequantize_into
from memplan.kernels.nf4_product import product
from memplan.kernels.strips import strip
from memplan.kernels.weight import Weight, weight_of

METHODS = ("strips", "fused")

Add = Callable[[Tensor, int, int], None]


# -- the work ----------------------------------------------------------------------------------------------


def forward(
    x: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype, method: str, add: Add | None = None
) -> Tensor:
    """``x @ weight.T + bias`` computed in ``dtype``, in the dtype of x. x [..., K] to [..., N].

    ``add`` is given each slice of the output when it is there, with the columns where it begins and ends.
    """
    _check(x, weight.columns, method)
    y = x.new_empty((*x.shape[:-1], weight.rows))
    x_MK, y_MN = x.reshape(-1, weight.columns), y.view(-1, weight.rows)
    if not y.numel():
        return y
    if x.dtype is not dtype:
        x_MK = x_MK.to(dtype)
    if method == "fused":
        product(y_MN, x_MK, weight, bias, transposed=False)
        if add is not None:
            add(y_MN, 0, weight.rows)
        return y
    converted = 0 if x.dtype is dtype else x_MK.shape[0]
    size = strip(weight.rows, weight.columns, dtype.itemsize, converted)
    buffer = x.new_empty((size, weight.columns), dtype=dtype)
    result = x.new_empty((converted, size), dtype=dtype) if converted else None
    for start in range(0, weight.rows, size):
        stop = min(start + size, weight.rows)
        strip_NK = buffer[: stop - start]
        dequantize_into(strip_NK, weight, (start, stop), (0, weight.columns))
        out = y_MN[:, start:stop] if result is None else result[:, : stop - start]
        if bias is None:
            torch.mm(x_MK, strip_NK.t(), out=out)
        else:
            torch.addmm(bias[start:stop], x_MK, strip_NK.t(), out=out)
        if result is not None:
            y_MN[:, start:stop].copy_(out)
        if add is not None:
            add(y_MN[:, start:stop], start, stop)
    return y


def input_gradient(
    grad: Tensor, weight: Weight, dtype: torch.dtype, method: str, add: Add | None = None
) -> Tensor:
    """``grad @ weight`` computed in ``dtype``, in the dtype of grad. grad [..., N] to [..., K]. ``add`` as
    above.
    """
    _check(grad, weight.rows, method)
    out = grad.new_empty((*grad.shape[:-1], weight.columns))
    grad_MN, out_MK = grad.reshape(-1, weight.rows), out.view(-1, weight.columns)
    if not out.numel():
        return out
    if grad.dtype is not dtype:
        grad_MN = grad_MN.to(dtype)
    if method == "fused":
        product(out_MK, grad_MN, weight, None, transposed=True)
        if add is not None:
            add(out_MK, 0, weight.columns)
        return out
    converted = 0 if grad.dtype is dtype else grad_MN.shape[0]
    size = strip(weight.columns, weight.rows, dtype.itemsize, converted)
    buffer = grad.new_empty((weight.rows * size,), dtype=dtype)
    result = grad.new_empty((converted, size), dtype=dtype) if converted else None
    for start in range(0, weight.columns, size):
        stop = min(start + size, weight.columns)
        width = stop - start
        strip_NK = buffer[: weight.rows * width].view(weight.rows, width)
        dequantize_into(strip_NK, weight, (0, weight.rows), (start, stop))
        target = out_MK[:, start:stop] if result is None else result[:, :width]
        torch.mm(grad_MN, strip_NK, out=target)
        if result is not None:
            out_MK[:, start:stop].copy_(target)
        if add is not None:
            add(out_MK[:, start:stop], start, stop)
    return out


def reference(x: Tensor, weight_NK: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with a weight that is dequantised already."""
    return torch.nn.functional.linear(x, weight_NK, bias)


def _check(x: Tensor, width: int, method: str) -> None:
    if x.dim() == 0 or x.shape[-1] != width:
        raise KernelError(
            f"a weight with {width} inputs can't multiply a tensor of the shape {tuple(x.shape)}"
        )
    if method not in METHODS:
        raise KernelError(f"there is no method {method!r}; there are {' and '.join(METHODS)}")


# -- operators ---------------------------------------------------------------------------------------------


@torch.library.custom_op("memplan::nf4_linear", mutates_args=())
def nf4_linear_op(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
    method: str,
) -> Tensor:
    """:func:`forward` as an operator."""
    weight = Weight(
        packed, absmax, code, nested_absmax, nested_code, offset, rows, columns, blocksize, nested_blocksize
    )
    with torch.autocast(x.device.type, enabled=False):
        return forward(x, weight, bias, dtype, method)


@torch.library.custom_op("memplan::nf4_linear_grad", mutates_args=())
def nf4_linear_grad_op(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
    method: str,
) -> Tensor:
    """:func:`input_gradient` as an operator."""
    weight = Weight(
        packed, absmax, code, nested_absmax, nested_code, offset, rows, columns, blocksize, nested_blocksize
    )
    with torch.autocast(grad.device.type, enabled=False):
        return input_gradient(grad, weight, dtype, method)


@nf4_linear_op.register_fake
def _(x: Tensor, bias: Any, *rest: Any) -> Tensor:
    rows, columns = rest[6:8]
    _check(x, columns, rest[-1])
    return x.new_empty((*x.shape[:-1], rows))


@nf4_linear_grad_op.register_fake
def _(grad: Tensor, *rest: Any) -> Tensor:
    rows, columns = rest[6:8]
    _check(grad, rows, rest[-1])
    return grad.new_empty((*grad.shape[:-1], columns))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The weight is frozen: kept by reference, not through save_for_backward, whose hooks (checkpointing,
    # offloading of activations) would carry it about.
    ctx.weight, ctx.dtype, ctx.method = inputs[2:12], inputs[12], inputs[13]
    ctx.bias_dtype = None if inputs[1] is None else inputs[1].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    for_x = for_bias = None
    if ctx.needs_input_grad[0]:
        for_x = nf4_linear_grad_op(grad, *ctx.weight, ctx.dtype, ctx.method)
    if ctx.needs_input_grad[1]:
        for_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
    return for_x, for_bias, *(None,) * 12


nf4_linear_op.register_autograd(_backward, setup_context=_setup)


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    state: Any,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    method: str = "strips",
) -> Tensor:
    """``bitsandbytes.matmul_4bit(x, packed, quant_state=state)``, with x [..., K] and a result of its dtype.

    ``dtype``: what the product is computed in (default: x's). Holds at most a strip of the weight
    dequantised. Raises KernelError for what is not NF4 or does not fit together.
    """
    weight = weight_of(packed, state)
    out: Tensor = nf4_linear_op(x, bias, *weight, dtype or x.dtype, method)
    return out


def scratch_bytes(weight_shape: tuple[int, int], itemsize: int) -> tuple[int, int]:
    """Bytes of a strip, forward and backward."""
    rows, columns = weight_shape
    return (
        strip(rows, columns, itemsize) * columns * itemsize,
        strip(columns, rows, itemsize) * rows * itemsize,
    )


__all__ = ["METHODS", "forward", "input_gradient", "nf4_linear", "reference", "scratch_bytes"]
