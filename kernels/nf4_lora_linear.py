"""LoRA on an NF4 linear layer as one operator: ``y = x W^T + bias + s (dropout(x) A^T) B^T``.

The adapter's product is accumulated into the output slice by slice, in the dtype of x with fp32 sums; x is
not cast for it, no mask is kept. Backward has x and the rank-r product saved, nothing else. Stock PEFT casts
x to the adapter's dtype, writes the product, scales it, casts it and adds it (peft/tuners/lora/bnb.py, 0.21).
Shapes: M rows, K inputs, N outputs, R the rank; A [R, K], B [N, R].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memplan.errors import KernelError
from memplan.kernels.launch import Runs, where
from memplan.kernels.lora_dropout import add_input_gradient, down_gradient_into, down_into
from memplan.kernels.nf4_linear import _check, forward, input_gradient
from memplan.kernels.weight import Weight, weight_of

Gradients = tuple[Tensor, Tensor, Tensor]


# -- the work ----------------------------------------------------------------------------------------------


def lora_forward(
    x: Tensor, down_RK: Tensor, up_NR: Tensor, bias: Tensor | None, weight: Weight, dtype: torch.dtype,
    method: str, scale: float, p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [..., N] and the rank-r product [M, R], both in the dtype of x."""
    _check(x, weight.columns, method)
    x_MK = _rows(x, weight.columns, seed)
    hidden_MR = x.new_empty((x_MK.shape[0], down_RK.shape[0]))
    if seed is None:
        torch.mm(x_MK, down_RK.to(x.dtype).t(), out=hidden_MR)
    else:
        down_into(hidden_MR, x_MK, down_RK, seed, p)
    up = up_NR.to(x.dtype)

    def add(y: Tensor, start: int, stop: int) -> None:
        y.addmm_(hidden_MR, up[start:stop].t(), alpha=scale)

    return forward(x_MK, weight, bias, dtype, method, add).view(*x.shape[:-1], weight.rows), hidden_MR


def lora_gradients(
    grad: Tensor, x: Tensor, hidden_MR: Tensor, down_RK: Tensor, up_NR: Tensor, weight: Weight,
    dtype: torch.dtype, method: str, scale: float, p: float, seed: Tensor | None,
    for_x: bool, for_factors: bool,
) -> Gradients:  # fmt: skip
    """Gradients of x, A and B; one that is not wanted is empty."""
    grad_MN, x_MK = grad.reshape(-1, weight.rows), _rows(x, weight.columns, seed)
    hidden_grad_MR = torch.mm(grad_MN, up_NR.to(grad.dtype)).mul_(scale)
    up_grad, down_grad = grad.new_empty(0, dtype=up_NR.dtype), grad.new_empty(0, dtype=down_RK.dtype)
    if for_factors:
        up_grad = _product(grad_MN.t(), hidden_MR, up_NR.dtype).mul_(scale)
        if seed is None:
            down_grad = _product(hidden_grad_MR.t(), x_MK, down_RK.dtype)
        else:
            down_grad = x.new_empty(down_RK.shape, dtype=down_RK.dtype)
            down_gradient_into(down_grad, x_MK, hidden_grad_MR, seed, p)
    if not for_x:
        return grad.new_empty(0), down_grad, up_grad
    down = down_RK if seed is not None else down_RK.to(grad.dtype)

    def add(x_grad: Tensor, start: int, stop: int) -> None:
        if seed is None:
            x_grad.addmm_(hidden_grad_MR, down[:, start:stop])
        else:
            add_input_gradient(x_grad, hidden_grad_MR, down, seed, p, start, stop)

    return input_gradient(grad_MN, weight, dtype, method, add).view(x.shape), down_grad, up_grad


def _rows(x: Tensor, columns: int, seed: Tensor | None) -> Tensor:
    """x [M, K]; the dropout's kernels want it contiguous."""
    x_MK = x.reshape(-1, columns)
    return x_MK if seed is None else x_MK.contiguous()


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``dtype``; fp32 from 16 bits without rounding to those first."""
    if left.dtype is dtype:
        return torch.mm(left, right)
    if dtype is not torch.float32:
        return torch.mm(left, right).to(dtype)
    if where(left) is Runs.NOT:
        return left.new_empty((left.shape[0], right.shape[1]), dtype=dtype)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left.to(dtype), right.to(dtype))


def reference(
    x: Tensor, weight_NK: Tensor, down_RK: Tensor, up_NR: Tensor, bias: Tensor | None, scale: float,
    keep_MK: Tensor | None = None, p: float = 0.0,
) -> Tensor:  # fmt: skip
    """The same in plain torch, with a weight that is dequantised already and a mask that is given."""
    inner = x if keep_MK is None else x * keep_MK / (1 - p)
    base = torch.nn.functional.linear(x, weight_NK, bias)
    return base + torch.nn.functional.linear(torch.nn.functional.linear(inner, down_RK), up_NR) * scale


# -- operators ---------------------------------------------------------------------------------------------


@torch.library.custom_op("memplan::nf4_lora_linear", mutates_args=())
def nf4_lora_linear_op(
    x: Tensor,
    down_RK: Tensor,
    up_NR: Tensor,
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
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`lora_forward` as an operator."""
    weight = Weight(
        packed, absmax, code, nested_absmax, nested_code, offset, rows, columns, blocksize, nested_blocksize
    )
    with torch.autocast(x.device.type, enabled=False):
        return lora_forward(x, down_RK, up_NR, bias, weight, dtype, method, scale, p, seed)


