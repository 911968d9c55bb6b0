"""Indexing on CUDA: masks become indices first, and gradients are added to rows in sorted order.

Sources: pytorch aten/src/ATen/native/TensorAdvancedIndexing.cpp, IndexingUtils.h ``expandTensors``,
cuda/Nonzero.cu, cuda/Indexing.cu, cuda/IndexKernel.cpp (2.13). cub's scratch for counting, scanning and
sorting (some bytes an index) is left out. How much of a mask is true is known where the recorder has an
answer for the function that indexes by it: all of it.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from memplan.cuda import indexing as cuda
from memplan.trace.operators import operator, workspace

aten = torch.ops.aten


def _is_mask(indices: Any) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype is torch.bool


def _caller() -> str:
    """The Python function that called the operator: past this one, the stand-in, Recorder._stand_in and
    Recorder.__torch_dispatch__."""
    return sys._getframe(4).f_code.co_name


def nonzero(mask: Any, count: int | None = None) -> Any:
    """Nonzero.cu ``nonzero_cuda_out_impl``: the count, then a row of int64 for each axis."""
    _count = workspace(cuda.COUNT)
    found = mask.numel() if count is None else count
    return workspace(cuda.nonzero(mask.dim(), found)).view(torch.int64).view(mask.dim(), -1)


@operator(aten.index.Tensor)
def index(recorder: Any, x: Any, indices: Any) -> Any:
    """By a mask; or by one index for each axis, which CUDA makes alike first (TensorAdvancedIndexing.cpp
    ``make_info``). Other indices are no stand-in's business: they allocate the output alone."""
    if not _is_mask(indices):
        return _index_each_axis(x, indices)
    (mask,) = indices
    count = recorder.known.count(mask)
    if count is None and _caller() in recorder.answers:
        count = mask.numel()
    if count is None:
        return NotImplemented
    _indices = nonzero(mask, count)
    return torch.empty((count, *x.shape[mask.dim() :]), dtype=x.dtype)


def _index_each_axis(x: Any, indices: Any) -> Any:
    if len(indices) != x.dim() or any(index is None or index.dtype is torch.bool for index in indices):
        return NotImplemented
    expanded = torch.broadcast_tensors(*indices)
    if all(index.stride() == expanded[0].stride() for index in expanded):
        return NotImplemented
    _alike = [index.contiguous() for index in expanded]
    return torch.empty(expanded[0].shape, dtype=x.dtype)


@operator(aten.cumsum.default)
def cumsum(recorder: Any, x: Any, dim: int, *, dtype: Any = None) -> Any:
    """ReduceOps.cpp ``impl_func_cum_ops``, which converts what it adds up first. The counts of experts'
    tokens are floats on a CPU alone (``grouped_mm_experts_forward``)."""
    result = dtype or torch.int64
    if x.is_floating_point() or x.dtype is result:
        return NotImplemented
    converted = x.to(result)
    return torch.empty(x.shape, dtype=converted.dtype)


@operator(aten.repeat_interleave.Tensor)
def repeat_interleave(recorder: Any, repeats: Any, *, output_size: int | None = None) -> Any:
    """aten/src/ATen/native/Repeat.h ``repeat_interleave_common``: running sums, then the places."""
    total = recorder.known.count(repeats)
    if total is None:
        return NotImplemented
    _sums = torch.empty(repeats.shape, dtype=torch.int64)
    return torch.empty((total,), dtype=repeats.dtype)


@operator(aten.masked_scatter_backward.default)
def masked_scatter_backward(recorder: Any, grad: Any, mask: Any, sizes: Any) -> Any:
    """``masked_select`` of the gradient (torch/csrc/autograd/FunctionsManual.cpp), which indexes by the mask
    spread out (IndexKernel.cpp ``masked_select_out_cuda_impl``)."""
    count = math.prod(sizes)
    _indices = nonzero(grad, count)
    return torch.empty(count, dtype=grad.dtype).view(sizes)


@operator(aten.masked_scatter.default)
def masked_scatter(recorder: Any, x: Any, mask: Any, source: Any) -> Any:
    """A copy (TensorAdvancedIndexing.cpp), and the places of the mask's elements (IndexKernel.cpp
    ``masked_scatter__cuda``), which is spread out first (IndexKernel.cu ``launch_masked_scatter_kernel``)."""
    out = torch.empty(x.shape, dtype=x.dtype)
    _prefix_sum = workspace(cuda.places(x.numel()))
    _mask = mask.expand(x.shape).contiguous()
    return out


@operator(aten.index_put_.default)
def index_put(recorder: Any, x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    """Indexing.cu ``index_put_with_sort_kernel``, which adds rows in the order of their numbers; what is
    put, not added, goes where the mask's indices say."""
    if not accumulate:
        return _put(recorder, x, indices)
    if len(indices) != 1:
        return NotImplemented
    linear = _linear_index(indices[0], recorder.known.count(indices[0]))
    _values = values.contiguous()
    _sorting = [workspace(nbytes) for nbytes in cuda.sorting(linear.numel())]
    return x


@operator(aten.index_put.default)
def index_put_apart(recorder: Any, x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    """A copy, in which it is done."""
    if accumulate:
        return NotImplemented
    out = torch.empty_like(x)
    return _put(recorder, out, indices)


def _put(recorder: Any, x: Any, indices: Any) -> Any:
    masks = [one for one in indices if one is not None and one.dtype is torch.bool]
    counts = [recorder.known.count(mask) for mask in masks]
    if not masks or None in counts:
        return NotImplemented
    _indices = [nonzero(mask, count) for mask, count in zip(masks, counts, strict=True)]
    return x


def _linear_index(given: Any, count: int | None = None) -> Any:
    """``makeLinearIndex``, ``computeLinearIndex``: each axis's index modulo its size, times its stride."""
    held = nonzero(given, count) if given.dtype is torch.bool else given.view(1, -1)
    linear = None
    for row in held:
        remainder = torch.empty(row.shape, dtype=torch.int64)
        product = torch.empty(row.shape, dtype=torch.int64)
        del remainder
        if linear is None:
            linear = product
        del product
    return linear


@operator(aten.equal.default)
def equal(recorder: Any, x: Any, y: Any) -> Any:
    """cuda/Equal.cpp ``cuda_equal``: a comparison of each element, then whether all hold. Liger-Kernel
    compares the loss's gradient with a number that it has put on the card; the answer changes no memory."""
    caller = _caller()
    if caller not in recorder.answers:
        return NotImplemented
    compared = torch.empty(x.shape, dtype=torch.bool)
    _all = torch.empty((), dtype=torch.bool)
    del compared
    return recorder.answers[caller]
