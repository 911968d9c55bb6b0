"""bitsandbytes' optimizers, which update in place (bitsandbytes/optim/optimizer.py, 0.50), as the Trainer
makes them (transformers/trainer_optimizer.py, 5.23)."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from memplan.asked.recipe import Recipe
from memplan.optimizers import Optimizer, Shapes
from memplan.shadow.tensor import DType, Shape, float32, uint8

if TYPE_CHECKING:
    import torch

_MIN_8BIT_SIZE = 4096  # smaller parameters keep 32-bit states
_BLOCK_8BIT = 256
_PAGED_FROM = 100_000  # smaller states stay on the device


def optimizer(kind: str, *, bits: int, paged: bool) -> Optimizer:
    """``bitsandbytes.optim``'s ``kind``, with states of so many bits."""
    moments = 1 if kind == "Lion" else 2

    def states(shape: Shape, dtype: DType, recipe: Recipe, embedding: bool) -> Shapes:
        count = prod(shape)
        pages = paged and count >= _PAGED_FROM
        if bits == 32 or count < _MIN_8BIT_SIZE or embedding:
            return [] if pages else [(shape, float32)] * moments
        blocks = -(-count // _BLOCK_8BIT)
        scales: Shapes = [((blocks,), float32)] * moments
        return scales if pages else [(shape, uint8)] * moments + scales

    def real(parameters: list[dict[str, Any]], model: Any, recipe: Recipe) -> torch.optim.Optimizer:
        import bitsandbytes as bnb
        from torch import nn

        made: torch.optim.Optimizer = getattr(bnb.optim, kind)(
            parameters, lr=1e-4, optim_bits=bits, is_paged=paged
        )
        if bits == 8:
            manager = bnb.optim.GlobalOptimManager.get_instance()
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    manager.register_module_override(module, "weight", {"optim_bits": 32})
        return made

    return Optimizer(states, real, maps=moments if bits == 8 else 0, paged=paged, bitsandbytes=True)
