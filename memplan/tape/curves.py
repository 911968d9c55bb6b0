"""A step as pictures need it: what is alive at chosen moments, and the stretches that phases and layers take.

A tape has tens of thousands of events and a picture some hundred columns. :func:`shown` takes from each
column's events the lowest and the highest, in the order in which they come, so that no peak is lost, and
:func:`moments` tells what is alive there. Both read unfolded tapes (``memplan.planning.predicted``), and pass
over setup: what it leaves is there all through the step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import nlargest
from itertools import accumulate

from memplan.tape import Category, Phase, Tape

RESIDENT = (Category.WEIGHTS, Category.QUANTIZATION_STATE, Category.ADAPTERS, Category.OPTIMIZER_STATE)
IN_A_LAYER = "a layer"  # the module of what a layer does outside its modules
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Held:
    """``count`` tensors of ``size`` bytes each, made by the same operation in the same module of each layer
    (or in one layer, or outside the layers)."""

    module: str
    operation: str
    category: Category
    size: int
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.size * self.count


@dataclass(frozen=True, slots=True)
class Moment:
    """The state after event number ``event``. ``held`` are the largest tensors made in the step."""

    event: int
    phase: Phase
    layer: int | None
    operation: str
    module: str
    by_category: dict[Category, int]
    held: tuple[Held, ...]

    @property
    def allocated_bytes(self) -> int:
        """Live bytes in all categories."""
        return sum(self.by_category.values())

    @property
    def resident_bytes(self) -> int:
        """Live bytes in the categories that are there all through the step."""
        return sum(self.by_category[category] for category in RESIDENT)


@dataclass(frozen=True, slots=True)
class Span:
    """The events ``start:stop`` of a phase, or of a part of it."""

    name: str
    phase: Phase
    layer: int | None
    start: int
    stop: int


def step_start(tape: Tape) -> int:
    """The number of the first event after setup."""
    return next(
        (segment.start for segment in tape.segments if segment.phase is not Phase.SETUP), len(tape.events)
    )


def parts(tape: Tape) -> list[Span]:
    """The segments that have events, setup included."""
    _check(tape)
    return [Span(s.name, s.phase, s.layer, s.start, s.stop) for s in tape.segments if s.stop > s.start]


def phases(tape: Tape) -> list[Span]:
    """Phases as they follow one another: with accumulation forward and backward come twice."""
    result: list[Span] = []
    for part in parts(tape):
        if result and result[-1].phase is part.phase:
            last = result.pop()
            result.append(Span(last.name, last.phase, None, last.start, part.stop))
        else:
            result.append(Span(part.phase.value, part.phase, None, part.start, part.stop))
    return result


def live_bytes(tape: Tape) -> list[int]:
    """Live bytes after every event."""
    _check(tape)
    return list(accumulate(tape.deltas))


def shown(live: list[int], start: int, columns: int) -> list[list[int]]:
    """For each of at most ``columns`` equal stretches of ``live[start:]``, its lowest and its highest event
    in their order; one if they are the same. The first highest of all is among them."""
    count = len(live) - start
    columns = min(columns, count)
    result = []
    for number in range(columns):
        events = range(start + count * number // columns, start + count * (number + 1) // columns)
        low, high = min(events, key=live.__getitem__), max(events, key=live.__getitem__)
        result.append(sorted({low, high}))
    return result


def moments(tape: Tape, events: Iterable[int], largest: int = 0) -> Iterator[Moment]:
    """What is alive after each of these events, which must be sorted; the ``largest`` of the step's tensors
    are told, those that differ only in their layer counted together."""
    _check(tape)
    begin = step_start(tape)
    totals = dict.fromkeys(Category, 0)
    alive: Counter[_Kind] = Counter()
    of_step: set[int] = set()
    in_layers = _born_in_layers(tape) if largest else set()
    segments = iter(tape.segments)
    segment = next(segments)
    position = 0
    for event in events:
        for number in range(position, event + 1):
            index = tape.events[number]
            storage = index if index >= 0 else ~index
            totals[tape.categories[storage]] += tape.deltas[number]
            if not largest:
                continue
            if index >= 0 and number >= begin:
                of_step.add(storage)
                alive[_kind(tape, storage, in_layers)] += 1
            elif storage in of_step:
                alive[_kind(tape, storage, in_layers)] -= 1
        position = event + 1
        while segment.stop <= event:
            segment = next(segments)
        index = tape.events[event]
        storage = index if index >= 0 else ~index
        yield Moment(
            event,
            segment.phase,
            segment.layer,
            tape.operations[storage],
            tape.modules[storage],
            dict(totals),
            _largest(alive, largest),
        )


def resident(tape: Tape, largest: int) -> tuple[Held, ...]:
    """The ``largest`` of the tensors that are alive when the step begins."""
    _check(tape)
    alive: Counter[_Kind] = Counter()
    in_layers = _born_in_layers(tape)
    for index in tape.events[: step_start(tape)]:
        alive[_kind(tape, index if index >= 0 else ~index, in_layers)] += 1 if index >= 0 else -1
    return _largest(alive, largest)


_Kind = tuple[str, str, Category, int]


def _born_in_layers(tape: Tape) -> set[int]:
    layers = (segment for segment in tape.segments if segment.layer is not None)
    return {index for segment in layers for index in tape.events[segment.start : segment.stop] if index >= 0}


def _kind(tape: Tape, storage: int, in_layers: set[int]) -> _Kind:
    module = tape.modules[storage] or (IN_A_LAYER if storage in in_layers else "")
    if "." in module:  # a trace has a layer's number in the module's name, a plan beside it
        module = _LAYER_NUMBER.sub("*", module)
    return module, tape.operations[storage], tape.categories[storage], tape.sizes[storage]


def _largest(alive: Counter[_Kind], number: int) -> tuple[Held, ...]:
    found = nlargest(number, alive.items(), key=lambda item: item[0][3] * item[1])
    return tuple(
        Held(module, operation, category, size, count)
        for (module, operation, category, size), count in found
        if size * count > 0
    )


def _check(tape: Tape) -> None:
    if any(segment.repeat > 1 for segment in tape.segments):
        raise ValueError("a folded tape leaves events out, so it can't be drawn: play every layer")
