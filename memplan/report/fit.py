"""The verdict on the terminal: what the run takes, term by term, and one line a card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import QUIET, heading, note, paragraph, table
from memplan.report.plan import NEEDED, TIGHT, VERDICT_STYLES, moment, short_card, show_model
from memplan.report.units import gib
from memplan.report.wording import phrases

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.planner import Plan

_TOLD = ("mode", "r", "kbit_prep", "optimizer", "gradient_checkpointing", "batch_size", "alloc_conf")


def show_fit(plan: Plan, console: Console) -> None:
    """Print what the plan needs and whether each card has it."""
    show_model(plan.model, console)
    told = phrases(plan.recipe)
    paragraph(console, [told[field] for field in _TOLD if field in told])
    allocator = plan.allocator
    heading(console, "Peak", f"{gib(plan.peak.allocated_bytes)} GiB allocated ({plan.provenance})")
    console.print(Text(f"  in {moment(plan.peak)}"))
    heading(
        console,
        "Reserved",
        f"{gib(allocator.reserved_bytes)} GiB (allocator simulated): {gib(allocator.allocated_bytes)} in "
        f"blocks and {gib(allocator.fragmentation_bytes)} between them",
    )
    rows = [[Text(cell, QUIET) for cell in ("GiB", "usable", "reserved", "beside", "needed", "headroom", "")]]
    for fit in plan.fits:
        sizes = (fit.total_bytes, fit.reserved_bytes, fit.context_bytes, fit.needed_bytes, fit.headroom_bytes)
        rows.append(
            [
                Text(short_card(fit.gpu)),
                *(Text(gib(size)) for size in sizes),
                Text(fit.verdict, VERDICT_STYLES[fit.verdict]),
            ]
        )
    table(console, rows, "<>>>>><")
    for fit in plan.fits:
        if fit.note:
            note(console, f"{short_card(fit.gpu)}: {fit.note}")
    note(console, NEEDED)
    if any(fit.verdict == "tight" for fit in plan.fits):
        note(console, TIGHT)
