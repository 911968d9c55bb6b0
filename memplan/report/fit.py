"""The verdict on the terminal: one line a card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.report.console import heading
from memplan.report.plan import show_fits, show_model
from memplan.report.units import gib
from memplan.report.wording import phrases

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.planner import Plan


def show_fit(plan: Plan, console: Console) -> None:
    """Print what the plan needs and whether each card has it."""
    show_model(plan.model, console)
    told = phrases(plan.recipe)
    short = [told[field] for field in ("mode", "r", "gradient_checkpointing", "batch_size") if field in told]
    console.print(", ".join(short))
    heading(console, "Peak", f"{gib(plan.peak.allocated_bytes)} GiB allocated ({plan.provenance})")
    show_fits(plan.fits, console)
