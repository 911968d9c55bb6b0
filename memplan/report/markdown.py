"""Markdown of tables and names. Names of models, cards and modules are others' words: whatever they hold,
they stay text of the line or cell they stand in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from memplan.streams import visible

# What GitHub's Markdown reads as marks, HTML or the end of a cell; the last three only where a line begins.
# An underscore inside a word is none of them.
_MARKS = re.compile(r"[\\`*|\[\]~<&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\A[#>]|\A[-+](?=\s)|\A\d+[.)](?=\s)")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def markdown_text(words: str) -> str:
    """The words as they are, on one line."""
    return _MARKS.sub(_escaped, visible(words).strip())


def _escaped(mark: re.Match[str]) -> str:
    return _ENTITIES.get(mark[0]) or f"{mark[0][:-1]}\\{mark[0][-1]}"


def markdown_table(head: Sequence[str], alignment: str, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, of ``<`` (left) and ``>`` (right) for each column."""
    yield _row([markdown_text(cell) for cell in head])
    yield _row(["---" if side == "<" else "---:" for side in alignment])
    for row in rows:
        yield _row([markdown_text(cell) for cell in row])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
