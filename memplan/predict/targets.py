"""Which modules get an adapter: PEFT's ``target_modules`` (peft/tuners/tuners_utils.py, 0.21)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from memplan import losses
from memplan.asked.options import ATTENTION, TARGET_PRESETS
from memplan.asked.recipe import Recipe
from memplan.errors import RecipeError, printable

if sys.version_info >= (3, 11):
    from re import _constants as sre_constants  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:
    import sre_constants
    import sre_parse

# The q,v default by family: PEFT's TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING names the fused
# projection where a family has one.
_QUERY_VALUE = ("q_proj", "v_proj", "qkv_proj")

# To one number, or to one a head or an expert: usual ranks are above that, and PEFT takes them.
_NARROW = ("linear_attn.in_proj_a", "linear_attn.in_proj_b", "mlp.shared_expert_gate", "router.proj")


def is_target(wanted: str | tuple[str, ...], full_name: str) -> bool:
    """Whether the linear module ``full_name`` (``model.layers.3.mlp.up_proj``) is adapted."""
    if wanted == "all-linear":
        # every linear layer but the output embedding
        return not full_name.endswith("lm_head")
    if wanted == "attention":
        wanted = ATTENTION
    elif wanted in ("q,v", "qv"):
        wanted = _QUERY_VALUE
    if isinstance(wanted, str):
        return _pattern(wanted).fullmatch(full_name) is not None
    return names_module(wanted, full_name)


@lru_cache(maxsize=64)
def _pattern(text: str) -> re.Pattern[str]:
    try:
        parsed, pattern = sre_parse.parse(text), re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise RecipeError(
            f"target_modules {printable(repr(text))} is no valid regular expression: {error}"
        ) from None
    if _repeats_repetitions(parsed):
        raise RecipeError(
            f"target_modules {printable(repr(text))} repeats what is repeated itself, which may never end; "
            "write it with one * or + at a time"
        )
    return pattern


def _repeats_repetitions(parsed: Any, inside: bool = False) -> bool:
    """Whether an unbounded repetition stands in another: Python's matching tries every way to share a text
    between the two."""
    for operator, argument in parsed:
        within = inside
        if str(operator) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            unbounded = argument[1] is sre_constants.MAXREPEAT
            if unbounded and inside:
                return True
            within = inside or unbounded
        parts = [it for it in _flat(argument) if isinstance(it, sre_parse.SubPattern)]
        if any(_repeats_repetitions(part, within) for part in parts):
            return True
    return False


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def names_module(names: Iterable[str], full_name: str) -> bool:
    """Whether one of ``names`` is the module's name or the end of it."""
    return any(full_name == name or full_name.endswith("." + name) for name in names)


def is_saved(names: Iterable[str], full_name: str) -> bool:
    """Whether ``modules_to_save`` names the module: by the end of its name, in the middle of a word even, so
    that ``norm`` is every ``input_layernorm`` too (peft/utils/other.py, _set_trainable, 0.21)."""
    return any(full_name.endswith(name) for name in names)


def check(
    recipe: Recipe,
    adapted: dict[str, tuple[int, ...]],
    linear: Iterable[str],
    names: dict[str, str],
) -> None:
    """Refuse targets that match nothing, ranks that exceed a matrix, and modules that are not there.

    ``adapted`` are the matching modules' shapes, ``linear`` all linear modules, ``names`` all modules' kinds.
    Raises RecipeError.
    """
    if is_target(recipe.target_modules, "model.embed_tokens") and recipe.target_modules not in TARGET_PRESETS:
        raise RecipeError(
            "target_modules names embed_tokens, and adapters on embeddings are not modelled: "
            "leave it out, or train it whole with modules_to_save"
        )
    if losses.find(recipe.loss).tiled and "lm_head" in adapted:
        raise RecipeError(
            f"the loss {recipe.loss} reads lm_head's weight and passes an adapter by: "
            "leave lm_head out of target_modules, or use the standard loss"
        )
    if not adapted:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise RecipeError(
            f"target_modules {printable(repr(recipe.target_modules))} matches no linear module of this "
            f"model; it has {', '.join(known)}"
        )
    sized = {name: shape for name, shape in adapted.items() if not name.endswith(_NARROW)} or adapted
    name, shape = min(sized.items(), key=lambda item: min(item[1]))
    if recipe.r > min(shape):
        raise RecipeError(
            f"r={recipe.r} is larger than the smallest matrix it adapts ({name}, {shape[0]}×{shape[1]}); "
            f"use r of at most {min(shape)}"
        )
    for module in recipe.modules_to_save:
        kinds = {kind for known, kind in names.items() if is_saved((module,), known)}
        if not kinds:
            raise RecipeError(f"modules_to_save {module!r} matches no module of this model")
        if kinds - {"embedding", "norm", "head"}:
            raise RecipeError(
                f"modules_to_save {module!r} names a projection inside the layers; adapt it with "
                "target_modules, and save whole only embed_tokens, lm_head or norms"
            )
