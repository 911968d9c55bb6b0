"""Operators whose CUDA kernels allocate more than their outputs, each with its source."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from memplan.cuda import embedding, foreach
from memplan.cuda.products import padded_columns
from memplan.cuda.reduction import scratch
from memplan.cuda.triangular import pointers
from memplan.trace.operators import operator, workspace

aten = torch.ops.aten


# -- matrix products: operands that cuBLAS can't read are copied ----------------------------------------


def _readable(matrix: Any) -> bool:
    """Whether cuBLAS reads a matrix as it lies (aten/src/ATen/native/cuda/cuBlasCommonArgs.h
    ``prepare_matrix_for_cublas``; Blas.cpp ``prepare_batch_matrix_for_cublas``)."""
    rows, columns = matrix.shape[-2:]
    row_stride, column_stride = matrix.stride()[-2:]
    if matrix.dim() == 2 and torch._prims_common.is_non_overlapping_and_dense_or_false(matrix):
        return True
    return (column_stride == 1 and row_stride >= max(1, columns)) or (
        row_stride == 1 and column_stride >= max(1, rows)
    )


def _copies(*matrices: Any) -> list[Any]:
    return [matrix.contiguous() for matrix in matrices if not _readable(matrix)]


@operator(aten.mm.default, aten.bmm.default)
def matrix_product(recorder: Any, left: Any, right: Any) -> Any:
    """Blas.cpp ``addmm_out_cuda_impl``, ``bmm_out_cuda_impl``: the output first, then the copies."""
    shape = (*left.shape[:-1], right.shape[-1])
    out = torch.empty(shape, dtype=left.dtype)
    _held = _copies(left, right)
    recorder.tape.multiply()
    return out


@operator(aten.addmm.default, aten.baddbmm.default)
def matrix_product_plus(
    recorder: Any, bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    """As above; a bias is read by cuBLASLt's epilogue, or copied into the output."""
    out = torch.empty((*left.shape[:-1], right.shape[-1]), dtype=left.dtype)
    _held = _copies(left, right)
    recorder.tape.multiply()
    return out


@operator(aten.mm.out, aten.addmm.out, aten.addmm.dtype_out)
def matrix_product_into(recorder: Any, *operands: Any, out: Any, **_: Any) -> Any:
    """``mm(a, b, out=c)``; ``addmm(c, a, b, out=c)``, also with an fp32 ``c`` of 16-bit operands (Blas.cpp
    ``_addmm_dtype_out_cuda``): nothing but copies of matrices; a bias is read as it is."""
    matrices = [it for it in operands if isinstance(it, torch.Tensor) and it.dim() == 2]
    _held = _copies(*matrices, out)
    recorder.tape.multiply()
    return out


