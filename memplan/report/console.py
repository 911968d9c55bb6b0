"""The terminal that reports are written to, and lines laid out in columns."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Literal

from rich.console import Console
from rich.text import Text

HEADING = "bold"
WARNING = "yellow"
QUIET = "dim"

WIDEST = 100  # columns; longer bars and lines say no more
GAP = "  "

Cell = str | Text


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Leave a reader that went away to memplan.cli; rich would exit with 1, "does not fit"."""
        raise BrokenPipeError


def terminal() -> Console:
    """Standard output: coloured if it is a terminal and NO_COLOR is unset, at most 100 columns wide."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # ASCII and Latin-1 terminals lack "×" and "█"
    # rich's own reading of NO_COLOR keeps bold and dim; without a colour system there are no codes at all.
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    console = _Terminal(highlight=False, markup=False, emoji=False, color_system=colours)
    console.width = min(console.width, WIDEST)
    return console


def speaks_unicode(console: Console) -> bool:
    """False on terminals that cannot show block characters."""
    return console.encoding.lower().startswith("utf")


def heading(console: Console, title: str, rest: str = "") -> None:
    """Print the first line of a part of the report."""
    console.print(Text.assemble((title, HEADING), GAP if rest else "", rest))


def table(
    console: Console,
    rows: Iterable[Sequence[Cell]],
    alignment: str,
    first_width: int = 0,
    gives_way: int = 0,
) -> None:
    """Print rows in columns; ``alignment`` has < or > a column. One column gives way if it must."""
    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    widths[0] = max(widths[0], first_width)
    room = console.width - 2 - sum(width + len(GAP) for width in widths) + len(GAP) + widths[gives_way]
    widths[gives_way] = max(min(widths[gives_way], room), 8)
    for row in cells:
        line = Text(GAP)
        for cell, width, side in zip(row, widths, alignment, strict=True):
            cell.truncate(width, overflow="ellipsis")
            space = " " * (width - cell.cell_len)
            line.append_text(Text.assemble(cell, space) if side == "<" else Text.assemble(space, cell))
            line.append(GAP)
        line.rstrip()
        console.print(line, soft_wrap=True)


def note(console: Console, sentence: str, style: str = QUIET) -> None:
    """Print a sentence that may be passed over."""
    indent = " " * (len(sentence) - len(sentence.lstrip()))
    for line in wrap(sentence, console.width, subsequent_indent=indent, break_on_hyphens=False):
        console.print(Text(line, style), soft_wrap=True)


def warning(console: Console, sentence: str) -> None:
    """Print a sentence that should not be passed over."""
    note(console, sentence, WARNING)


def paragraph(console: Console, phrases: Sequence[str], label: str = "", style: str = "") -> None:
    """Print phrases with commas between them, beside a label; a line ends between two phrases."""
    indent = len(label) + len(GAP) if label else 0
    lines = [""]
    for number, phrase in enumerate(phrases):
        piece = phrase + ("," if number < len(phrases) - 1 else "")
        if lines[-1] and indent + len(lines[-1]) + 1 + len(piece) > console.width:
            lines.append(piece)
        else:
            lines[-1] = f"{lines[-1]} {piece}".strip()
    for number, line in enumerate(lines):
        margin = label + GAP if label and number == 0 else " " * indent
        console.print(Text.assemble((margin, HEADING), (line, style)), soft_wrap=True)
