"""Folding: identical layers are played a few times, and the tape says how often they repeat.

Three units of layers are played (a unit is one period of the pattern in which layers differ). In every
run of layer segments the middle unit must leave the same events as one of its neighbours: then every
unit between them does, for each starts from the state that the one before left. If that does not hold,
more are played, at last all of them. ``tests/test_fold.py`` plays all of them and compares to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from memplan.tape import Segment, Tape

_MAX_PERIOD = 8


@dataclass(frozen=True, slots=True)
class Played:
    """Which layers are played: ``head`` layers from the front, ``tail`` from the back; the unit of
    ``period`` layers that begins at ``head - period`` stands for ``repeat`` of them."""

    layers: int
    period: int
    units: int

    @property
    def complete(self) -> bool:
        """Whether every layer is played."""
        return self.units * self.period + self.layers % self.period >= self.layers

    @property
    def indices(self) -> list[int]:
        """Real indices of the played layers: one unit from the front, the rest from the back."""
        if self.complete:
            return list(range(self.layers))
        front = (self.units - 1) * self.period  # units that end with the repeated one
        back = self.period + self.layers % self.period
        return [*range(front), *range(self.layers - back, self.layers)]

    @property
    def repeat(self) -> int:
        """How many units the repeated one stands for."""
        return self.layers // self.period - self.units + 1

    @property
    def repeats(self) -> list[tuple[int, int]]:
        """The played indices, each with how many layers it stands for."""
        if self.complete:
            return [(index, 1) for index in range(self.layers)]
        first = (self.units - 2) * self.period
        repeated = range(first, first + self.period)
        return [(index, self.repeat if index in repeated else 1) for index in self.indices]

    def longer(self) -> Played:
        """One unit more."""
        return Played(self.layers, self.period, self.units + 1)


def all_layers(layers: int) -> Played:
    """Play everything."""
    return Played(layers, 1, layers)


def layers_to_play(kinds: list[Any], *, first_is_like_others: bool = False) -> Played:
    """Three units of the shortest period in the layers' kinds. Two will do where the first layer's backward
    is like the others', which is so when every weight is trained; a longer period is worth the attempt."""
    count = len(kinds)
    for period in range(1, min(_MAX_PERIOD, count) + 1):
        if all(kinds[index] == kinds[index + period] for index in range(count - period)):
            return Played(count, period, 2 if period > 1 and first_is_like_others else 3)
    return all_layers(count)


def fold(tape: Tape, played: Played) -> bool:
    """Replace the repeated unit's segments by one with a repeat count. False if they do not repeat."""
    result: list[Segment] = []
    segments = tape.segments
    position = 0
    wanted = played.indices
    while position < len(segments):
        first = segments[position]
        run = [first]
        if first.layer is not None:
            for segment in segments[position + 1 :]:
                if segment.layer is None or (segment.phase, segment.name) != (first.phase, first.name):
                    break
                if segment.layer in {other.layer for other in run}:
                    break
                run.append(segment)
        position += len(run)
        layers = [segment.layer for segment in run]
        if first.layer is None:
            result += run
        elif layers in (wanted, wanted[::-1]):
            folded = _fold_run(tape, run, played, descending=layers != wanted)
            if folded is None:
                return False
            result += folded
        else:
            return False
    if not _release_all(tape, result):
        return False
    tape.segments = result
    return True


def _release_all(tape: Tape, segments: list[Segment]) -> bool:
    """What a repeated layer leaves behind and something outside the layers releases (autocast's cache of
    casts, say) is released once for each repetition.

    False where that can't be told: right after a repeated layer, its last repetition's leavings go too.
    """
    born = {
        event: segment
        for segment in segments
        if segment.repeat > 1
        for event in tape.events[segment.start : segment.stop]
        if event >= 0
    }
    for before, segment in pairwise(segments):
        if segment.layer is not None:
            continue
        for position in range(segment.start, segment.stop):
            event = tape.events[position]
            home = born.get(~event) if event < 0 else None
            if home is not None:
                if home is before:
                    return False
                tape.deltas[position] *= home.repeat
    return True


def _fold_run(tape: Tape, run: list[Segment], played: Played, *, descending: bool) -> list[Segment] | None:
    period = played.period
    last = (played.units - 2) * period  # where the repeated unit begins, counted from layer 0
    if descending:
        start = len(run) - last - period
    else:
        start = last
    unit = run[start : start + period]
    before = run[start - period : start] if start >= period else None
    after = run[start + period : start + 2 * period]
    shape = _shape(tape, unit)
    if not (
        (before is not None and _shape(tape, before) == shape)
        or (len(after) == period and _shape(tape, after) == shape)
    ):
        return None
    marks = tuple(segment.start for segment in unit)
    layer = unit[0].layer
    assert layer is not None
    if descending:
        layer += (played.repeat - 1) * period
    merged = Segment(
        unit[0].phase,
        unit[0].name,
        layer,
        unit[0].start,
        unit[-1].stop,
        played.repeat,
        marks,
        -1 if descending else 1,
    )
    return [*run[:start], merged, *run[start + period :]]


def _shape(tape: Tape, unit: list[Segment]) -> Any:
    events, sizes, categories, operations = tape.events, tape.deltas, tape.categories, tape.operations
    start, stop = unit[0].start, unit[-1].stop
    named = [
        (operations[event], categories[event]) if event >= 0 else categories[~event]
        for event in events[start:stop]
    ]
    return [segment.stop - segment.start for segment in unit], sizes[start:stop], named
