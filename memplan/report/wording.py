"""A recipe in words: one short phrase for each setting that counts in its mode."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memplan.asked.recipe import Recipe


def short_card(gpu: str) -> str:
    """A card's name without the vendor's, which most of them share."""
    return gpu.removeprefix("NVIDIA ").removeprefix("GeForce ")


def phrases(recipe: Recipe) -> dict[str, str]:
    """Phrases by field, for a resolved recipe."""
    from memplan.asked.recipe import recipe_options

    result = {}
    for name, option in recipe_options().items():
        if option.phrase is not None and recipe.mode.value in option.modes:
            phrase = option.phrase(recipe)
            if phrase is not None:
                result[name] = phrase
    return result


def asked_and_default(
    recipe: Recipe, given: Collection[str], fields: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """The phrases of what was asked, mode first, and of what was left to the defaults: of these, ``fields``
    if they are named."""
    from memplan.asked.recipe import recipe_options

    told = {"mode", *given, *(recipe_options()[name].told_with for name in given)}
    found = phrases(recipe)
    return (
        [phrase for field, phrase in found.items() if field in told],
        [phrase for field, phrase in found.items() if field not in told and (not fields or field in fields)],
    )


def common_and_own(recipes: list[Recipe]) -> tuple[list[str], list[list[str]]]:
    """The phrases that all the recipes share, and those that each has to itself; modes left out."""
    told = [phrases(recipe) for recipe in recipes]
    for one in told:
        del one["mode"]
    shared = {
        field: phrase for field, phrase in told[0].items() if all(one.get(field) == phrase for one in told)
    }
    own = [[phrase for field, phrase in one.items() if field not in shared] for one in told]
    return list(shared.values()), own


def micro_steps(recipe: Recipe, provenance: str) -> str:
    """What a predicted tape leaves out of a step that accumulates gradients (``predict/step.py``)."""
    number = recipe.gradient_accumulation_steps
    if provenance != "predicted" or number <= 2:
        return ""
    return f"Two of {number} micro-steps are shown: the others are like the second."