@operator(aten._grouped_mm.default)
def grouped_matrix_product(
    recorder: Any, left: Any, right: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """GroupedBlas.cpp ``_grouped_mm_cuda``: an output whose rows are padded."""
    shape: tuple[Any, ...]
    if left.dim() == 2 and right.dim() == 2:
        shape = (offs.shape[0], left.shape[0], right.shape[1])
    elif left.dim() == 2:
        shape = (left.shape[0], right.shape[-1])
    elif right.dim() == 2:
        shape = (left.shape[1], right.shape[-1])
    else:
        shape = (left.shape[0], left.shape[1], right.shape[-1])
    dtype = out_dtype or left.dtype
    columns = padded_columns(shape[-1], dtype.itemsize)
    return torch.empty((*shape[:-1], columns), dtype=dtype)[..., : shape[-1]]


# -- convolutions ----------------------------------------------------------------------------------------


def _patches(x: Any, weight: Any, stride: Any, groups: int) -> bool:
    """Whether it makes one row of each patch."""
    kernel = tuple(weight.shape[2:])
    return groups == 1 and tuple(x.shape[2:]) == kernel == tuple(stride)


def _depthwise_1d(x: Any, weight: Any, groups: int, transposed: bool) -> bool:
    return x.dim() == 3 and not transposed and groups == x.shape[1] > 1 and weight.shape[1] == 1


@operator(aten.convolution.default)
def convolution(
    recorder: Any,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    """Of one axis, depthwise: aten/src/ATen/native/Convolution.cpp ``_convolution`` copies what lies in
    another order; cuda/DepthwiseConv2d.cu takes nothing more. fp16 runs in cuDNN, whose workspace is left
    out."""
    if not _depthwise_1d(x, weight, groups, transposed):
        return NotImplemented
    _straight = x.contiguous()
    span = dilation[0] * (weight.shape[-1] - 1) + 1
    length = (x.shape[-1] + 2 * padding[0] - span) // stride[0] + 1
    return torch.empty((x.shape[0], weight.shape[0], length), dtype=x.dtype)


@operator(aten.convolution_backward.default)
def convolution_backward(
    recorder: Any,
    grad: Any,
    x: Any,
    weight: Any,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
) -> Any:
    """``convolution_backward``, as above: copies of what lies in another order, then the gradients. Of
    patches that don't overlap, the bias' is a sum over rows, made last."""
    if _patches(x, weight, stride, groups) and not transposed:
        rows = grad.contiguous().view(grad.shape[:2])
        for_x = torch.empty(x.shape, dtype=x.dtype) if output_mask[0] else None
        for_weight = torch.empty(weight.shape, dtype=weight.dtype) if output_mask[1] else None
        return for_x, for_weight, rows.sum(0) if output_mask[2] else None
    if not _depthwise_1d(x, weight, groups, transposed):
        return NotImplemented
    _straight = x.contiguous(), grad.contiguous()
    for_x = torch.empty(x.shape, dtype=x.dtype) if output_mask[0] else None
    for_weight = torch.empty(weight.shape, dtype=weight.dtype) if output_mask[1] else None
    for_bias = torch.empty(bias_sizes, dtype=weight.dtype) if output_mask[2] else None
    return for_x, for_weight, for_bias


# -- triangular systems ----------------------------------------------------------------------------------


@operator(aten.linalg_solve_triangular.default)
def solve_triangular(
    recorder: Any, system: Any, x: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    """BatchLinearAlgebra.cpp ``linalg_solve_triangular_out``: the solution, column by column, and where each
    matrix lies. Of several systems of one shape that cuBLAS reads as they lie."""
    straight = system.is_contiguous() or system.mT.is_contiguous()
    if not straight or system.shape[:-2] != x.shape[:-2]:
        return NotImplemented
    out = torch.empty((*x.shape[:-2], x.shape[-1], x.shape[-2]), dtype=x.dtype).mT
    _told = [workspace(n) for n in pointers(math.prod(x.shape[:-2]), system.shape[-1])]
    return out


# -- pointwise --------------------------------------------------------------------------------------------


@operator(aten.softplus_backward.default)
def softplus_backward(recorder: Any, grad: Any, x: Any, beta: Any, threshold: Any) -> Any:
    """One kernel whose result lies as the gradient does; what fake tensors run in its place
    (torch/_decomp/decompositions.py) gives one that lies as ``x`` does."""
    return grad + x


# -- embedding ------------------------------------------------------------------------------------------


@operator(aten.embedding_dense_backward.default)
def embedding_dense_backward(
    recorder: Any, grad: Any, indices: Any, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Any:
    """``embedding_dense_backward_cuda``."""
    rows, width = indices.numel(), grad.shape[-1]
    grad = grad.contiguous().view(rows, width)
    _sorting = [workspace(nbytes) for nbytes in embedding.sorting(rows)]
    out = torch.empty((num_weights, width), dtype=grad.dtype)
    _summing = [workspace(nbytes) for nbytes in embedding.summing(rows, num_weights, width)]
    return out


# -- reductions -----------------------------------------------------------------------------------------


@operator(aten._softmax_backward_data.default)
def softmax_backward(recorder: Any, grad: Any, output: Any, dim: int, input_dtype: torch.dtype) -> Any:
    """aten/src/ATen/native/cuda/SoftMax.cu ``softmax_backward_cuda_out``: the gradient times the result is a
    tensor of its own."""
    out = torch.empty_like(grad, dtype=input_dtype)
    _product = torch.empty_like(grad)
    return out


@operator(aten.sum.default)
def sum_all(recorder: Any, tensor: Any, *, dtype: torch.dtype | None = None) -> Any:
    """aten/src/ATen/native/ReduceOpsUtils.h ``make_reduction_from_ty``: what is not of the result's dtype is
    cast first, but for 16 bits to fp32, which the kernel does."""
    result = dtype or (tensor.dtype if tensor.is_floating_point() else torch.int64)
    if tensor.dtype is result or (tensor.dtype.itemsize == 2 and result is torch.float32):
        return NotImplemented
    out = torch.empty((), dtype=result)
    _cast = torch.empty_like(tensor, dtype=result)
    return out


@operator(aten.sum.dim_IntList)
def sum_over(
    recorder: Any, tensor: Any, dims: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """Rows summed over all axes but the last: partial sums, where blocks share the work."""
    rank = tensor.dim()
    summed = sorted(dim % rank for dim in dims or range(rank))
    columns = tensor.shape[-1] if rank else 1
    if (
        not tensor.is_floating_point()
        or summed != list(range(rank - 1))
        or columns == 1
        or tensor.stride(-1) != 1
    ):
        return NotImplemented
    out = torch.empty((1,) * (rank - 1) * keepdim + (columns,), dtype=dtype or tensor.dtype)
    needed = scratch(tuple(tensor.shape), recorder.card)
    if needed is not None:
        _buffers = [workspace(nbytes) for nbytes in needed]
    return out


# -- norms ----------------------------------------------------------------------------------------------


@operator(aten.native_layer_norm.default)
def layer_norm(
    recorder: Any, x: Any, normalized: Any, weight: Any, bias: Any, eps: float
) -> tuple[Any, Any, Any]:
    """aten/src/ATen/native/cuda/layer_norm_kernel.cu ``layer_norm_cuda``: means and deviations are fp32."""
    axis = x.dim() - len(normalized)
    _x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    stats = (*x.shape[:axis], *(1,) * len(normalized))
    mean = torch.empty(stats, dtype=torch.float32)
    rstd = torch.empty(stats, dtype=torch.float32)
    return out, mean, rstd


@operator(aten.native_layer_norm_backward.default)
def layer_norm_backward(
    recorder: Any, grad: Any, x: Any, normalized: Any, mean: Any, rstd: Any, weight: Any, bias: Any, mask: Any
) -> tuple[Any, Any, Any]:
    """``layer_norm_backward_cuda``. Left out: the partial sums of more than 65,536 rows of a narrow model."""
    _x = x.contiguous()
    for_x = torch.empty(x.shape, dtype=x.dtype) if mask[0] else None
    for_weight = torch.empty_like(weight) if mask[1] else None
    for_bias = torch.empty_like(bias) if mask[2] else None
    _grad = grad.contiguous()
    return for_x, for_weight, for_bias


# -- dropout --------------------------------------------------------------------------------------------


@operator(aten.native_dropout.default)
def native_dropout(recorder: Any, tensor: Any, p: float, train: bool | None) -> tuple[Any, Any]:
    """aten/src/ATen/native/cuda/Dropout.cu ``dropout_cuda``: a mask of bools, then the output."""
    mask = torch.empty_like(tensor, dtype=torch.bool)
    return torch.empty_like(tensor), mask


@operator(aten.native_dropout_backward.default)
def native_dropout_backward(recorder: Any, grad: Any, mask: Any, scale: float) -> Any:
    """Dropout.cu ``native_dropout_backward_cuda``: one output."""
    return torch.empty_like(grad)


def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """``torch.nn.functional.dropout``: on CUDA ``at::dropout`` takes the fused kernel, which saves a mask
    of bools; on a CPU it saves noise in the input's dtype (aten/src/ATen/native/Dropout.cpp)."""
    if not training or p == 0.0 or input.numel() == 0:
        return input
    return torch.native_dropout(input, p, training)[0]


# -- norms of gradients -----------------------------------------------------------------------------------


@operator(aten._foreach_norm.Scalar)
def foreach_norm(recorder: Any, tensors: list[Any], order: Any = 2, dtype: Any = None) -> list[Any]:
    """Partial sums; then one scalar a tensor."""
    longest = max(tensor.numel() for tensor in tensors)
    _partial = workspace(foreach.partial_norms(len(tensors), longest))
    return [torch.empty((), dtype=dtype or tensor.dtype) for tensor in tensors]


# -- softmax ---------------------------------------------------------------------------------------------


def _softmax_as_fp32(kernel: Any) -> Any:
    def softmax(x: Any, dim: int, dtype: Any = None) -> Any:
        if x.dtype is torch.float16 and dtype is torch.float32:
            return kernel(x, dim, True)
        return kernel(x if dtype is None else x.to(dtype), dim, False)

    return softmax


@contextmanager
def half_to_float() -> Iterator[None]:
    """``softmax(fp16, dtype=fp32)`` and ``log_softmax`` in one kernel, with no fp32 copy of what comes in, as
    on CUDA alone (aten/src/ATen/native/SoftMax.cpp, ``input_.is_cuda()``, 2.13), while the context lasts."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("softmax.int", _softmax_as_fp32(aten._softmax.default), "AutogradCPU")
    library.impl("log_softmax.int", _softmax_as_fp32(aten._log_softmax.default), "AutogradCPU")
    try:
        yield
    finally:
        library._destroy()
