"""LoRA and DoRA around a linear module, LoRA on a router and on fused experts
(peft/tuners/lora/layer.py, bnb.py, dora.py, variants.py, 0.21)."""

from __future__ import annotations

from typing import Any

from memplan.parts.leaves import Linear, parameter
from memplan.shadow import ops
from memplan.shadow.matmul import baddbmm, linear, mm
from memplan.shadow.tensor import DType, Tensor, empty, float32, no_grad, state
from memplan.tape import Category
from memplan.weights.bnb_4bit import Linear4bit


class Lora:
    """``lora.Linear`` around :class:`Linear`, ``lora.Linear4bit`` around :class:`Linear4bit`."""

    __slots__ = ("base", "down", "dropout", "name", "up")

    def __init__(self, base: Linear | Linear4bit, r: int, dtype: DType, dropout: float) -> None:
        self.base, self.dropout, self.name = base, dropout, base.name
        outputs, inputs = base.weight.shape if isinstance(base, Linear) else base.shape
        name = base.name
        self.down = parameter((r, inputs), dtype, name + ".lora_A", Category.ADAPTERS, True)
        self.up = parameter((outputs, r), dtype, name + ".lora_B", Category.ADAPTERS, True)

    def __call__(self, x: Tensor) -> Tensor:
        result = self.base(x)
        dtype = result.dtype
        if isinstance(self.base, Linear4bit):
            result = ops.clone(result, preserve=True)
            if state.autocast is None:
                x = ops.to(x, self.down.dtype)
            output = ops.scale(linear(linear(ops.dropout(x, self.dropout), self.down), self.up))
            if state.autocast is None:
                output = ops.to(output, dtype)
            result = ops.add(result, output)
            return result
        x = ops.to(x, self.down.dtype)
        result = ops.add(result, ops.scale(linear(linear(ops.dropout(x, self.dropout), self.down), self.up)))
        return ops.to(result, dtype)


class Dora(Lora):
    """DoraLinearVariant: a trainable magnitude for each output, and the norm of weight plus update anew in
    every forward."""

    __slots__ = ("magnitude",)

    def __init__(self, base: Linear | Linear4bit, r: int, dtype: DType, dropout: float) -> None:
        super().__init__(base, r, dtype, dropout)
        outputs = base.weight.shape[0] if isinstance(base, Linear) else base.shape[0]
        name = base.name + ".lora_magnitude_vector"
        self.magnitude = parameter((outputs,), dtype, name, Category.ADAPTERS, True)

    def __call__(self, x: Tensor) -> Tensor:
        result = self.base(x)
        dtype = result.dtype
        if isinstance(self.base, Linear4bit):
            result = ops.clone(result, preserve=True)
        if not isinstance(self.base, Linear4bit) or state.autocast is None:
            x = ops.to(x, self.down.dtype)
        result = self._variant(x, result)
        if isinstance(self.base, Linear4bit) and state.autocast is not None:
            return result
        return ops.to(result, dtype)

    def _variant(self, x: Tensor, result: Tensor) -> Tensor:
        """DoraLinearVariant.forward: without dropout the base's result is reused."""
        base_result: Tensor | None = result
        if self.dropout:
            x = ops.dropout(x, self.dropout)
            base_result = None
        return ops.add(result, self._extra(x, base_result))

    def _extra(self, x: Tensor, base_result: Tensor | None) -> Tensor:
        """DoraLinearLayer.forward."""
        inputs = self.down.shape[1]
        eye = empty((inputs, inputs), self.down.dtype, "eye")
        lora_weight = ops.transpose(linear(linear(eye, self.down), self.up), 0, 1)
        del eye
        lora_weight = ops.to(lora_weight, x.dtype)
        weight: Any = self.base.weight if isinstance(self.base, Linear) else self.base.dequantized(None)
        weight = ops.to(weight, x.dtype)
        with no_grad():
            norm = self._weight_norm(weight, lora_weight)
        ratio = ops.view(ops.divide(self.magnitude, norm), (1, norm.shape[0]))
        lora_result = linear(linear(x, self.down), self.up)
        if base_result is None:
            base_result = linear(x, weight)
        elif self.base.bias is not None:
            base_result = ops.add(base_result, self.base.bias)
        return ops.add(ops.mul(ops.shift(ratio, "sub"), base_result), ops.scale(ops.mul(ratio, lora_result)))

    def _weight_norm(self, weight: Tensor, lora_weight: Tensor) -> Tensor:
        summed = ops.pointwise("add", weight, ops.pointwise("mul", lora_weight))
        # an fp32 operation of autocast (ATen/autocast_mode.h, AT_FORALL_FP32_SET_OPT_DTYPE), cast back
        dtype = summed.dtype if state.autocast is None else float32
        return ops.to(empty((summed.shape[0],), dtype, "linalg_vector_norm"), summed.dtype)


class ParameterLora:
    """``ParamWrapper`` on a parameter that no linear module owns: what is multiplied by is made anew in every
    forward, and once more when the parametrisation is registered."""

    __slots__ = ("down", "name", "up", "weight")

    weight: Tensor
    name: str
    down: Tensor
    up: Tensor

    def factors(self) -> Any:
        """What :meth:`fold` adds, in the weight's dtype."""
        raise NotImplementedError

    def fold(self, factors: Any) -> Tensor:
        """Weight plus update."""
        raise NotImplementedError

    def activate(self) -> Any:
        """``_activate_lora``: the factors, and register_parametrization's trial of them without gradients."""
        state.tape.module = self.name
        factors = self.factors()
        with no_grad():
            self.fold(factors)
        return factors


class RouterLora(ParameterLora):
    """On a matrix."""

    __slots__ = ()

    def __init__(self, weight: Tensor, name: str, r: int, dtype: DType) -> None:
        outputs, inputs = weight.shape
        self.weight, self.name = weight, name
        self.down = parameter((r, inputs), dtype, name + ".lora_A", Category.ADAPTERS, True)
        self.up = parameter((outputs, r), dtype, name + ".lora_B", Category.ADAPTERS, True)

    def factors(self) -> Tensor:
        """The update, in the weight's dtype."""
        return ops.to(ops.scale(mm(self.up, self.down)), self.weight.dtype)

    def fold(self, update: Tensor) -> Tensor:
        """Weight plus update."""
        return ops.add(self.weight, update)


class ExpertLora(ParameterLora):
    """On a stack of experts [X, out, in]: rank r for each of them, folded into a copy of the whole stack
    (_LoraFactorsProxy)."""

    __slots__ = ()

    def __init__(self, weight: Tensor, name: str, r: int, dtype: DType) -> None:
        experts, outputs, inputs = weight.shape
        self.weight, self.name = weight, name
        self.down = parameter((r * experts, inputs), dtype, name + ".lora_A", Category.ADAPTERS, True)
        self.up = parameter((outputs, r * experts), dtype, name + ".lora_B", Category.ADAPTERS, True)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Up [X, out, r] and down [X, r, in] in the weight's dtype."""
        experts, outputs, inputs = self.weight.shape
        rank = self.down.shape[0] // experts
        down = ops.view(self.down, (experts, rank, inputs))
        up = ops.permute(ops.view(self.up, (outputs, rank, experts)), (2, 0, 1))
        dtype = self.weight.dtype
        return ops.to(up, dtype), ops.to(down, dtype)

    def fold(self, factors: tuple[Tensor, Tensor]) -> Tensor:
        """``torch.baddbmm(W, up, down)``."""
        return baddbmm(self.weight, *factors)