@torch.library.custom_op("memplan::nf4_lora_linear_grad", mutates_args=())
def nf4_lora_linear_grad_op(
    grad: Tensor,
    x: Tensor,
    hidden_MR: Tensor,
    down_RK: Tensor,
    up_NR: Tensor,
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
    scale: float,
    p: float,
    seed: Tensor | None,
    for_x: bool,
    for_factors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`lora_gradients` as an operator."""
    weight = Weight(
        packed, absmax, code, nested_absmax, nested_code, offset, rows, columns, blocksize, nested_blocksize
    )
    with torch.autocast(grad.device.type, enabled=False):
        return lora_gradients(
            grad, x, hidden_MR, down_RK, up_NR, weight, dtype, method, scale, p, seed, for_x, for_factors
        )


@nf4_lora_linear_op.register_fake
def _(x: Tensor, down_RK: Tensor, up_NR: Tensor, bias: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, columns = rest[6:8]
    _check(x, columns, rest[11])
    return x.new_empty((*x.shape[:-1], rows)), x.new_empty((x.numel() // columns, down_RK.shape[0]))


@nf4_lora_linear_grad_op.register_fake
def _(grad: Tensor, x: Tensor, hidden_MR: Tensor, down_RK: Tensor, up_NR: Tensor, *rest: Any) -> Gradients:
    for_x, for_factors = rest[-2:]
    return (
        grad.new_empty(x.shape if for_x else 0),
        grad.new_empty(down_RK.shape if for_factors else 0, dtype=down_RK.dtype),
        grad.new_empty(up_NR.shape if for_factors else 0, dtype=up_NR.dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, down_RK, up_NR, bias = inputs[:4]
    hidden_MR = output[1]
    ctx.mark_non_differentiable(hidden_MR)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, hidden_MR, down_RK, up_NR, inputs[18])
    ctx.weight, ctx.settings = inputs[4:14], inputs[14:18]  # the weight by reference, as in nf4_linear
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 19
    for_x, for_down, for_up, for_bias = ctx.needs_input_grad[:4]
    x_grad = down_grad = up_grad = bias_grad = None
    if for_bias:
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
    if for_x or for_down or for_up:
        x, hidden_MR, down_RK, up_NR, seed = ctx.saved_tensors
        x_grad, down_grad, up_grad = nf4_lora_linear_grad_op(
            grad, x, hidden_MR, down_RK, up_NR, *ctx.weight, *ctx.settings, seed, for_x, for_down or for_up
        )
    return (
        x_grad if for_x else None, down_grad if for_down else None, up_grad if for_up else None, bias_grad,
        *(None,) * 15,
    )  # fmt: skip


nf4_lora_linear_op.register_autograd(_backward, setup_context=_setup)


def nf4_lora_linear(
    x: Tensor, packed: Tensor, state: Any, down: Tensor, up: Tensor, scale: float, bias: Tensor | None = None,
    *, dtype: torch.dtype | None = None, dropout: float = 0.0, method: str = "strips",
) -> Tensor:  # fmt: skip
    """What PEFT's ``lora.Linear4bit`` computes: x [..., K], ``down`` its A [R, K], ``up`` its B [N, R].

    ``dtype``: what the product with the weight is computed in (default: x's). The dropout's seed is drawn
    from the generator of x's device, which checkpointing restores. Raises KernelError for what does not fit
    together.
    """
    weight = weight_of(packed, state)
    if down.shape[1:] != (weight.columns,) or up.shape != (weight.rows, down.shape[0]):
        raise KernelError(
            f"adapters of the shapes {tuple(down.shape)} and {tuple(up.shape)} don't belong to a weight of "
            f"the shape {weight.rows, weight.columns}"
        )
    seed = torch.randint(1 << 62, (1,), device=x.device) if dropout else None
    out: Tensor = nf4_lora_linear_op(
        x, down, up, bias, *weight, dtype or x.dtype, method, scale, dropout, seed
    )[0]
    return out
