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


class MemplanError(Exception):
    """A question that cannot be answered as asked. ``str(error)`` is one sentence fit for a user."""


class UnknownName(MemplanError):
    """A name that is not known, with up to three close ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        import difflib

        self.kind, self.name = kind, name
        lowered = {candidate.lower(): candidate for candidate in known}
        matches = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.4)
        self.close = [lowered[match] for match in matches]
        text = f"unknown {kind} {name!r}"
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


def reason(error: Exception) -> str:
    """Why a file could not be read or written, in the system's words."""
    if isinstance(error, UnicodeError):
        return "it is no UTF-8 text"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or "the system does not say why"
