"""What was read of a trainer's file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan import runfiles
from memplan.report.console import QUIET, paragraph, warning

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.planning.plan import Plan


def show_read(plan: Plan, console: Console, *, whole: bool = True) -> None:
    """Print what the recipe was read from: a line of it, or the ``whole``."""
    if plan.read is not None:
        told = [f"{key}: {_brief(value)}" for key, value in plan.read.understood.items()]
        label = f"read from {plan.read.file} ({runfiles.find(plan.read.kind).title}):"
        _show(told, label, console, whole=whole)


def show_ignored(plan: Plan, console: Console, *, whole: bool = True) -> None:
    """Print which of its keys were passed over: a line of them, or the ``whole``."""
    if plan.read is not None:
        _show(list(plan.read.ignored), "ignored, no memory:", console, whole=whole)


def _show(phrases: list[str], label: str, console: Console, *, whole: bool) -> None:
    if phrases:
        room = console.width - len(label) - 2
        paragraph(console, phrases if whole else _first(phrases, room), label, QUIET)


def _first(phrases: list[str], room: int) -> list[str]:
    """As many as a line has room for, and how many more there are."""
    kept = len(phrases)
    while kept and len(", ".join(_with_rest(phrases, kept))) > room:
        kept -= 1
    if kept:
        return _with_rest(phrases, kept)
    rest = _with_rest(phrases, 1)[1:]
    cut = max(room - len("".join(rest)) - 3, 0)
    return [f"{phrases[0][:cut]}…", *rest]


def _with_rest(phrases: list[str], kept: int) -> list[str]:
    rest = len(phrases) - kept
    return [*phrases[:kept], *([f"{rest} more"] if rest else [])]


def show_differences(plan: Plan, console: Console) -> None:
    """Print where the run that the file asks for differs from its plan."""
    for sentence in () if plan.read is None else plan.read.left_out:
        warning(console, f"{sentence}.")


def _brief(value: Any) -> str:
    """A value as the file has it, short."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value))}]" if len(value) <= 7 else f"{len(value)} values"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_brief(one)}" for key, one in value.items()) + "}"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
