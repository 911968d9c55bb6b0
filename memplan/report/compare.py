"""Plans side by side on the terminal, one column a mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import HEADING, QUIET, Cell, note, paragraph, table
from memplan.report.headline import FEW, of_modes
from memplan.report.plan import (
    FOOTNOTE,
    SUMMARY,
    VERDICT_STYLES,
    known,
    lacking,
    show_headline,
    show_model,
    show_note,
)
from memplan.report.read import show_differences, show_ignored, show_read
from memplan.report.screen import ALWAYS, DETAIL, Part, blank, show
from memplan.report.wording import common_and_own, short_card
from memplan.units import count, gib, ratio

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.asked.gpus import Gpu
    from memplan.device.fit import Verdict
    from memplan.planning.plan import Plan

_WORDS = {"fits": "fits", "tight": "tight", "does not fit": "no"}


def show_comparison(plans: Sequence[Plan], console: Console, *, verbose: bool = False) -> None:
    """Print the plans of one model, each with a recipe of another mode. ``verbose``: more than a first
    screen."""
    cards = [list(plan.glances()) for plan in plans]
    lines = of_modes(plans, cards)
    few = bool(cards[0]) and len(cards[0]) <= FEW
    parts = [
        Part(lambda console: show_headline(lines, console)),
        Part(blank) if lines else Part(lambda console: None),
        Part(lambda console: show_model(plans[0].model, console)),
        Part(lambda console: show_note(plans[0].model, console), 5, "which model"),
        Part(lambda console: show_read(plans[0], console, whole=verbose)),
        Part(lambda console: show_ignored(plans[0], console, whole=verbose), 4, "keys that were ignored"),
        Part(lambda console: _show_recipes(plans, console)),
        Part(blank),
        Part(lambda console: _show_sizes(plans, console, cards if few or verbose else ())),
        Part(lambda console: _show_lacking(plans, console), ALWAYS if few else 3, "what cards lack"),
        Part(lambda console: show_differences(plans[0], console), 1),
        Part(lambda console: note(console, FOOTNOTE), DETAIL),
        Part(lambda console: None if few else blank(console), DETAIL, "each card"),
    ]
    show(parts, console, verbose=verbose)


def _show_recipes(plans: Sequence[Plan], console: Console) -> None:
    common, own = common_and_own([plan.recipe for plan in plans])
    paragraph(console, common, "all  ", QUIET)
    for plan, phrases in zip(plans, own, strict=True):
        paragraph(console, phrases, f"{plan.recipe.mode.value:5}", QUIET)


def _show_sizes(
    plans: Sequence[Plan], console: Console, cards: Sequence[Sequence[tuple[Gpu, Verdict]]]
) -> None:
    def row(label: Cell, cell: Callable[[Plan], str], style: str = "") -> list[Cell]:
        return [label, *(Text(cell(plan), style) for plan in plans)]

    rows = [
        row(Text("GiB", QUIET), lambda plan: plan.recipe.mode.value, HEADING),
        *(row(label, _summary_cell(field)) for field, label in SUMMARY.items()),
        row(Text("peak allocated", HEADING), lambda plan: gib(plan.peak.allocated_bytes), HEADING),
        row(
            f"trainable of {count(plans[0].parameters.total)}",
            lambda plan: ratio(plan.parameters.trainable, plan.parameters.total),
        ),
    ]
    for verdicts in zip(*cards, strict=True):
        gpu = verdicts[0][0]
        cells = (Text(_WORDS[verdict], VERDICT_STYLES[verdict]) for _, verdict in verdicts)
        rows.append([f"  {short_card(gpu.name)}, {gib(gpu.visible_bytes)}", *cells])
    table(console, rows, "<" + ">" * len(plans))


def _show_lacking(plans: Sequence[Plan], console: Console) -> None:
    """Print what cards that were asked about lack."""
    for line in dict.fromkeys(line for plan in plans for line in lacking(plan, named=False)):
        note(console, line)


def _summary_cell(field: str) -> Callable[[Plan], str]:
    return lambda plan: gib(known(plan)[field])
