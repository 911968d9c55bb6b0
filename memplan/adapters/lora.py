"""LoRA around a linear module, on a router and on fused experts (peft/tuners/lora/layer.py, bnb.py, 0.21)."""

from __future__ import annotations

from typing import Any

from memplan.adapters import Adapter
from memplan.asked.recipe import Kernels, Recipe
from memplan.parts.leaves import Base, parameter
from memplan.shadow import ops
from memplan.shadow.matmul import baddbmm, linear, mm
from memplan.shadow.tensor import DType, Tensor, no_grad, state
from memplan.tape import Category


class Lora:
    """``lora.Linear``, and ``lora.Linear4bit`` around what is quantised."""

    __slots__ = ("base", "down", "dropout", "name", "up")

    def __init__(self, base: Base, r: int, dtype: DType, dropout: float) -> None:
        self.base, self.dropout, self.name = base, dropout, base.name
        outputs, inputs = base.shape
        name = base.name
        self.down = parameter((r, inputs), dtype, name + ".lora_A", Category.ADAPTERS, True)
        self.up = parameter((outputs, r), dtype, name + ".lora_B", Category.ADAPTERS, True)

    def __call__(self, x: Tensor) -> Tensor:
        result = self.base(x)
        dtype = result.dtype
        if self.base.quantised:
            result = ops.clone(result, preserve=True)
            if state.autocast is None:
                x = ops.to(x, self.down.dtype)
            output = ops.scale(self.update(x))
            if state.autocast is None:
                output = ops.to(output, dtype)
            result = ops.add(result, output)
            return result
        x = ops.to(x, self.down.dtype if state.spread is None else state.spread.resting(self.down))
        result = ops.add(result, ops.scale(self.update(x)))
        return ops.to(result, dtype)

    def update(self, x: Tensor) -> Tensor:
        """``lora_B(lora_A(dropout(x)))``."""
        if state.spread is None:
            return linear(linear(ops.dropout(x, self.dropout), self.down), self.up)
        module, name = state.spread.module, self.name
        x = module(f"{name}.lora_dropout", ops.dropout, x, self.dropout)
        x = module(f"{name}.lora_A", linear, x, self.down)
        return module(f"{name}.lora_B", linear, x, self.up)  # type: ignore[no-any-return]

    def trainable(self) -> list[Tensor]:
        return [self.down, self.up]


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


def _around(base: Base, recipe: Recipe, dtype: DType) -> Lora:
    kind: type[Lora] = Lora
    if recipe.kernels is Kernels.MEMPLAN and base.quantised:
        from memplan.adapters._memplan_kernels import NF4Lora

        kind = NF4Lora
    return kind(base, recipe.r, dtype, recipe.lora_dropout)


def _parameter(weight: Tensor, name: str, rank: int, dtype: DType) -> ParameterLora:
    kind = RouterLora if len(weight.shape) == 2 else ExpertLora
    return kind(weight, name, rank, dtype)


ADAPTER = Adapter(_around, lambda shape, recipe: recipe.r * sum(shape), _parameter)
