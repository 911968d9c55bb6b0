"""Layers that differ in no period: each stands for those that are like it and have like neighbours.

A layer's events follow from what it is, from its neighbours, from whether it is the first or last of its kind
(what all of a kind share is freed there) and from whether anything before it is trained. So a shorter row of
layers is played, in which every such surrounding of the model comes up, twice if it does so in the model, and
must leave the same events both times. If it does not, surroundings are taken wider, at last as wide as the
model. ``tests/test_fold.py`` plays all layers and compares to the byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from memplan.tape import Segment, Tape

_WIDEST = 2  # neighbours on each side


@dataclass(frozen=True, slots=True)
class Standing:
    """Which layers are played (``indices``), and for each layer of the model the one that ``stands`` for it.
    ``alike``: played layers of the same surroundings."""

    labels: tuple[Hashable, ...]
    width: int
    indices: tuple[int, ...]
    stands: tuple[int, ...]
    alike: tuple[tuple[int, ...], ...]

    @property
    def layers(self) -> int:
        """How many the model has."""
        return len(self.stands)

    @property
    def complete(self) -> bool:
        """Whether every layer is played."""
        return len(self.indices) == self.layers

    @property
    def repeats(self) -> list[tuple[int, int]]:
        """The played indices, each with how many layers it stands for."""
        times = Counter(self.stands)
        return [(index, times[index]) for index in self.indices]

    def longer(self) -> Standing:
        """With wider surroundings."""
        if self.width == _WIDEST:
            every = tuple(range(self.layers))
            return Standing(self.labels, self.width, every, every, ())
        return _standing(self.labels, self.width + 1)


def standing(kinds: Sequence[Hashable], trained: Sequence[bool]) -> Standing:
    """The layers to play of a model of these ``kinds``; ``trained``: whether each has anything to train."""
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    last = {kind: index for index, kind in enumerate(kinds)}
    begins = next((index for index, is_trained in enumerate(trained) if is_trained), len(kinds))
    labels = [
        (kind, index == first[kind], index == last[kind], index > begins) for index, kind in enumerate(kinds)
    ]
    return _standing(tuple(labels), 1)


@lru_cache(maxsize=32)
def _standing(labels: tuple[Hashable, ...], width: int) -> Standing:
    names: dict[Hashable, int] = {}
    row = [names.setdefault(label, len(names)) for label in labels]  # short to compare
    indices = _shortened(row, width)
    real = _surroundings(row, width)
    played = dict(zip(indices, _surroundings([row[index] for index in indices], width), strict=True))
    by_surroundings: dict[Any, list[int]] = {}
    for index, around in played.items():
        by_surroundings.setdefault(around, []).append(index)
    return Standing(
        labels,
        width,
        tuple(indices),
        tuple(by_surroundings[around][0] for around in real),
        tuple(tuple(group) for group in by_surroundings.values() if len(group) > 1),
    )


def _surroundings(row: Sequence[int], width: int) -> list[tuple[int, ...]]:
    padded = [-1] * width + list(row) + [-2] * width
    return [tuple(padded[index : index + 2 * width + 1]) for index in range(len(row))]


def _shortened(row: list[int], width: int) -> list[int]:
    """Indices of a part of the row that has all its surroundings, each twice if the row has it so often, and
    no others. Between two places that look the same for twice the width everything can be left out."""
    padded = [-1] * width + row + [-2] * width
    kept = list(range(len(padded)))
    span = 2 * width
    counts = Counter(tuple(padded[at : at + span + 1]) for at in range(len(row)))
    least = {around: min(count, 2) for around, count in counts.items()}
    at = 0
    while at + span < len(kept):
        here = [padded[index] for index in kept[at : at + span]]
        places = range(at + 1, len(kept) - span)
        cut = next((to for to in places if [padded[index] for index in kept[to : to + span]] == here), None)
        if cut is not None:
            gone = Counter(
                tuple(padded[index] for index in kept[start : start + span + 1]) for start in range(at, cut)
            )
            if all(counts[around] - times >= least[around] for around, times in gone.items()):
                counts -= gone
                del kept[at:cut]
                continue
        at += 1
    return [index - width for index in kept if width <= index < width + len(row)]


# -- the tape --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """Segments of layers, one after the other. ``played``: by layer; ``real``: the model's layers in order,
    each with the segment that stands for it."""

    played: dict[int, Segment]
    real: list[tuple[int, Segment]]


def _runs(tape: Tape, chosen: Standing) -> list[Segment | _Run] | None:
    """The tape's segments, with the runs of layers written out; None where the played layers do not tell
    what the others do."""
    place = {index: number for number, index in enumerate(chosen.indices)}
    found: list[Segment | _Run] = []
    position = 0
    while position < len(tape.segments):
        first = tape.segments[position]
        if first.layer is None:
            found.append(first)
            position += 1
            continue
        run: dict[int, Segment] = {}
        for segment in tape.segments[position:]:
            if segment.layer is None or segment.layer in run:
                break
            if (segment.phase, segment.name) != (first.phase, first.name):
                break
            run[segment.layer] = segment
        position += len(run)
        order = [place[layer] for layer in run]
        if order not in (sorted(order), sorted(order, reverse=True)):
            return None
        for group in chosen.alike:
            if len({_shape(tape, run.get(index)) for index in group}) > 1:
                return None
        real = [(layer, run[stand]) for layer, stand in enumerate(chosen.stands) if stand in run]
        found.append(_Run(run, real[::-1] if order != sorted(order) else real))
    return found


def _shape(tape: Tape, segment: Segment | None) -> Any:
    if segment is None:
        return None
    events, start, stop = tape.events, segment.start, segment.stop
    named = [
        (tape.operations[event], tape.categories[event]) if event >= 0 else tape.categories[~event]
        for event in events[start:stop]
    ]
    return tuple(tape.deltas[start:stop]), tuple(named)


def fold(tape: Tape, chosen: Standing) -> bool:
    """Give the tape a segment for every layer of the model; those of layers that stand for several have the
    same events. False if the played layers do not tell."""
    runs = _runs(tape, chosen)
    if runs is None:
        return False
    times = dict(chosen.repeats)
    born = {
        event: segment
        for segment in tape.segments
        if segment.layer is not None
        for event in tape.events[segment.start : segment.stop]
        if event >= 0
    }
    # what a layer leaves behind and something outside releases is released for each that it stands for
    changes: list[tuple[int, int]] = []
    before: Segment | None = None
    for segment in tape.segments:
        if segment.layer is None:
            for position in range(segment.start, segment.stop):
                event = tape.events[position]
                home = born.get(~event) if event < 0 else None
                if home is not None and home.layer is not None and times[home.layer] != 1:
                    if home is before:
                        return False
                    changes.append((position, times[home.layer]))
        before = segment
    for position, number in changes:
        tape.deltas[position] *= number
    tape.segments = [
        segment
        for item in runs
        for segment in (
            [item]
            if isinstance(item, Segment)
            else [Segment(s.phase, s.name, layer, s.start, s.stop, part=s.part) for layer, s in item.real]
        )
    ]
    return True


def unfold(tape: Tape, chosen: Standing) -> Tape | None:
    """The tape with every layer written out, from one as it was played. None where that does not tell which
    storage a layer releases; then the layers have to be played."""
    runs = _runs(tape, chosen)
    return None if runs is None else _Unfolding(tape, chosen, runs).run()


_BIRTH, _FIXED = -2, -1  # in place of a run
_Template = list[tuple[int, int, int]]  # as in memplan.predict.fold


class _Unfolding:
    def __init__(self, tape: Tape, chosen: Standing, runs: list[Segment | _Run]) -> None:
        self.old, self.chosen, self.runs = tape, chosen, runs
        self.tape = Tape(provenance=tape.provenance)
        self.place = {index: number for number, index in enumerate(chosen.indices)}
        self.times = dict(chosen.repeats)
        self.home: dict[int, tuple[int, int, int]] = {}  # storage -> run, layer as played, number of birth
        self.moved: dict[int, int] = {}  # storages that no layer made, and their new numbers
        self.bases: list[list[int]] = []  # of each run, by real layer: the new number of its first birth
        self.births: dict[tuple[int, int], list[int]] = {}  # storages that a run makes in a layer as played
        self.templates: dict[tuple[int, int], tuple[_Template, dict[tuple[int, int], int]]] = {}
        self.origin: list[int] = []  # the storage on the old tape of each on the new one

    def run(self) -> Tape | None:
        old, tape = self.old, self.tape
        number = 0
        for item in self.runs:
            if isinstance(item, Segment):
                if not self._plain(item):
                    return None
                continue
            self.bases.append([-1] * self.chosen.layers)
            for layer, segment in item.played.items():
                births = [event for event in old.events[segment.start : segment.stop] if event >= 0]
                self.births[number, layer] = births
                self.home.update((birth, (number, layer, n)) for n, birth in enumerate(births))
            if not all(self._layer(number, layer, segment) for layer, segment in item.real):
                return None
            number += 1
        tape.sizes = [old.sizes[index] for index in self.origin]
        tape.categories = [old.categories[index] for index in self.origin]
        tape.operations = [old.operations[index] for index in self.origin]
        tape.modules = [old.modules[index] for index in self.origin]
        tape.products = {index for index, was in enumerate(self.origin) if was in old.products}
        tape.workspaces = {index for index, was in enumerate(self.origin) if was in old.workspaces}
        if old.streams:
            tape.streams = {i: old.streams[was] for i, was in enumerate(self.origin) if was in old.streams}
        tape.finish()
        return tape

    def _plain(self, segment: Segment) -> bool:
        """A segment outside the layers."""
        self.tape.begin(segment.phase, segment.name, None, segment.part)
        events = self.tape.events
        left: dict[
            int, list[tuple[int, int]]
        ] = {}  # what is released of layers in a row: run, number of birth
        for event in self.old.events[segment.start : segment.stop]:
            if event < 0 and ~event in self.home:
                run, layer, number = self.home[~event]
                left.setdefault(layer, []).append((run, number))
                continue
            if not self._release(left):
                return False
            left.clear()
            if event >= 0:
                self.moved[event] = len(self.origin)
                events.append(len(self.origin))
                self.origin.append(event)
            else:
                events.append(~self.moved[~event])
        return self._release(left)

    def _release(self, left: dict[int, list[tuple[int, int]]]) -> bool:
        """Release what layers have left, of every one that a played one stands for."""
        order = [self.place[layer] for layer in left]
        if order not in (sorted(order), sorted(order, reverse=True)):
            return False
        if any(left.get(index) != left.get(group[0]) for group in self.chosen.alike for index in group):
            return False  # of some of them only
        real = [(layer, left[stand]) for layer, stand in enumerate(self.chosen.stands) if stand in left]
        for layer, storages in real if order == sorted(order) else real[::-1]:
            for run, number in storages:
                if self.bases[run][layer] < 0:
                    return False
                self.tape.events.append(~(self.bases[run][layer] + number))
        return True

    def _layer(self, run: int, layer: int, segment: Segment) -> bool:
        """A real layer, as the played one in ``segment``."""
        assert segment.layer is not None
        known = self.templates.get((run, segment.layer))
        if known is None:
            known = self.templates[run, segment.layer] = self._template(segment)
        template, references = known
        bases, events = self.bases, self.tape.events
        there: dict[tuple[int, int], int] = {}
        for (other, distance), meant in references.items():
            if other == _FIXED:
                if self.times[segment.layer] != 1:
                    return False  # it is there once
                continue
            found = self._there(layer, segment.layer, distance, meant)
            if found is None or (bases[other][found] < 0 and (other, distance) != (run, 0)):
                return False
            stand = self.births.get((other, self.chosen.stands[found]), [])
            if not self._same(stand, self.births[other, meant]):
                return False
            there[other, distance] = found
        base = bases[run][layer] = len(self.origin)
        self.tape.begin(segment.phase, segment.name, layer, segment.part)
        self.origin += self.births[run, segment.layer]
        events += [
            base + number
            if other == _BIRTH
            else ~number
            if other == _FIXED
            else ~(bases[other][there[other, distance]] + number)
            for other, distance, number in template
        ]
        return True

    def _there(self, layer: int, played: int, distance: int, meant: int) -> int | None:
        """The real layer that a real one refers to as the played one does to ``meant``: its neighbour, which
        it has as the played one has; or, from a layer that stands for itself alone, the first or the last."""
        if abs(distance) <= 1:
            return layer + distance if 0 <= layer + distance < self.chosen.layers else None
        ends = {0: 0, len(self.place) - 1: self.chosen.layers - 1}
        return ends.get(self.place[meant]) if self.times[played] == 1 else None

    def _same(self, a: list[int], b: list[int]) -> bool:
        old = self.old
        return a is b or [(old.sizes[i], old.operations[i], old.modules[i]) for i in a] == [
            (old.sizes[i], old.operations[i], old.modules[i]) for i in b
        ]

    def _template(self, segment: Segment) -> tuple[_Template, dict[tuple[int, int], int]]:
        """What each event of a played layer is about, and which layers it refers to."""
        assert segment.layer is not None
        template: _Template = []
        references: dict[tuple[int, int], int] = {}
        births = 0
        for event in self.old.events[segment.start : segment.stop]:
            if event >= 0:
                template.append((_BIRTH, 0, births))
                births += 1
            elif ~event in self.moved:
                template.append((_FIXED, 0, self.moved[~event]))
                references[_FIXED, 0] = segment.layer
            else:
                other, layer, number = self.home[~event]
                distance = self.place[layer] - self.place[segment.layer]
                template.append((other, distance, number))
                references[other, distance] = layer
        return template, references
