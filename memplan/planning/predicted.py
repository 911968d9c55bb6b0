"""The predicted writer, asked for what answers need: a step, an evaluation, a whole run for the allocator.

The shadow is imported when a step is played, not before.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.device.fit import Run
from memplan.tape import Tape


def write(spec: ModelSpec, recipe: Recipe, card: Card | None = None) -> Tape:
    """The folded tape of a step of a resolved recipe."""
    from memplan.predict.step import write_tape

    return write_tape(spec, recipe, card=card)


def evaluation(
    spec: ModelSpec, recipe: Recipe, batch_size: int, *, card: Card | None = None, folded: bool = True
) -> Tape:
    """The tape of an evaluation between two steps (:mod:`memplan.predict.evaluation`)."""
    from memplan.predict.evaluation import write_evaluation

    return write_evaluation(spec, recipe, batch_size, card=card, folded=folded)


def run(spec: ModelSpec, recipe: Recipe, card: Card | None = None) -> Run:
    """The whole run of a resolved recipe, for the allocator: loading, and a step with every layer played."""
    from memplan.asked.alloc_conf import parse_settings
    from memplan.predict.loading import loading
    from memplan.predict.step import write_long_tape

    tape = write_long_tape(spec, recipe, card=card)
    return Run(tape, partial(loading, spec, recipe, tape), parse_settings(recipe.alloc_conf), card)


def predicted_tape(model: str | Path | ModelSpec, recipe: Recipe | None = None) -> Tape:
    """The tape of :func:`plan` with every layer played, for comparing it with others."""
    from memplan.planning.study import ask
    from memplan.predict.step import write_tape

    asked = ask(model, recipe)
    return write_tape(asked.spec, asked.recipe, folded=False)
