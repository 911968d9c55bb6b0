"""bitsandbytes' 4-bit weights, NF4 and FP4 (bitsandbytes/nn/modules.py, autograd/_functions.py and
backends/cuda/ops.py, 0.50)."""

from __future__ import annotations

from math import prod
from typing import Any

from memplan.cuda.gemm_4bit import fused
from memplan.parts.leaves import buffer
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach
from memplan.shadow.matmul import product
from memplan.shadow.tensor import DType, Shape, Tensor, empty, float32, state, uint8
from memplan.tape import Category

NF4_BLOCK = 64  # weights that share a scale (bitsandbytes/functional.py, quantize_4bit)
NESTED_BLOCK = 256  # scales that share a second-order scale under double quantisation


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
