"""Leaf modules: parameters on the tape, and forwards that read like the library's.

Sources: torch.nn, transformers' norms and embeddings, and bitsandbytes/nn/modules.py,
autograd/_functions.py and backends/cuda/ops.py (0.50).
"""

from __future__ import annotations

from math import prod
from typing import Any

from memplan.cuda.gemm_4bit import fused
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, require_grad
from memplan.shadow.matmul import linear, product
from memplan.shadow.tensor import DType, Shape, Tensor, category, empty, float32, int64, state, uint8
from memplan.tape import Category

NF4_BLOCK = 64  # weights that share a scale (bitsandbytes/functional.py, quantize_4bit)
NESTED_BLOCK = 256  # scales that share a second-order scale under double quantisation


def parameter(shape: Shape, dtype: DType, name: str, kind: Category, trainable: bool) -> Tensor:
    """A leaf tensor."""
    state.tape.module = name
    with category(kind):
        tensor = empty(shape, dtype, "parameter")
    if trainable:
        require_grad(tensor, parameter=True)
    return tensor


def buffer(shape: Shape, dtype: DType, name: str, kind: Category) -> Tensor:
    """A tensor that is only kept."""
    return parameter(shape, dtype, name, kind, False)


class Linear:
    """``nn.Linear``."""

    __slots__ = ("bias", "name", "weight")

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        self.name, self.weight, self.bias = name, weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        return linear(x, self.weight, self.bias)


