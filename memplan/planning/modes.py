"""The modes that a checkpoint can be trained in."""

from __future__ import annotations

from memplan.asked.recipe import Mode, Recipe
from memplan.asked.spec import ModelSpec


def possible_modes(spec: ModelSpec) -> tuple[Mode, ...]:
    """Those that nobody refuses: weights in 4 bits are trained in QLoRA only, and those in MXFP4 are not
    (:func:`memplan.predict.parameters.resolve_recipe`)."""
    if spec.mxfp4:
        return Mode.FULL, Mode.LORA
    return tuple(Mode) if spec.quantization is None else (Mode.QLORA,)


def in_its_mode(spec: ModelSpec, recipe: Recipe) -> Recipe:
    """The recipe; where nobody asked for a mode, in one that the checkpoint has."""
    if "mode" in recipe.model_fields_set or recipe.mode in possible_modes(spec):
        return recipe
    return Recipe(**{**recipe.model_dump(exclude_unset=True), "mode": Mode.LORA})
