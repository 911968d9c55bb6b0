"""The predicted writer, asked for what answers need: a step, an evaluation, a whole run for the allocator.
All are of a Trainer's loop.

The shadow is imported when a step is played, not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from memplan import strategies
from memplan.asked.lengths import Lengths, Step
from memplan.asked.recipe import Batches, Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.device.fit import Run, Varied
from memplan.tape import Tape


def write(spec: ModelSpec, recipe: Recipe, card: Card | None = None, lengths: Lengths | None = None) -> Tape:
    """The folded tape of a step of a resolved recipe; with ``lengths``, of the step with the longest rows."""
    from memplan.predict.step import write_tape

    step = None if lengths is None else longest(steps(recipe, lengths), recipe)
    return write_tape(spec, recipe, card=card, lengths=step, looped=True)


def steps(recipe: Recipe, lengths: Lengths) -> list[Step]:
    """The steps of a run of such lengths, cut at ``seq_len``. Raises MemplanError."""
    return lengths.steps(recipe.batch_size, recipe.gradient_accumulation_steps, recipe.seq_len)


def longest(found: list[Step], recipe: Recipe) -> Step:
    """The step with the most tokens in a forward pass."""
    return max(found, key=lambda step: tokens(step, recipe))


def tokens(step: Step, recipe: Recipe) -> int:
    """The most tokens that a forward pass of a step has, padding counted."""
    if recipe.batches is Batches.PACKED:
        return max(map(sum, step))
    return max(len(rows) * max(rows) for rows in step)


def evaluation(
    spec: ModelSpec, recipe: Recipe, batch_size: int, *, card: Card | None = None, folded: bool = True
) -> Tape:
    """The tape of an evaluation between two steps (:mod:`memplan.predict.evaluation`)."""
    from memplan.predict.evaluation import write_evaluation

    return write_evaluation(spec, recipe, batch_size, card=card, folded=folded)


def run(
    spec: ModelSpec,
    recipe: Recipe,
    card: Card | None = None,
    lengths: Lengths | None = None,
    rank: int | None = None,
    *,
    looped: bool = True,
) -> Run:
    """The whole run of a resolved recipe, for the allocator: loading, and a step with every layer played;
    with ``lengths``, all steps that these make. ``rank``: of those that share the step, the one that
    takes the most unless given; ``looped=False``: without a Trainer's loop around them."""
    from memplan.asked.alloc_conf import parse_settings
    from memplan.predict.loading import loading
    from memplan.predict.step import write_long_tape

    played = [None] if lengths is None else steps(recipe, lengths)
    written = cache(
        lambda step: write_long_tape(spec, recipe, card=card, lengths=step, looped=looped, rank=rank)
    )
    tape = written(played[0])
    settings = parse_settings(recipe.alloc_conf)
    strategy = strategies.of(recipe)
    load = partial(loading, spec, recipe, tape)
    first = None
    if strategy is not None and strategy.rehearses(recipe):
        first = _First(spec, recipe, card, played[0], looped, rank)
        load = partial(_loading_first, first)
    run = Run(tape, load, settings, card, recipe.gpus, first)
    return run if lengths is None else Varied(run, lambda: map(written, played[1:]))


@dataclass(slots=True)
class _First:
    """The tape of a run's first step, written when it is asked for."""

    spec: ModelSpec
    recipe: Recipe
    card: Card | None
    lengths: Step | None
    looped: bool
    rank: int | None
    tape: Tape | None = None

    def __call__(self) -> Tape:
        """The tape."""
        from memplan.predict.step import write_long_tape

        if self.tape is None:
            self.tape = write_long_tape(
                self.spec,
                self.recipe,
                card=self.card,
                lengths=self.lengths,
                looped=self.looped,
                rank=self.rank,
                first=True,
            )
        return self.tape


def _loading_first(first: _First, capacity: int | None) -> Tape:
    from memplan.predict.loading import loading

    return loading(first.spec, first.recipe, first(), capacity)


def predicted_tape(
    model: str | Path | ModelSpec, recipe: Recipe | None = None, *, looped: bool = True
) -> Tape:
    """The tape of :func:`plan` with every layer played, for comparing it with others; ``looped=False``:
    without a Trainer's loop around it."""
    from memplan.planning.study import ask
    from memplan.predict.step import write_tape

    asked = ask(model, recipe)
    return write_tape(asked.spec, asked.recipe, looped=looped, folded=False)