class Linear4bit:
    """``bnb.nn.Linear4bit``: half a byte a weight, scales, and a dequantised copy when it runs."""

    __slots__ = ("bias", "compute_dtype", "name", "nested", "quantized", "shape", "state_dtype", "tensors")

    def __init__(
        self,
        name: str,
        shape: Shape,
        bias: bool,
        compute_dtype: DType,
        *,
        nested: bool,
        blocks: int = NF4_BLOCK,
    ) -> None:
        self.name, self.shape, self.compute_dtype, self.nested = name, shape, compute_dtype, nested
        self.state_dtype = compute_dtype  # QuantState.dtype: that of the weight it was made from
        count = prod(shape)
        scales = -(-count // blocks)
        self.quantized = buffer(((count + 1) // 2, 1), uint8, name + ".weight", Category.WEIGHTS)
        # Biases end in the compute dtype whatever they were: Linear4bit.forward rewrites bias.data.
        self.bias = buffer((shape[0],), compute_dtype, name + ".bias", Category.WEIGHTS) if bias else None
        kind = Category.QUANTIZATION_STATE
        self.tensors = [buffer((scales,), uint8 if nested else float32, name + ".absmax", kind)]
        self.tensors.append(buffer((16,), float32, name + ".quant_map", kind))
        if nested:
            self.tensors += [
                buffer((), float32, name + ".offset", kind),
                buffer((-(-scales // NESTED_BLOCK),), float32, name + ".nested_absmax", kind),
                buffer((256,), float32, name + ".nested_quant_map", kind),
            ]

    def __call__(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        dtype = x.dtype
        x = ops.to(x, self.compute_dtype)
        return ops.to(self._matmul(x), dtype)

    def _matmul(self, x: Tensor) -> Tensor:
        """MatMul4Bit.forward -> gemm_4bit -> _dequant_linear_fallback."""
        node = Node(_matmul_4bit_backward, x) if ops.tracked(x) else None
        out = self._product(x)
        if node is not None:
            node.context = self, x.shape
            attach(node, out)
        return out

    def _product(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.shape[0])
        if fused(prod(x.shape[:-1]), self.shape[0], self.shape[1], x.dtype):
            return empty(shape, x.dtype, "gemm_4bit")
        scales = self._forward_scales()
        weight = empty(self.shape, x.dtype, "gemm_4bit")
        out = product(shape, x.dtype, "gemm_4bit")
        del scales, weight
        return out

    def _forward_scales(self) -> list[Tensor]:
        if not self.nested:
            return []
        scales = self.tensors[0].shape
        return [empty(scales, float32, "gemm_4bit") for _ in range(2)]  # dequantised, and plus the offset

    def dequantized(self, dtype: DType | None) -> Tensor:
        """``F.dequantize_4bit(B, state)``, ``.to(dtype)`` if given."""
        scales = empty(self.tensors[0].shape, float32, "dequantize_blockwise") if self.nested else None
        weight = empty(self.shape, self.state_dtype, "dequantize_4bit")
        del scales
        return weight if dtype is None else ops.to(weight, dtype)


def _matmul_4bit_backward(node: Node, grad: Tensor) -> Any:
    module, shape = node.context
    weight = module.dequantized(grad.dtype)
    if grad.strides is not None:
        grad = ops.contiguous(grad)
    out = product(shape, grad.dtype, "mm")
    del weight
    return (out,)  # torch.matmul folds and unfolds: _unsafe_view is no view to autograd


class RMSNorm:
    """The RMS norms of the families: they differ in where they cast back and in the weight.

    ``style``: ``llama`` casts before the weight, ``olmo2`` after it, ``gemma`` multiplies by 1 + weight
    in fp32 and casts last.
    """

    __slots__ = ("name", "style", "weight")

    def __init__(self, name: str, weight: Tensor, style: str) -> None:
        self.name, self.weight, self.style = name, weight, style

    def __call__(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        if self.style == "gemma":
            return self._gemma(x)
        dtype = x.dtype
        x = ops.to(x, float32)
        variance = ops.mean_last(ops.square(x))
        x = ops.mul(x, ops.rsqrt(ops.shift(variance)))
        if self.style == "olmo2":
            return ops.to(ops.mul(self.weight, x), dtype)
        return ops.mul(self.weight, ops.to(x, dtype))

    def _gemma(self, x: Tensor) -> Tensor:
        output = self._normalize(ops.to(x, float32))
        output = ops.mul(output, ops.shift(ops.to(self.weight, float32)))
        return ops.to(output, x.dtype)

    def _normalize(self, x: Tensor) -> Tensor:
        return ops.mul(x, ops.rsqrt(ops.shift(ops.mean_last(ops.square(x)))))


class Embedding:
    """``nn.Embedding``; Gemma's multiplies by a scalar buffer."""

    __slots__ = ("name", "requires_grad_hook", "scale", "weight")

    def __init__(self, weight: Tensor, scale: Tensor | None, requires_grad_hook: bool) -> None:
        self.name = "model.embed_tokens"
        self.weight, self.scale, self.requires_grad_hook = weight, scale, requires_grad_hook

    def __call__(self, ids: Tensor) -> Tensor:
        state.tape.module = self.name
        weight = self.weight
        shape = (*ids.shape, weight.shape[1])
        out = empty(shape, weight.dtype, "embedding")
        if ops.tracked(weight):
            node = Node(_embedding_backward, weight)
            node.saved = ids
            node.context = weight.shape
            attach(node, out)
        if self.scale is not None:
            scale = ops.to(self.scale, weight.dtype)
            out = ops.mul(out, scale) if out.requires_grad else ops.pointwise("mul", out)
        if self.requires_grad_hook and out.node is None:
            require_grad(out, parameter=False)
        return out


_SORTED_FROM = 3072  # indices; up to here one kernel does without sorting


def _embedding_backward(node: Node, grad: Tensor) -> Any:
    """embedding_dense_backward_cuda (ATen/native/cuda/Embedding.cu): more indices are sorted and summed in
    fp32 parts of 10 rows (EmbeddingBackwardKernel.cu), sized for the case that all of them differ. cub's own
    scratch for the sort, some bytes an index, is left out."""
    operation = "embedding_dense_backward"
    entries, width = node.context
    rows = prod(grad.shape[:-1])
    if rows <= _SORTED_FROM:
        return (empty(node.context, grad.dtype, operation),)
    scratch = [empty((rows,), int64, operation) for _ in range(2)]
    out = empty(node.context, grad.dtype, operation)
    segments = min(rows, entries)
    parts = rows // 10 + segments
    for count in (rows, 1, segments, segments, 1, parts):
        scratch.append(empty((count,), int64, operation))
    scratch.append(empty((parts, width), float32, operation))
    return (out,)
