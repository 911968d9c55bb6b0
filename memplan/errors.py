"""Every error that memplan raises on purpose.

MemplanError                one clear sentence for the user; the command line prints it and exits 2
├── UnknownName             a model, card, optimizer ... that does not exist; names the closest that do
├── SpecError               a config.json that cannot be read or makes no sense
├── RecipeError             training options that contradict each other or the model
├── UnsupportedArchitecture a model family without a predicted plan
├── TraceError              a model that cannot be traced: which operation, where, why
└── KernelError             what memplan.kernels can't compute, on which card or of which layer
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class MemplanError(Exception):
    """A question that cannot be answered as asked. ``str(error)`` is one sentence fit for a user."""


_LONGEST = 200  # of what a sentence quotes


def reason(error: BaseException) -> str:
    """Why something failed, in a few words: the system's, or the library's own message. Never an exception's
    name, which says nothing to a user."""
    if isinstance(error, UnicodeError):
        return "it is no UTF-8 text"
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    if isinstance(error, KeyError) and error.args:
        return printable(f"{error.args[0]!r} is missing")
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "this machine has no memory left"
    return printable(str(said)) or "no reason was given"


def first_complaint(error: Any) -> tuple[str, str]:
    """Of pydantic's ValidationError the place of the first fault, and what is wrong there, in words."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])  # keys of a stranger's file among them
    return printable(place), printable(first["msg"].removeprefix("Value error, "))


def printable(text: str) -> str:
    """A text as a sentence may quote it from a stranger's file: short, without what a terminal would obey."""
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


def shown(value: object) -> str:
    """A JSON value as a user would write it, short whatever it is."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value) if value.bit_length() <= 64 else "a number of more than 19 digits"
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "...")
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return repr(value) if isinstance(value, float) else f"a {type(value).__name__}"


class UnknownName(MemplanError):
    """A name that is not known, with up to three close ones: ``close``, or those spelled most like it."""

    def __init__(
        self,
        kind: str,
        name: str,
        known: Iterable[str],
        hint: str = "",
        close: list[str] | None = None,
    ) -> None:
        import difflib

        self.kind, self.name = kind, name
        lowered = {candidate.lower(): candidate for candidate in known}
        matches = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.4)
        self.close = [lowered[match] for match in matches] if close is None else close
        text = f"unknown {kind} {shown(name)}"
        if self.close:
            *head, last = self.close
            text += f"; did you mean {', '.join(head) + ' or ' if head else ''}{last}?"
        else:
            text += "."
        super().__init__(f"{text} {hint}".strip())


class SpecError(MemplanError):
    """A model configuration that is unreadable, incomplete or contradictory."""


class RecipeError(MemplanError):
    """Training options that are invalid or contradict each other or the model."""


class UnsupportedArchitecture(MemplanError):
    """An architecture that has no predicted plan."""


class TraceError(MemplanError):
    """A model or step that cannot be traced."""


class KernelError(MemplanError):
    """What the kernels of :mod:`memplan.kernels` can't compute, or where they can't run."""
