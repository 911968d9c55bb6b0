"""DoRA around a linear module (peft/tuners/lora/dora.py, variants.py, 0.21)."""

from __future__ import annotations

from memplan.adapters import Adapter
from memplan.adapters.lora import Lora
from memplan.asked.recipe import Recipe
from memplan.parts.leaves import Base, parameter
from memplan.shadow import ops
from memplan.shadow.matmul import linear
from memplan.shadow.tensor import DTYPES, DType, Tensor, empty, float32, no_grad, state
from memplan.tape import Category


class Dora(Lora):
    """DoraLinearVariant: a trainable magnitude for each output, and the norm of weight plus update anew in
    every forward."""

    __slots__ = ("magnitude",)

    def __init__(self, base: Base, r: int, dtype: DType, dropout: float, *, of: DType) -> None:
        super().__init__(base, r, dtype, dropout)
        outputs = base.shape[0]
        name = base.name + ".lora_magnitude_vector"
        self.magnitude = parameter((outputs,), of, name, Category.ADAPTERS, True)

    def __call__(self, x: Tensor) -> Tensor:
        result = self.base(x)
        dtype = result.dtype
        if self.base.quantised:
            result = ops.clone(result, preserve=True)
        if not self.base.quantised or state.autocast is None:
            x = ops.to(x, self.down.dtype)
        result = self._variant(x, result)
        if self.base.quantised and state.autocast is not None:
            return result
        return ops.to(result, dtype)

    def trainable(self) -> list[Tensor]:
        return [*super().trainable(), self.magnitude]

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
        weight = self.base.dense()
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


def _around(base: Base, recipe: Recipe, dtype: DType) -> Dora:
    # It is made of weight plus update, which in two 16-bit dtypes add up to fp32; and TRL casts all adapters
    # but this vector back (trl/trainer/sft_trainer.py, 1.16).
    mixed = base.quantised and dtype is not DTYPES[recipe.dtype.value]
    of = float32 if recipe.casts_adapters_back or mixed else dtype
    return Dora(base, recipe.r, dtype, recipe.lora_dropout, of=of)


ADAPTER = Adapter(_around, lambda shape, recipe: recipe.r * sum(shape) + shape[0])
