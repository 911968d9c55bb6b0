"""How long the sequences of a run are: from a file, or drawn."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import MemplanError, reason, shown

DRAWN = 16  # steps
MOST = 64  # steps that are played
_MOST_BYTES = 64 << 20
_LONGEST = 1 << 24
_SEED = 0

Step = tuple[tuple[int, ...], ...]  # the lengths of each forward pass


@dataclass(frozen=True)
class Lengths:
    """``told``: where they are from, in words. ``given``: in the order in which they are trained on; or
    ``drawn``: by mean, standard deviation and maximum of a lognormal distribution, in tokens."""

    told: str
    given: tuple[int, ...] = ()
    drawn: tuple[float, float, int] | None = None

    def steps(self, batch_size: int, accumulated: int, longest: int | None) -> list[Step]:
        """The steps that are played: as many as there are whole ones, at most 64; else the first 63, and the
        one of the longest forward pass. Sequences are cut at ``longest``. Raises MemplanError if there is no
        step."""
        size = batch_size * accumulated
        lengths = self.given or self._draw(DRAWN * size)
        cut = [length if longest is None else min(length, longest) for length in lengths]
        found = [
            tuple(tuple(cut[at : at + batch_size]) for at in range(begin, begin + size, batch_size))
            for begin in range(0, len(cut) - size + 1, size)
        ]
        if not found:
            raise MemplanError(
                f"{self.told} has {len(cut)} lengths, and a step takes {size}: give more, or a smaller batch"
            )
        if len(found) <= MOST:
            return found
        rest = found[MOST - 1 :]
        return [*found[: MOST - 1], max(rest, key=lambda step: max(map(max, step)))]

    def only(self, step: Step) -> Lengths:
        """A run of two such steps, one after the other."""
        return Lengths(self.told, given=2 * tuple(length for rows in step for length in rows))

    def _draw(self, count: int) -> tuple[int, ...]:
        assert self.drawn is not None
        mean, deviation, most = self.drawn
        spread = math.log1p((deviation / mean) ** 2)
        dice = random.Random(_SEED)
        middle = math.log(mean) - spread / 2
        drawn = (math.exp(dice.gauss(middle, math.sqrt(spread))) for _ in range(count))
        return tuple(min(most, max(1, round(length))) for length in drawn)


def lengths_of(asked: str | Iterable[int]) -> Lengths:
    """What :func:`memplan.plan` is given. Raises MemplanError."""
    if isinstance(asked, str):
        return read_lengths(asked)
    given = tuple(asked)
    if not given or not all(type(length) is int and 1 <= length <= _LONGEST for length in given):
        raise MemplanError(
            f"lengths are whole numbers of tokens from 1, and some of them, not {shown(given)}"
        )
    return Lengths("lengths", given=given)


def read_lengths(asked: str) -> Lengths:
    """``lognormal:MEAN,SD,MAX``, or a file with a number on each line or a JSON list of them. Raises
    MemplanError."""
    kind, colon, numbers = asked.partition(":")
    if colon and kind == "lognormal":
        return Lengths(asked, drawn=_drawn(asked, numbers))
    return Lengths(shown(asked), given=_given(asked, _content(asked)))


def _content(asked: str) -> str:
    path = Path(asked).expanduser()
    try:
        if not path.is_file():
            raise MemplanError(
                "lengths are a file of them or lognormal:MEAN,SD,MAX, as in lognormal:600,400,4096; there is "
                f"no file {shown(asked)}"
            )
        with path.open("rb") as opened:
            content = opened.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise MemplanError(
                f"{shown(asked)} is larger than {_MOST_BYTES >> 20} MiB: give some of its lengths"
            )
        return content.decode("utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        raise MemplanError(f"{shown(asked)} can't be read: {reason(error)}") from None


def _drawn(asked: str, numbers: str) -> tuple[float, float, int]:
    try:
        mean, deviation, most = (float(number) for number in numbers.split(","))
    except ValueError:
        mean = deviation = most = math.nan
    if not (1 <= mean < _LONGEST and 0 <= deviation < _LONGEST and mean <= most <= _LONGEST):
        raise MemplanError(
            "lognormal takes a mean, a standard deviation and a maximum in tokens, the mean from 1 to the "
            f"maximum, such as lognormal:600,400,4096, not {shown(asked)}"
        )
    return mean, deviation, int(most)


def _given(asked: str, text: str) -> tuple[int, ...]:
    found: Any
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.split()]
    except (ValueError, RecursionError):
        found = None
    whole = isinstance(found, list) and all(type(one) is int and 1 <= one <= _LONGEST for one in found)
    if not whole or not found:
        raise MemplanError(
            f"{shown(asked)} has to hold lengths in tokens, a whole number from 1 on each line, or a JSON "
            "list of them"
        )
    return tuple(found)
