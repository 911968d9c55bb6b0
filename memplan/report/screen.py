"""A report of parts, the first screen of which holds the answer: what there is no room for is left to
--verbose."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from memplan.report.console import note

if TYPE_CHECKING:
    from rich.console import Console as Terminal

LINES = 21  # of a terminal's 24: what was made of the command and the prompt take the others
ALWAYS, DETAIL = 0, 9


class Part(NamedTuple):
    """What is printed together. ``weight``: the parts of the highest go first where there is no room;
    DETAIL is for --verbose alone. ``name``: what is missing without it."""

    show: Callable[[Terminal], None]
    weight: int = ALWAYS
    name: str = ""


def show(parts: Sequence[Part], console: Terminal, *, verbose: bool) -> None:
    """Print the parts in order, as many as there is room for unless ``verbose``."""
    heights = [_height(part, console.width) for part in parts]
    kept = [index for index, part in enumerate(parts) if (verbose or part.weight < DETAIL) and heights[index]]
    while not verbose and sum(heights[index] for index in kept) > LINES - 1:
        heaviest = max(kept, key=lambda index: (parts[index].weight, index))
        if parts[heaviest].weight == ALWAYS:
            break
        kept.remove(heaviest)
    for index in kept:
        parts[index].show(console)
    missing = [
        part.name for index, part in enumerate(parts) if index not in kept and heights[index] and part.name
    ]
    if missing:
        room = console.width
        line = "More with --verbose"
        told = f"{line}: {', '.join(missing)}"
        note(console, told if len(told) <= room else line)


def blank(console: Terminal) -> None:
    """An empty line."""
    console.print()


def _height(part: Part, width: int) -> int:
    paper = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    part.show(paper)
    return paper.file.getvalue().count("\n")  # type: ignore[attr-defined, no-any-return]
