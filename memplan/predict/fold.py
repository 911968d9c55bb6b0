"""Folding: identical layers are played a few times, and the tape says how often they repeat.

Three units of layers are played (a unit is one period of the pattern in which layers differ). In every
run of layer segments the middle unit must leave the same events as one of its neighbours: then every
unit between them does, for each starts from the state that the one before left. If that does not hold,
more are played, at last all of them. ``tests/test_fold.py`` plays all of them and compares to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        """Real indices of the played layers: to the repeated unit from the front, the rest from the back."""
        if self.complete:
            return list(range(self.layers))
        front = self.first + self.period
        back = (self.units * self.period - front) + self.layers % self.period
        return [*range(front), *range(self.layers - back, self.layers)]

    @property
    def first(self) -> int:
        """The first layer of the repeated unit. Of many units it is not the neighbour of the last one, which
        may do other things (FSDP2 has nothing to prefetch there)."""
        return (self.units - (2 if self.units < 4 else 3)) * self.period

    @property
    def repeat(self) -> int:
        """How many units the repeated one stands for."""
        return self.layers // self.period - self.units + 1

    @property
    def repeats(self) -> list[tuple[int, int]]:
        """The played indices, each with how many layers it stands for."""
        if self.complete:
            return [(index, 1) for index in range(self.layers)]
        repeated = range(self.first, self.first + self.period)
        return [(index, self.repeat if index in repeated else 1) for index in self.indices]

    def longer(self) -> Played:
        """Twice the units: what three do not tell four hardly ever do, and each is played from the start."""
        return Played(self.layers, self.period, 2 * self.units)


def all_layers(layers: int) -> Played:
    """Play everything."""
    return Played(layers, 1, layers)


def layers_to_play(kinds: list[Any], *, first_is_like_others: bool = False, units: int = 3) -> Played:
    """``units`` of the shortest period in the layers' kinds. Of three, two will do where the first layer's
    backward is like the others', which is so when every weight is trained; a longer period is worth the
    attempt."""
    count = len(kinds)
    for period in range(1, min(_MAX_PERIOD, count) + 1):
        if all(kinds[index] == kinds[index + period] for index in range(count - period)):
            return Played(count, period, 2 if units == 3 and period > 1 and first_is_like_others else units)
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
    start = len(run) - played.first - period if descending else played.first
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
        unit[0].part,
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


# -- unfolding ---------------------------------------------------------------------------------------


def unfold(tape: Tape, played: Played) -> Tape | None:
    """The tape with every layer on it, written out from a folded one: far faster than playing them all.

    A storage is known by the run of layers that it was born in, its layer there, and how many births of that
    layer came before. Where a layer releases what another one made, the other's distance is what repeats.
    None where that does not tell which storage is meant; then the layers have to be played.
    """
    unfolding = _Unfolding(tape, played)
    return unfolding.tape if unfolding.run() else None


@dataclass(slots=True)
class _Part:
    """The events of one layer in one run of layer segments. ``births``: storages, in order."""

    run: int
    layer: int  # as played
    start: int
    stop: int
    births: list[int]


_BIRTH, _FIXED = -2, -1  # in place of a run

# What an event is about: (_BIRTH, -, number of birth), (_FIXED, -, storage that no layer made), or (run,
# distance, number of birth) of what a layer at that distance made in that run.
_Template = list[tuple[int, int, int]]


class _Unfolding:
    def __init__(self, tape: Tape, played: Played) -> None:
        self.old, self.played = tape, played
        self.tape = Tape(provenance=tape.provenance)
        self.order = {layer: position for position, layer in enumerate(played.indices)}
        self.first = played.first
        self.last = self.first + played.period
        self.home: dict[int, tuple[int, int, int]] = {}  # storage -> run, layer as played, number of birth
        self.moved: dict[int, int] = {}  # storages that no layer made, and their new numbers
        self.made: dict[tuple[int, int], list[Any]] = {}  # what a run makes in a layer as played
        self.bases: list[list[int]] = []  # of each run, by real layer: the new number of its first birth
        self.origin: list[int] = []  # the storage on the old tape of each on the new one
        # of each run and layer as played: the runs and distances that it refers to, and the layer meant there
        self.references: dict[tuple[int, int], dict[tuple[int, int], int]] = {}

    def run(self) -> bool:
        old, tape = self.old, self.tape
        parts = list(self._parts())
        self.bases = [
            [-1] * self.played.layers for _ in range(1 + max((r for r, _ in self.made), default=-1))
        ]
        for segment, layers in parts:
            if not (self._layers(segment, layers) if layers else self._plain(segment)):
                return False
        origin = self.origin
        tape.sizes = [old.sizes[index] for index in origin]
        tape.categories = [old.categories[index] for index in origin]
        tape.operations = [old.operations[index] for index in origin]
        tape.modules = [old.modules[index] for index in origin]
        tape.products = {index for index, was in enumerate(origin) if was in old.products}
        tape.workspaces = {index for index, was in enumerate(origin) if was in old.workspaces}
        if old.streams:
            tape.streams = {i: old.streams[was] for i, was in enumerate(origin) if was in old.streams}
        tape.finish()
        return True

    def _parts(self) -> Iterator[tuple[Segment, list[_Part]]]:
        """Segments with their layers; a run ends where a layer comes again or something else comes."""
        run, seen, key = -1, set[int](), None
        old = self.old
        for segment in old.segments:
            if segment.layer is None:
                key = None
                yield segment, []
                continue
            layers = self._played_layers(segment)
            if key != (segment.phase, segment.name) or seen.intersection(layers):
                run, key, seen = run + 1, (segment.phase, segment.name), set()
            seen.update(layers)
            starts = list(segment.marks) or [segment.start]
            parts = []
            for layer, start, stop in zip(layers, starts, [*starts[1:], segment.stop], strict=True):
                births = [event for event in old.events[start:stop] if event >= 0]
                for number, birth in enumerate(births):
                    self.home[birth] = run, layer, number
                self.made[run, layer] = [
                    (old.sizes[birth], old.operations[birth], old.modules[birth]) for birth in births
                ]
                parts.append(_Part(run, layer, start, stop, births))
            yield segment, parts

    def _played_layers(self, segment: Segment) -> list[int]:
        assert segment.layer is not None
        if segment.repeat == 1:
            return [segment.layer]
        unit = list(range(self.first, self.last))
        return unit if segment.direction > 0 else unit[::-1]

    def _in_unit(self, layer: int) -> bool:
        return self.first <= layer < self.last

    def _as_played(self, layer: int) -> int:
        """The played layer that stands for a real one."""
        if self.first <= layer < self.first + self.played.repeat * self.played.period:
            return self.first + (layer - self.first) % self.played.period
        return layer

    def _plain(self, segment: Segment) -> bool:
        """A segment outside the layers."""
        self.tape.begin(segment.phase, segment.name, None, segment.part)
        events = self.tape.events
        position = segment.start
        while position < segment.stop:
            event = self.old.events[position]
            left = self._left_behind(position, segment.stop)
            if left:
                if not self._releases(position, left, segment):
                    return False
                position += left
                continue
            position += 1
            if event >= 0:
                self.moved[event] = len(self.origin)
                events.append(len(self.origin))
                self.origin.append(event)
                continue
            made = self.moved.get(~event)
            if made is None:
                run, layer, number = self.home[~event]
                made = self.bases[run][layer] + number
            events.append(~made)
        return True

    def _left_behind(self, position: int, stop: int) -> int:
        """How many events in a row release what repeated layers made and left behind."""
        end = position
        while end < stop and (event := self.old.events[end]) < 0 and ~event not in self.moved:
            if not self._in_unit(self.home[~event][1]):
                break
            end += 1
        return end - position

    def _releases(self, position: int, count: int, segment: Segment) -> bool:
        """Releases of what each repetition left behind (autocast's cache of casts), layer by layer upwards.
        False where the layers beside them do not say that it goes so, or it is not all of a layer at once.
        """
        homes = [self.home[~event] for event in self.old.events[position : position + count]]
        layers = [layer for _, layer, _ in homes]
        if layers != sorted(layers) or set(layers) != set(range(self.first, self.last)):
            return False
        before, after = (
            self.home.get(~self.old.events[at]) if segment.start <= at < segment.stop else None
            for at in (position - 1, position + count)
        )
        if (before is None or before[1] >= self.first) and (after is None or after[1] < self.last):
            return False  # of each repetition, or of one, and in which order?
        for round_ in range(self.played.repeat):
            for run, layer, number in homes:
                base = self.bases[run][layer + round_ * self.played.period]
                self.tape.events.append(~(base + number))
        return True

    def _layers(self, segment: Segment, parts: list[_Part]) -> bool:
        """A segment of layers, its repetitions one by one."""
        templates = [self._template(part) for part in parts]
        rounds = range(segment.repeat) if segment.direction > 0 else range(segment.repeat - 1, -1, -1)
        tape, events, origin, bases = self.tape, self.tape.events, self.origin, self.bases
        for round_ in rounds:
            for part, template in zip(parts, templates, strict=True):
                if template is None:
                    return False
                layer = part.layer + round_ * self.played.period
                base = bases[part.run][layer] = len(origin)
                if not self._meant(part, layer):
                    return False
                tape.begin(segment.phase, segment.name, layer, segment.part)
                origin += part.births
                events += [
                    base + number
                    if run == _BIRTH
                    else ~number
                    if run == _FIXED
                    else ~(bases[run][layer + distance] + number)
                    for run, distance, number in template
                ]
        return True

    def _template(self, part: _Part) -> _Template | None:
        """What each event of a layer is about; None if a repetition would release what is there once."""
        template: _Template = []
        references: dict[tuple[int, int], int] = {}
        self.references[part.run, part.layer] = references
        births = 0
        for event in self.old.events[part.start : part.stop]:
            if event >= 0:
                template.append((_BIRTH, 0, births))
                births += 1
            elif ~event in self.moved:
                if self._in_unit(part.layer) and self.played.repeat > 1:
                    return None
                template.append((_FIXED, 0, self.moved[~event]))
            else:
                run, layer, number = self.home[~event]
                if self._in_unit(layer) or self._in_unit(part.layer):
                    distance = self.order[layer] - self.order[part.layer]
                else:
                    distance = layer - part.layer
                references[run, distance] = layer
                template.append((run, distance, number))
        return template

    def _meant(self, part: _Part, layer: int) -> bool:
        """Whether the layers that a real layer refers to were born like those that the played one does."""
        for (run, distance), played in self.references[part.run, part.layer].items():
            there = layer + distance
            if not 0 <= there < self.played.layers or self.bases[run][there] < 0:
                return False
            if self.made[run, self._as_played(there)] != self.made[run, played]:
                return False
        return True
