"""Model + recipe -> Plan by way of the tracer: the same record as :func:`memplan.planning.plan.plan`.

torch and its companions are imported when a model is traced, not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan import libraries, losses
from memplan.asked.recipe import Recipe
from memplan.errors import MemplanError, RecipeError, UnsupportedArchitecture
from memplan.importers.quantization import MXFP4, method_of
from memplan.importers.resolve import ResolvedConfig, resolve_config
from memplan.planning.cards import able
from memplan.planning.plan import Plan, plan_from_tape
from memplan.planning.records import ModelInfo, ParameterCounts
from memplan.planning.study import of_cards
from memplan.predict import published
from memplan.predict.loading import loading_of
from memplan.tape import Phase, Tape

if TYPE_CHECKING:
    from memplan.trace import Traced

Progress = Callable[[Phase, "int | None"], None]


def trace_plan(
    model: str | Path | ResolvedConfig,
    recipe: Recipe | None = None,
    *,
    gpus: Iterable[str] | None = None,
    progress: Progress | None = None,
    looped: bool = True,
) -> tuple[Plan, Tape]:
    """Trace one steady-state training step: what it needs, and its tape. How its model comes onto the card is
    predicted, of the parameters that it has, and so is what a Trainer's loop keeps beside the step
    (``looped``).

    ``model`` is an alias, a Hub id, or a path to a config.json or its folder, of any causal language model
    that transformers has; ``progress`` is told each phase and layer that it comes to.
    Raises MemplanError (UnknownName, SpecError, RecipeError, TraceError).
    """
    recipe = of_cards(recipe or Recipe(), gpus)
    cards = able(recipe, gpus)  # names that are wrong are said to be before anything is traced
    found = model if isinstance(model, ResolvedConfig) else resolve_config(model)
    method = method_of(found.config.get("quantization_config"))
    stored = method == "bitsandbytes"
    traced = _trace(found, checked(found, recipe), progress, stored, looped)
    answer = plan_from_tape(
        traced.tape,
        ModelInfo(name=found.name, hub_id=found.hub_id, architecture=traced.architecture, note=found.note),
        ParameterCounts(total=traced.parameters, trainable=traced.trainable),
        traced.recipe,
        cards,
        named=gpus is not None,
        libraries=libraries.installed(losses.find(traced.recipe.loss).library),
        loading=partial(
            loading_of,
            traced.shapes,
            traced.brought,
            traced.recipe,
            traced.tape,
            checkpoint=published.like(found.config, stored=stored, packed=method == MXFP4),
        ),
    )
    return answer, traced.tape


def _trace(
    found: ResolvedConfig, recipe: Recipe, progress: Progress | None, stored: bool, looped: bool
) -> Traced:
    libraries.require(losses.find(recipe.loss).library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries deprecate is for those who call them
        try:
            from memplan.trace import trace_model
        except ImportError as error:
            reason = " ".join(str(error).split())[:200]
            raise MemplanError(
                f"tracing can't import its libraries ({reason}): run `{libraries.INSTALL}`"
            ) from error
        return trace_model(found.config, recipe, progress=progress, stored=stored, looped=looped)


def checked(found: ResolvedConfig, recipe: Recipe) -> Recipe:
    """The recipe resolved; where the architecture is known, checked as the plan checks it."""
    from memplan.importers.hf import spec_from_config
    from memplan.predict.parameters import resolve_recipe

    if recipe.gpus > 1:
        raise RecipeError(
            f"a trace is of one GPU: plan without it, or let `memplan dry-run --gpu {recipe.gpus}xCARD -- "
            "COMMAND` run a rank of your own program"
        )
    try:
        spec = spec_from_config(found.config, found.name, found.hub_id)
    except UnsupportedArchitecture:
        return recipe.resolved()
    return resolve_recipe(spec, recipe)


def layers(config: dict[str, Any]) -> int | None:
    """How many layers a configuration has, by any of the names that transformers' classes have for it."""
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if type(config.get(key)) is int:
            return int(config[key])
    return None
