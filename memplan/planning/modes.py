"""The modes that a checkpoint can be trained in."""

from __future__ import annotations

from memplan.asked.recipe import Mode
from memplan.asked.spec import ModelSpec


def possible_modes(spec: ModelSpec) -> tuple[Mode, ...]:
    """Those that nobody refuses: weights in 4 bits are trained in QLoRA only
    (:func:`memplan.predict.parameters.resolve_recipe`)."""
    return tuple(Mode) if spec.quantization is None else (Mode.QLORA,)
