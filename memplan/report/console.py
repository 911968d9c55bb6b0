"""The terminal that reports are written to, and lines laid out in columns."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from textwrap import wrap
from typing import IO, Any, Literal, TextIO, cast

from rich.console import Console
from rich.text import Text

from memplan.streams import typable, visible, writing

HEADING = "bold"
WARNING = "yellow"
QUIET = "dim"

WIDEST = 100  # columns; longer bars and lines say no more
GAP = "  "

Cell = str | Text

_SIZE = re.compile(r"[1-9]\d{0,3}", re.ASCII)  # columns or lines


class _Terminal(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts as they are to be read: without markup, and without what a terminal would obey."""
        with writing():
            super().print(*map(_inert, objects), **options)

    def on_broken_pipe(self) -> None:
        """Leave a reader that went away to memplan.cli; rich would exit with 1, "does not fit"."""
        raise BrokenPipeError


def _inert(shown: Any) -> Any:
    if isinstance(shown, str):
        return Text(visible(shown))
    if isinstance(shown, Text) and not shown.plain.isprintable():
        shown = shown.copy()
        shown.plain = visible(shown.plain)  # of equal length, so that styles stay where they are
    return shown


def terminal() -> Console:
    """Standard output: coloured if it is a terminal and NO_COLOR is unset, at most 100 columns wide."""
    # rich's own reading of NO_COLOR keeps bold and dim; without a colour system there are no codes at all.
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    console = _Terminal(
        highlight=False, markup=False, emoji=False, color_system=colours, _environ=_environment()
    )
    console.width = min(console.width, WIDEST)
    return console


def side_terminal() -> Console:
    """Standard error, for progress: what can't be shown there is dropped, and nothing else is lost by it."""
    console = _Terminal(stderr=True, highlight=False, markup=False, emoji=False, _environ=_environment())
    console.file = cast(IO[str], _Droppable(sys.stderr))
    return console


def _environment() -> dict[str, str]:
    """The environment without a size of the terminal that is none: rich fails on "²" and on 0 columns."""
    named = {name: os.environ.get(name, "") for name in ("COLUMNS", "LINES")}
    none = {name for name, size in named.items() if not _SIZE.fullmatch(size)}
    return {name: value for name, value in os.environ.items() if name not in none}


class _Droppable(io.TextIOBase):
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def speaks_unicode(console: Console) -> bool:
    """False on terminals that cannot show block characters."""
    return console.encoding.lower().startswith("utf")


def bar(part: int, whole: int, width: int, *, unicode: bool = True) -> str:
    """A bar as long as the part of the whole, which is ``width`` columns; never quite nothing."""
    if not unicode:
        return "#" * max(1, round(width * part / whole))
    eighths = max(1, round(8 * width * part / whole))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


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
    cells = [[_inert(cell) for cell in row] for row in rows]
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
    sentence = typable(sentence)
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
