"""Markdown with names of strangers in it: they are shown, and make no structure, links or HTML."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.streams import visible

_MEANT = {"|": "\\|", "<": "&lt;", "`": "'", "[": "\\[", "*": "\\*"}


def quoted(text: str) -> str:
    """A text of one line, without what Markdown or a browser would act on."""
    return "".join(_MEANT.get(character, character) for character in visible(text))


def row(cells: Sequence[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(quoted, cells)) + " |"
