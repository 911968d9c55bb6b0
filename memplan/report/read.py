"""What was read of a trainer's file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.console import QUIET, paragraph, warning

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.planning.plan import Plan

_MOST = 8  # keys that are named of those that move no memory; --json has all


def show_read(plan: Plan, console: Console) -> None:
    """Print what the recipe was read from, which keys were passed over, and where the plan differs."""
    read = plan.read
    if read is None:
        return
    told = [f"{key}: {_brief(value)}" for key, value in read.understood.items()]
    paragraph(console, told, f"read from {read.file} ({read.kind.replace('_', '-')})", QUIET)
    if read.ignored:
        rest = len(read.ignored) - _MOST
        more = [f"{rest} more"] if rest > 0 else []
        paragraph(console, [*read.ignored[:_MOST], *more], "ignored, no memory", QUIET)
    for sentence in read.left_out:
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
