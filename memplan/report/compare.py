"""Plans side by side on the terminal, one column a mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import HEADING, QUIET, Cell, note, paragraph, table
from memplan.report.plan import FOOTNOTE, SUMMARY, VERDICT_STYLES, known, lacking, show_model
from memplan.report.read import show_differences, show_read
from memplan.report.wording import common_and_own, short_card
from memplan.units import count, gib, ratio

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.planning.plan import Plan

_WORDS = {"fits": "fits", "tight": "tight", "does not fit": "no"}


def show_comparison(plans: Sequence[Plan], console: Console) -> None:
    """Print the plans of one model, each with a recipe of another mode."""
    show_model(plans[0].model, console)
    show_read(plans[0], console, whole=False)
    show_differences(plans[0], console)
    common, own = common_and_own([plan.recipe for plan in plans])
    paragraph(console, common, "all  ", QUIET)
    for plan, phrases in zip(plans, own, strict=True):
        paragraph(console, phrases, f"{plan.recipe.mode.value:5}", QUIET)
    console.print()

    def row(label: Cell, cell: Callable[[Plan], str], style: str = "") -> list[Cell]:
        return [label, *(Text(cell(plan), style) for plan in plans)]

    rows = [
        row(Text("GiB", QUIET), lambda plan: plan.recipe.mode.value, HEADING),
        *(row(label, _summary_cell(field)) for field, label in SUMMARY.items()),
        row(Text("peak allocated", HEADING), lambda plan: gib(plan.peak.allocated_bytes), HEADING),
        row("  reached in", lambda plan: plan.peak.phase),
        row("", lambda plan: ""),
        row("trainable", lambda plan: count(plan.parameters.trainable)),
        row(
            f"  of {count(plans[0].parameters.total)}",
            lambda plan: ratio(plan.parameters.trainable, plan.parameters.total),
        ),
    ]
    cards = [list(plan.glances()) for plan in plans]
    if cards[0]:
        rows.append(row("", lambda plan: ""))
    for verdicts in zip(*cards, strict=True):
        gpu = verdicts[0][0]
        cells = (Text(_WORDS[verdict], VERDICT_STYLES[verdict]) for _, verdict in verdicts)
        rows.append([f"  {short_card(gpu.name)}, {gib(gpu.visible_bytes)}", *cells])
    table(console, rows, "<" + ">" * len(plans))
    note(console, FOOTNOTE)
    for line in dict.fromkeys(line for plan in plans for line in lacking(plan, named=False)):
        note(console, line)


def _summary_cell(field: str) -> Callable[[Plan], str]:
    return lambda plan: gib(known(plan)[field])
