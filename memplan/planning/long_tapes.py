"""The long tapes of steps of one recipe, of many batch sizes and lengths: most have the events of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import eq
from typing import NamedTuple

from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.predict.fed import whole, widest
from memplan.predict.fold import Played
from memplan.predict.step import _play as step_of
from memplan.predict.step import written
from memplan.predict.unlike import Standing
from memplan.shadow.tensor import playing
from memplan.tape import Phase, Tape


class Resized(NamedTuple):
    """A step by way of another one that has its events. ``long``: that one's tape, with every layer;
    ``kinds``: of each storage on it; ``sizes``: of each kind, the step's own."""

    long: Tape
    kinds: list[int]
    sizes: list[int]

    @property
    def tape(self) -> Tape:
        """The step's own tape."""
        long, sizes = self.long, [self.sizes[kind] for kind in self.kinds]
        deltas = [sizes[event] if event >= 0 else -sizes[~event] for event in long.events]
        return replace(long, sizes=sizes, deltas=deltas)


class _Known(NamedTuple):
    """A step that was written out: of how many layers, as they were played, and their storages' kinds."""

    played: Played | Standing
    short: Tape
    kinds: list[int]
    written: Resized


_KNOWN = 4  # steps: kernels take lengths apart by a multiple of 8, short from long


class LongTapes:
    """What :func:`write_long_tape` writes of one recipe for many batch sizes and lengths: a step that has the
    events of one before is not written out again.

    Storages are of one kind if they come from the same operation of the same module and are of one size. A
    step in which they still are is written out as before: by that, layers are told to be alike.
    """

    def __init__(self, spec: ModelSpec, recipe: Recipe, card: Card | None = None) -> None:
        self.spec, self.recipe, self.card = spec, recipe, card
        self._known: list[_Known] = []  # the last one first

    def of(self, batch_size: int, seq_len: int) -> Resized:
        """The step."""
        asked = self.recipe.model_copy(update={"batch_size": batch_size, "seq_len": seq_len})

        step = [whole(asked)] * min(asked.gradient_accumulation_steps, 2)

        def play(played: Played | Standing) -> Tape:
            return step_of(self.spec, asked, step, self.card, played, looped=True)

        return self._as_before(play) or self._anew(play, widest(step))

    def _as_before(self, play: Callable[[Played | Standing], Tape]) -> Resized | None:
        if not self._known:
            return None
        with playing():
            short = play(self._known[0].played)
        for known in self._known:
            if short == replace(known.short, sizes=short.sizes, deltas=short.deltas):
                by_kind = dict(zip(known.kinds, short.sizes, strict=True))
                if all(map(eq, short.sizes, map(by_kind.__getitem__, known.kinds))):
                    return known.written._replace(sizes=[by_kind[kind] for kind in range(len(by_kind))])
        return None

    def _anew(self, play: Callable[[Played | Standing], Tape], asked: Recipe) -> Resized:
        shorts: list[tuple[Played | Standing, Tape]] = []

        def noted(played: Played | Standing) -> Tape:
            tape = play(played)  # which will be folded
            shorts.append((played, replace(tape, segments=[replace(segment) for segment in tape.segments])))
            return tape

        long = written(noted, self.spec, asked, folded=True, unfolded=True)
        for segment in long.segments:
            if segment.phase is Phase.OPTIMIZER:
                segment.layer = None  # as write_long_tape has it
        played, short = shorts[-1]
        numbers: dict[tuple[int, str, str], int] = {}
        kinds, long_kinds = (
            [
                numbers.setdefault(kind, len(numbers))
                for kind in zip(tape.sizes, tape.operations, tape.modules, strict=True)
            ]
            for tape in (short, long)
        )
        found = Resized(long, long_kinds, [size for size, *_ in numbers])
        self._known = [_Known(played, short, kinds, found), *self._known[: _KNOWN - 1]]
        return found
