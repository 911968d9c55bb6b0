"""What a tape says when it is replayed: live bytes over time, the peak, and whose bytes they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from memplan.tape.tape import Category, Phase, Tape


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest point of a tape: live bytes, where it is, and whose bytes they are."""

    allocated_bytes: int
    phase: Phase
    operation: str
    module: str
    layer: int | None
    segment: str
    by_category: dict[Category, int]


@dataclass(frozen=True, slots=True)
class Point:
    """Live bytes by category after one event."""

    phase: Phase
    layer: int | None
    operation: str
    by_category: dict[Category, int]

    @property
    def allocated_bytes(self) -> int:
        """Live bytes in all categories."""
        return sum(self.by_category.values())


def replay(tape: Tape) -> Peak:
    """The first highest point of the tape, with its bytes by category."""
    live = 0
    best = -1
    best_segment = best_event = best_round = 0
    known: dict[tuple[int, int], tuple[int, int, int]] = {}
    for number, segment in enumerate(tape.segments):
        stretch = segment.start, segment.stop
        if segment.start >= segment.stop:
            continue
        if stretch not in known:
            profile = list(accumulate(tape.deltas[segment.start : segment.stop]))
            top = max(profile)
            known[stretch] = profile[-1], top, segment.start + profile.index(top)
        net, top, highest = known[stretch]
        # Of equal repetitions the last is highest if each leaves something behind, else the first.
        round_ = segment.repeat - 1 if net > 0 else 0
        if live + round_ * net + top > best:
            best = live + round_ * net + top
            best_segment, best_event, best_round = number, highest, round_
        live += segment.repeat * net
    at = tape.segments[best_segment]
    storage = tape.events[best_event]
    return Peak(
        allocated_bytes=best,
        phase=at.phase,
        operation=tape.operations[storage],
        module=tape.modules[storage],
        layer=at.layer_at(best_event, best_round),
        segment=at.name,
        by_category=_by_category(tape, best_segment, best_event, best_round),
    )


def _by_category(tape: Tape, number: int, event: int, rounds: int) -> dict[Category, int]:
    totals = dict.fromkeys(Category, 0)
    events, deltas, categories = tape.events, tape.deltas, tape.categories

    def add(start: int, stop: int, times: int) -> None:
        for position in range(start, stop):
            index = events[position]
            totals[categories[index if index >= 0 else ~index]] += deltas[position] * times

    times: dict[tuple[int, int], int] = {}
    for segment in tape.segments[:number]:
        stretch = segment.start, segment.stop
        times[stretch] = times.get(stretch, 0) + segment.repeat
    for (start, stop), count in times.items():
        add(start, stop, count)
    here = tape.segments[number]
    add(here.start, here.stop, rounds)
    add(here.start, event + 1, 1)
    return totals


def timeline(tape: Tape) -> Iterator[Point]:
    """Live bytes by category after every event of the step, repetitions unrolled."""
    totals = dict.fromkeys(Category, 0)
    for segment in tape.segments:
        for round_ in range(segment.repeat):
            for position in range(segment.start, segment.stop):
                index = tape.events[position]
                storage = index if index >= 0 else ~index
                totals[tape.categories[storage]] += tape.deltas[position]
                yield Point(
                    segment.phase, segment.layer_at(position, round_), tape.operations[storage], dict(totals)
                )


def static_bytes(tape: Tape) -> dict[Category, int]:
    """Bytes by category that are alive when the step begins (all that ``SETUP`` leaves)."""
    totals = dict.fromkeys(Category, 0)
    for segment in tape.segments:
        if segment.phase is Phase.SETUP:
            for position in range(segment.start, segment.stop):
                index = tape.events[position]
                category = tape.categories[index if index >= 0 else ~index]
                totals[category] += tape.deltas[position] * segment.repeat
    return totals
