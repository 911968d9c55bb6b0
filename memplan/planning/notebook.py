"""A plan as a notebook shows it: a table of what the peak is made of, and what it fits on."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from memplan.units import gib, share

if TYPE_CHECKING:
    from memplan.planning.plan import Plan


def html(plan: Plan) -> str:
    """The table. What users and configs name is escaped."""
    peak = plan.peak
    whole = peak.tensor_bytes
    rows = [
        (name.replace("_", " "), f"{gib(size)} GiB", share(size, whole))
        for name, size in peak.by_category.model_dump().items()
        if size
    ]
    cards = [(gpu.name, f"{gib(gpu.visible_bytes)} GiB", verdict) for gpu, verdict in plan.glances()]
    return (
        f"<div><strong>{escape(plan.model.name)}</strong>, {escape(plan.recipe.mode.value)}: {gib(whole)} "
        f"GiB at the peak ({escape(plan.provenance)}), in {escape(peak.phase)} at {escape(peak.operation)}"
        f"{_table(rows)}{_table(cards)}</div>"
    )


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
