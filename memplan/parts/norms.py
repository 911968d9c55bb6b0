"""Norms, and what differs between the families' (transformers 5.23, ``modeling_*.py``)."""

from __future__ import annotations

from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, float32, state


class RMSNorm:
    """Llama's and most others': casts back before the weight is multiplied by."""

    __slots__ = ("name", "weight")

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.weight = name, weight

    def __call__(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        dtype = x.dtype
        x = ops.to(x, float32)
        variance = ops.mean_last(ops.square(x))
        x = ops.mul(x, ops.rsqrt(ops.shift(variance)))
        return ops.mul(self.weight, ops.to(x, dtype))


class LateCastNorm(RMSNorm):
    """Casts back after the weight."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        dtype = x.dtype
        x = ops.to(x, float32)
        variance = ops.mean_last(ops.square(x))
        x = ops.mul(x, ops.rsqrt(ops.shift(variance)))
        return ops.to(ops.mul(self.weight, x), dtype)


class CenteredNorm(RMSNorm):
    """Cohere's: the mean is taken off first, and the weight multiplies in fp32. It has no bias."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        dtype = x.dtype
        x = ops.to(x, float32)
        mean = ops.mean_last(x)
        variance = ops.mean_last(ops.square(ops.sub(x, mean)))
        x = ops.mul(ops.sub(x, mean), ops.rsqrt(ops.shift(variance)))
        x = ops.mul(ops.to(self.weight, float32), x)
        return ops.to(x, dtype)


class GemmaNorm(RMSNorm):
    """Multiplies by 1 + weight in fp32 and casts last."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        output = self._normalize(ops.to(x, float32))
        output = ops.mul(output, ops.shift(ops.to(self.weight, float32)))
        return ops.to(output, x.dtype)

    def _normalize(self, x: Tensor) -> Tensor:
        return ops.mul(x, ops.rsqrt(ops.shift(ops.mean_last(ops.square(x)))))


class LayerNorm(RMSNorm):
    """``nn.LayerNorm``, one kernel, which autocast runs in fp32."""

    __slots__ = ("bias",)

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(name, weight)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        return ops.layer_norm(x, self.weight, self.bias)
