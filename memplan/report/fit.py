"""The verdict on the terminal: what the run takes, term by term, and one line a card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import QUIET, Cell, heading, note, paragraph, table, warning
from memplan.report.evaluation import evaluating, varying
from memplan.report.plan import TIGHT, VERDICT_STYLES, moment, needed, show_model
from memplan.report.read import show_read
from memplan.report.wording import phrases, short_card
from memplan.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.planning.plan import Plan
    from memplan.planning.records import Advice

_TOLD = (
    "mode",
    "r",
    "kbit_prep",
    "kernels",
    "dtype",
    "autocast",
    "optimizer",
    "gradient_checkpointing",
    "attn",
    "loss",
    "batch_size",
    "alloc_conf",
)


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
        f"{gib(allocator.reserved_bytes)} GiB (allocator simulated), "
        f"{gib(allocator.fragmentation_bytes)} more than allocated",
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
    note(console, needed(plan))
    if any(fit.verdict == "tight" for fit in plan.fits):
        note(console, TIGHT)
    for sentence in (evaluating(plan), varying(plan.recipe)):
        if sentence is not None:
            warning(console, sentence)
    show_read(plan, console)
    for advice in plan.advice:
        console.print()
        show_advice(advice, console)


def show_advice(advice: Advice, console: Console) -> None:
    """Print what to change for a card, or what it leaves room for."""
    card = short_card(advice.gpu)
    if advice.room:
        heading(console, f"Room on the {card}", "for one of these")
        for line in advice.room:
            note(console, f"  {line}")
        return
    if not advice.changes:
        return
    heading(console, f"To fit the {card}", "one change, each planned anew; what it saves at the peak")
    rows: list[list[Cell]] = [[Text(cell, QUIET) for cell in ("GiB", "saves", "needed", "", "")]]
    for change in advice.changes:
        needed = "" if change.needed_bytes is None else gib(change.needed_bytes)
        verdict = Text(change.verdict, VERDICT_STYLES[change.verdict])
        rows.append(["", gib(change.saves_bytes), needed, verdict, change.title])
    table(console, rows, "<>><<", gives_way=4)
    for change in advice.changes:
        if change.verdict != "does not fit":
            heading(console, f"{change.title}")
            note(console, f"  {change.command}")
            note(console, f"  {change.config}")
            note(console, f"  costs {change.cost}")
    if advice.combination is not None:
        together = advice.combination
        heading(console, "Together", f"{gib(together.needed_bytes)} GiB needed: {together.verdict}")
        note(console, f"  {together.command}")
        if together.config:
            note(console, f"  {together.config}")
        note(console, f"  {'; '.join(together.titles)}")
    elif advice.changes[0].verdict == "does not fit":
        note(console, "No combination of these fits.")
    if advice.cards:
        note(console, f"As it is, it fits on {', '.join(short_card(card) for card in advice.cards)}.")
