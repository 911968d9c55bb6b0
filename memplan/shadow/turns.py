"""Loops of many like turns: the first and the last turns are played, and one between them is written out for
all others, in forward and in backward.

A turn's events are about storages of its own, and about those that its neighbour made. So the events of the
middle turn, told by who made what they are about, are those of every turn in its place. Storages are numbered
before the turn is played, as many as its neighbour made for each turn that it stands for: numbers go up with
time. Neighbours that turn out not to be alike raise :class:`NotAlike`; then all are played
(:func:`in_part`). ``tests/test_fold.py`` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from memplan.shadow.tensor import state

_MIDDLE = 3  # the turn that stands for others: the first has no state from before, and is not the one beside
_PLAYED = _MIDDLE + 4  # of the last three, backward begins with the last, and compares the others

_OWN, _BESIDE, _FORWARD, _BELOW = range(4)  # who made what an event is about: in backward, the turn's forward
_every = False


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class NotAlike(Exception):
    """Turns do otherwise than their neighbours."""


def in_part(play: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """What begins a tape and plays it, turn by turn if it must."""

    @wraps(play)
    def played(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        try:
            return play(*arguments, **options)
        except NotAlike:
            with every_turn():
                return play(*arguments, **options)

    return played


@contextmanager
def every_turn() -> Iterator[None]:
    """Loops inside are played turn by turn."""
    global _every
    before, _every = _every, True
    try:
        yield
    finally:
        _every = before


class Turn:
    """A turn of a loop; nodes that are made in it lead back to it."""

    __slots__ = ("loop", "number")

    def __init__(self, loop: Turns, number: int) -> None:
        self.loop, self.number = loop, number

    def enter(self) -> None:
        """Its backward begins."""
        self.loop.backward.begin(self.number)

    def leave(self) -> None:
        """Its backward is over."""
        self.loop.backward.end(self.number)


class Turns:
    """``for _ in Turns(count)``: those that are played of ``count``."""

    def __init__(self, count: int) -> None:
        few = count > _PLAYED and not _every
        self.played = _PLAYED if few else count
        self.times = count - self.played  # how many others the middle one stands for
        self.forward = _Way(self.times, 1, None)
        self.backward = _Way(self.times, -1, self)

    def __iter__(self) -> Iterator[int]:
        before = state.turn
        if self.times:
            state.loops.append(self)
        for number in range(self.played):
            if self.times:
                state.turn = Turn(self, number)
                self.forward.begin(number)
            yield number
            if self.times:
                self.forward.end(number)
        state.turn = before


class _Way:
    """A loop in one direction: forward, or backward through ``loop``."""

    def __init__(self, times: int, direction: int, loop: Turns | None) -> None:
        self.times, self.direction, self.loop = times, direction, loop
        self.starts: dict[int, int] = {}  # where a turn's events begin
        self.items: dict[int, list[tuple[int, int, int]]] = {}
        self.born: dict[int, range] = {}  # the storages of a turn that was played
        self.first = 0  # those of the turns that the middle one stands for begin here

    def begin(self, number: int) -> None:
        if self.times and number == _MIDDLE:
            self._reserve(self.born[number - self.direction])
        tape = state.tape
        self.starts[number] = len(tape.events)
        self.born[number] = range(len(tape.sizes), 0)

    def end(self, number: int) -> None:
        if not self.times:
            return
        tape = state.tape
        own = self.born[number] = range(self.born[number].start, len(tape.sizes))
        beside = self.born.get(number - self.direction, range(0))
        if abs(number - _MIDDLE) > 1 or (number - _MIDDLE) * self.direction > 0:
            return
        made = own, beside, *self._forwards(number)
        items = self.items[number] = _items(tape.events[self.starts[number] :], made)
        if number == _MIDDLE:
            other = self.born[number - self.direction]
            if items != self.items[number - self.direction] or _kinds(own) != _kinds(other):
                raise NotAlike
            self._write(items, made)

    def _forwards(self, number: int) -> tuple[range, range]:
        """What the forward of a turn has made, and that of the turn before it, which backward releases: of a
        loop that was played again, the last time."""
        if self.loop is None:
            return range(0), range(0)
        forward = self._run()
        return forward.born[number], forward.born[number - 1]

    def _run(self) -> _Way:
        assert self.loop is not None
        events = state.tape.events
        released = {~event for event in events[self.starts[_MIDDLE + 1] :] if event < 0}
        for loop in reversed(state.loops):
            born = loop.forward.born
            if any(index in born[_MIDDLE + 1] or index in born[_MIDDLE] for index in released):
                return loop.forward
        return self.loop.forward

    def _reserve(self, like: range) -> None:
        """Storages for the other turns, like those of a turn that was played."""
        tape = state.tape
        self.first = len(tape.sizes)
        columns: tuple[list[Any], ...] = (tape.sizes, tape.categories, tape.operations, tape.modules)
        for column in columns:
            column += column[like.start : like.stop] * self.times
        products = tape.products.intersection(like)
        for turn in range(self.times):
            moved = self.first + turn * len(like) - like.start
            tape.products.update(index + moved for index in products)

    def _write(self, items: list[tuple[int, int, int]], made: tuple[range, ...]) -> None:
        """Put the events of the other turns before those of the middle one, which is the last of them."""
        tape, count, size = state.tape, self.times, len(made[_OWN])
        own, beside, forward, below = (one.start for one in made)
        # what the next turn has saved for backward is known of a neighbour only now
        settled = tape.categories[beside : beside + size]
        tape.categories[self.first : self.first + count * size] = settled * count
        turns = [self.first + turn * size for turn in range(count)] + [own]
        forwards = [forward] * (count + 1)
        belows = [below] * (count + 1)
        if self.loop is not None:  # from the last turn down
            run = self._run()
            width = len(made[_FORWARD])
            forwards = [forward, *(run.first + turn * width for turn in range(count - 1, -1, -1))]
            belows = [*forwards[1:], below]
        written: list[int] = []
        for turn, start in enumerate(turns):
            bases = start, turns[turn - 1] if turn else beside, forwards[turn], belows[turn]
            written += [bases[who] + number ^ flip for flip, who, number in items]
        tape.events[self.starts[_MIDDLE] :] = written


def _items(events: list[int], made: tuple[range, ...]) -> list[tuple[int, int, int]]:
    """Events by who made what they are about: 0 for a birth and -1 for a death, who, and which of these."""
    found = []
    for event in events:
        index, flip = (event, 0) if event >= 0 else (~event, -1)
        who = next((who for who, born in enumerate(made) if index in born), None)
        if who is None:
            raise NotAlike
        found.append((flip, who, index - made[who].start))
    return found


def _kinds(born: range) -> list[Any]:
    tape = state.tape
    part = slice(born.start, born.stop)
    return [tape.sizes[part], tape.operations[part], tape.modules[part]]
