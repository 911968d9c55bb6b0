"""Two tapes lined up: where they first differ, and what each has at its peak that the other lacks.

Tapes are equal if they have the same peak (bytes, phase, operation and layer) and allocate the same sizes in
the same order; what exists before the step has no order that means anything and is compared as a heap. The
writers name some things differently, so names are matched where they can be and reported where they can't,
but no difference in names alone makes tapes unequal.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from memplan.tape import Category, Phase, Tape, replay
from memplan.tape.modules import kind_of

_PIECE = 1000  # allocations that difflib, which takes quadratic time, is given at once
_MOST_LAYERS = 2000  # runs of layers, which difflib is given at once


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Side(_Record):
    """One tape: who wrote it, its peak, and how many storages the step allocates."""

    provenance: str
    allocated_bytes: int
    phase: Phase
    operation: str
    module: str
    layer: int | None
    by_category: dict[Category, int]
    allocations: int


class Place(_Record):
    """An allocation: its number in the step (from 0; in setup, in setup), and live bytes with it."""

    index: int
    phase: Phase
    layer: int | None
    module: str
    operation: str
    size: int
    live_bytes: int


class Places(_Record):
    """The same place in both tapes. None: only the other has this allocation."""

    a: Place | None
    b: Place | None


class Held(_Record):
    """Storages of one kind that one tape holds and the other does not."""

    category: Category
    operation: str
    module: str
    size: int
    count: int

    @property
    def nbytes(self) -> int:
        """The bytes of all of them."""
        return self.size * self.count


class Change(_Record):
    """Allocations of the step that differ, alike but for their layer. A size of None: that tape has none."""

    phase: Phase
    operation: str
    module: str
    size_a: int | None
    size_b: int | None
    count: int
    first_layer: int | None


class Renamed(_Record):
    """Allocations of equal size and place that the tapes say different operations made."""

    phase: Phase
    operation_a: str
    operation_b: str
    count: int


class Diff(_Record):
    """What :func:`diff` found. ``equal`` is the verdict.

    ``first_live_difference`` is the first allocation that both make while live bytes differ: from there on
    something was released at different times (or they differ in size already).
    """

    equal: bool
    a: Side
    b: Side
    first_difference: Places | None
    first_live_difference: Places | None
    peak_only_a: tuple[Held, ...]
    peak_only_b: tuple[Held, ...]
    changes: tuple[Change, ...]
    renamed: tuple[Renamed, ...]


class _Allocation(NamedTuple):
    number: int
    phase: Phase
    layer: int | None
    module: str
    operation: str
    size: int
    category: Category
    live: int
    full_name: str  # of the module

    def place(self) -> Place:
        """The same as a record."""
        return Place(
            index=self.number,
            phase=self.phase,
            layer=self.layer,
            module=self.full_name,
            operation=self.operation,
            size=self.size,
            live_bytes=self.live,
        )


_Pair = tuple["_Allocation | None", "_Allocation | None"]
_Name = tuple[Category, str, str, int]


def diff(a: Tape, b: Tape) -> Diff:
    """Line two tapes up and say where they differ."""
    flat_a, flat_b = list(_allocations(a)), list(_allocations(b))
    side_a, side_b = _side(a, flat_a), _side(b, flat_b)
    setup = _setup_pairs(_setup(flat_a), _setup(flat_b))
    step = list(_step_pairs(_step(flat_a), _step(flat_b)))
    resized = [(x, y) for x, y in [*setup, *step] if x is None or y is None or x.size != y.size]
    lived = next(((x, y) for x, y in step if x and y and x.live != y.live), None)
    only_a, only_b = _cancel(_held_at_peak(a), _held_at_peak(b))
    peaks = ("allocated_bytes", "phase", "operation", "layer")
    return Diff(
        equal=not resized and all(getattr(side_a, key) == getattr(side_b, key) for key in peaks),
        a=side_a,
        b=side_b,
        first_difference=_places(resized[0]) if resized else None,
        first_live_difference=_places(lived) if lived else None,
        peak_only_a=_held(only_a),
        peak_only_b=_held(only_b),
        changes=_changes(resized),
        renamed=_renamed(step),
    )


# -- tapes as lists --------------------------------------------------------------------------------------


def _allocations(tape: Tape) -> Iterator[_Allocation]:
    """All allocations, repetitions unrolled."""
    live = 0
    numbers = {True: 0, False: 0}
    kinds = {module: kind_of(module) for module in set(tape.modules)}
    events, deltas = tape.events, tape.deltas
    for segment in tape.segments:
        setup = segment.phase is Phase.SETUP
        for round_ in range(segment.repeat):
            for position in range(segment.start, segment.stop):
                live += deltas[position]
                storage = events[position]
                if storage < 0 or not tape.sizes[storage]:
                    continue
                yield _Allocation(
                    numbers[setup],
                    segment.phase,
                    segment.layer_at(position, round_),
                    kinds[tape.modules[storage]],
                    tape.operations[storage],
                    tape.sizes[storage],
                    tape.categories[storage],
                    live,
                    tape.modules[storage],
                )
                numbers[setup] += 1


def _setup(flat: list[_Allocation]) -> list[_Allocation]:
    return [one for one in flat if one.phase is Phase.SETUP]


def _step(flat: list[_Allocation]) -> list[_Allocation]:
    return [one for one in flat if one.phase is not Phase.SETUP]


def _side(tape: Tape, flat: list[_Allocation]) -> Side:
    peak = replay(tape)
    return Side(
        provenance=tape.provenance,
        allocated_bytes=peak.allocated_bytes,
        phase=peak.phase,
        operation=peak.operation,
        module=kind_of(peak.module),
        layer=peak.layer,
        by_category=peak.by_category,
        allocations=len(_step(flat)),
    )


def _held_at_peak(tape: Tape) -> Counter[_Name]:
    """What is alive at the peak, and how often."""
    live = highest = 0
    held: Counter[int] = Counter()
    steps: list[tuple[int, int]] = []  # changes since the highest point so far
    for segment in tape.segments:
        for _ in range(segment.repeat):
            for position in range(segment.start, segment.stop):
                event, delta = tape.events[position], tape.deltas[position]
                live += delta
                steps.append((event if event >= 0 else ~event, delta))
                if live > highest:
                    highest = live
                    for storage, change in steps:
                        held[storage] += change
                    steps.clear()
    result: Counter[_Name] = Counter()
    for storage, nbytes in held.items():
        if nbytes:
            size = tape.sizes[storage]
            name = (tape.categories[storage], tape.operations[storage], kind_of(tape.modules[storage]), size)
            result[name] += nbytes // size
    return result


# -- lining up -------------------------------------------------------------------------------------------

# How two heaps are matched: by all of the name first, at last by size alone.
_PASSES: tuple[Callable[[_Name], Any], ...] = (
    lambda name: name,
    lambda name: (name[0], name[1], name[3]),
    lambda name: (name[0], name[2], name[3]),
    lambda name: (name[0], name[3]),
    lambda name: name[3],
)


def _cancel(a: Counter[_Name], b: Counter[_Name]) -> tuple[Counter[_Name], Counter[_Name]]:
    """What is left of two heaps when everything that has its like in the other is taken away."""
    left, right = Counter(a), Counter(b)
    for key in _PASSES:
        by_key: dict[Any, list[_Name]] = {}
        for name in right:
            by_key.setdefault(key(name), []).append(name)
        for name in list(left):
            for other in by_key.get(key(name), ()):
                common = min(left[name], right[other])
                left[name] -= common
                right[other] -= common
        left, right = +left, +right
    return left, right


def _setup_pairs(a: list[_Allocation], b: list[_Allocation]) -> list[_Pair]:
    """Only what differs: each with what the other has in its place, if anything."""
    only_a, only_b = _cancel(Counter(map(_name, a)), Counter(map(_name, b)))
    left, right = _take(a, only_a), _take(b, only_b)
    # alike in all but the size, else in category and layer; each list in order, so that no search is long
    likes: tuple[Callable[[_Allocation], Any], ...] = (
        lambda one: _name(one)[:3],
        lambda one: (one.category, one.layer),
    )
    by_like: list[dict[Any, deque[int]]] = [{}, {}]
    for index, one in enumerate(right):
        for known, like in zip(by_like, likes, strict=True):
            known.setdefault(like(one), deque()).append(index)
    free = dict(enumerate(right))
    pairs: list[_Pair] = []
    for x in left:
        y: _Allocation | None = None
        for known, like in zip(by_like, likes, strict=True):
            waiting = known.get(like(x), deque())
            while waiting and y is None:
                y = free.pop(waiting.popleft(), None)
        pairs.append((x, y))
    return pairs + [(None, y) for y in free.values()]


def _name(one: _Allocation) -> _Name:
    return one.category, one.operation, one.module, one.size


def _take(flat: list[_Allocation], wanted: Counter[_Name]) -> list[_Allocation]:
    wanted = Counter(wanted)
    taken = []
    for one in flat:
        if wanted[_name(one)] > 0:
            wanted[_name(one)] -= 1
            taken.append(one)
    return taken


def _step_pairs(a: list[_Allocation], b: list[_Allocation]) -> Iterator[_Pair]:
    """Phase by phase, and in each phase layer by layer."""
    runs_a, runs_b = _runs(a, _phase), _runs(b, _phase)
    if [_phase(run[0]) for run in runs_a] != [_phase(run[0]) for run in runs_b]:
        yield from _lined_up(a, b)
        return
    for run_a, run_b in zip(runs_a, runs_b, strict=True):
        if [one.size for one in run_a] == [one.size for one in run_b]:
            yield from zip(run_a, run_b, strict=True)
            continue
        layers_a, layers_b = _runs(run_a, _layer), _runs(run_b, _layer)
        labels_a, labels_b = [_layer(run[0]) for run in layers_a], [_layer(run[0]) for run in layers_b]
        many = len(labels_a) * len(labels_b) > _MOST_LAYERS**2
        # not every writer tells an optimizer's layers
        if many or (_phase(run_a[0]) is Phase.OPTIMIZER and labels_a != labels_b):
            yield from _lined_up(run_a, run_b)
            continue
        for _, i, j, k, m in SequenceMatcher(None, labels_a, labels_b, autojunk=False).get_opcodes():
            if j - i == m - k:
                for layer_a, layer_b in zip(layers_a[i:j], layers_b[k:m], strict=True):
                    yield from _lined_up(layer_a, layer_b)
            else:
                yield from _lined_up(_joined(layers_a[i:j]), _joined(layers_b[k:m]))


def _phase(one: _Allocation) -> Phase:
    return one.phase


def _layer(one: _Allocation) -> int | None:
    return one.layer


def _runs(flat: Iterable[_Allocation], key: Callable[[_Allocation], Any]) -> list[list[_Allocation]]:
    return [list(run) for _, run in groupby(flat, key)]


def _joined(runs: Iterable[list[_Allocation]]) -> list[_Allocation]:
    return [one for run in runs for one in run]


def _lined_up(a: Sequence[_Allocation], b: Sequence[_Allocation]) -> Iterator[_Pair]:
    """Pairs of like allocations, and alone what only one side has, in order."""
    start = 0
    while start < min(len(a), len(b)) and _key(a[start]) == _key(b[start]):
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and _key(a[-1 - end]) == _key(b[-1 - end]):
        end += 1
    yield from zip(a[:start], b[:start], strict=True)
    for piece in range(start, max(len(a), len(b)) - end, _PIECE):
        yield from _matched(
            a[piece : min(piece + _PIECE, len(a) - end)],
            b[piece : min(piece + _PIECE, len(b) - end)],
            (_key, _operation),
        )
    yield from zip(a[len(a) - end :], b[len(b) - end :], strict=True)


def _matched(
    a: Sequence[_Allocation], b: Sequence[_Allocation], keys: tuple[Callable[[_Allocation], Any], ...]
) -> Iterator[_Pair]:
    """difflib's alignment by the first key; what it leaves, by the next ones."""
    if not keys or not a or not b:
        if len(a) == len(b):
            yield from zip(a, b, strict=True)
        else:
            yield from ((x, None) for x in a)
            yield from ((None, y) for y in b)
        return
    key, *rest = keys
    matcher = SequenceMatcher(None, list(map(key, a)), list(map(key, b)), autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            yield from zip(a[i:j], b[k:m], strict=True)
        else:
            yield from _matched(a[i:j], b[k:m], tuple(rest))


def _key(one: _Allocation) -> tuple[int, str]:
    return one.size, one.operation


def _operation(one: _Allocation) -> str:
    return one.operation


# -- records ---------------------------------------------------------------------------------------------


def _places(pair: _Pair) -> Places:
    a, b = pair
    return Places(a=a.place() if a else None, b=b.place() if b else None)


def _held(heap: Counter[_Name]) -> tuple[Held, ...]:
    """Largest first."""
    found = [
        Held(category=category, operation=operation, module=module, size=size, count=count)
        for (category, operation, module, size), count in heap.items()
    ]
    return tuple(sorted(found, key=lambda held: (-held.nbytes, held.operation, held.module)))


def _changes(pairs: Iterable[_Pair]) -> tuple[Change, ...]:
    """In the order in which they first happen."""
    counts: dict[Any, int] = {}
    layers: dict[Any, int | None] = {}
    for x, y in pairs:
        one = x or y
        assert one is not None
        key = (one.phase, one.operation, one.module, x.size if x else None, y.size if y else None)
        counts[key] = counts.get(key, 0) + 1
        layers.setdefault(key, one.layer)
    return tuple(
        Change(
            phase=phase,
            operation=operation,
            module=module,
            size_a=size_a,
            size_b=size_b,
            count=count,
            first_layer=layers[phase, operation, module, size_a, size_b],
        )
        for (phase, operation, module, size_a, size_b), count in counts.items()
    )


def _renamed(pairs: Iterable[_Pair]) -> tuple[Renamed, ...]:
    counts = Counter(
        (x.phase, x.operation, y.operation)
        for x, y in pairs
        if x and y and x.size == y.size and x.operation != y.operation
    )
    return tuple(
        Renamed(phase=phase, operation_a=a, operation_b=b, count=count)
        for (phase, a, b), count in counts.items()
    )
