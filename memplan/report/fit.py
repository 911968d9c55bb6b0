"""The verdict on the terminal: whether it fits, what to change, and what the run takes, term by term."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import QUIET, Cell, heading, note, table
from memplan.report.evaluation import evaluating, lengths, slipped, varying
from memplan.report.headline import FEW, Line, accumulating, counted, remedies, verdicts
from memplan.report.plan import (
    TIGHT,
    VERDICT_STYLES,
    lacking,
    moment,
    needed,
    show_headline,
    show_host,
    show_model,
    show_note,
    show_recipe,
    warn,
)
from memplan.report.read import show_differences, show_ignored, show_read
from memplan.report.screen import DETAIL, Part, blank, show
from memplan.report.wording import short_card
from memplan.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.planning.plan import Plan
    from memplan.planning.records import Advice

# Of the defaults, what changes most: the others are told with --verbose.
_TOLD = (
    "trainer",
    "target_modules",
    "kbit_prep",
    "kernels",
    "dtype",
    "autocast",
    "optimizer",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "attn",
    "loss",
    "batch_size",
    "r",
    "alloc_conf",
)
_MOST_CHANGES = 3  # that a first screen lists


def show_fit(
    plan: Plan,
    console: Console,
    given: Collection[str] = (),
    *,
    found: Line | None = None,
    verbose: bool = False,
) -> None:
    """Print whether the plan fits each card. ``given``: the recipe's fields that were asked for; ``found``:
    what --maximize says; ``verbose``: more than a first screen."""
    lines = [*([found] if found is not None else []), *counted(plan)]
    lines += verdicts(plan.fits, plan.recipe.gpus)
    lines += remedies(plan)
    parts = [
        Part(lambda console: show_headline(lines, console)),
        Part(blank),
        Part(lambda console: show_model(plan.model, console)),
        Part(lambda console: show_note(plan.model, console)),
        Part(lambda console: show_read(plan, console, whole=verbose)),
        Part(lambda console: show_ignored(plan, console, whole=verbose), 4, "keys that were ignored"),
        Part(lambda console: show_recipe(plan, given, console, () if verbose else _TOLD)),
        Part(blank),
        Part(lambda console: _show_sizes(plan, console)),
        Part(lambda console: show_host(plan, console)),
        Part(lambda console: _show_cards(plan, console), 1 if len(plan.fits) > FEW else DETAIL, "each card"),
        Part(
            lambda console: _show_notes(plan, console, verbose),
            1 if lacking(plan, named=True) else 6,
            "where it runs out",
        ),
        Part(lambda console: note(console, needed(plan)), DETAIL),
        Part(lambda console: warn(accumulating(plan, plan.fits), console), 3, "accumulation"),
        Part(lambda console: show_differences(plan, console)),
        Part(lambda console: warn(slipped(plan), console), 2, "the usual slip"),
        Part(lambda console: warn(lengths(plan), console)),
        Part(lambda console: warn(evaluating(plan), console), 4, "evaluation"),
        Part(lambda console: warn(varying(plan), console), 7, "lengths that vary"),
    ]
    for advice in plan.advice:
        if verbose:
            parts += [Part(blank), Part(lambda console, advice=advice: show_advice(advice, console))]  # type: ignore[misc]
        else:
            parts.append(
                Part(lambda console, advice=advice: _show_first(plan, advice, console), 2, "all changes")  # type: ignore[misc]
            )
    show(parts, console, verbose=verbose)


def _show_sizes(plan: Plan, console: Console) -> None:
    peak, allocator = plan.peak, plan.allocator
    heading(console, "Peak", f"{gib(peak.allocated_bytes)} GiB allocated ({plan.provenance})")
    console.print(Text(f"  in {moment(peak)}"))
    heading(
        console,
        "Reserved",
        f"{gib(allocator.reserved_bytes)} GiB (allocator simulated), "
        f"{gib(allocator.fragmentation_bytes)} more than allocated",
    )
    if plan.recipe.parallel and allocator.fragmentation_bytes > allocator.reserved_bytes // 10:
        from memplan import strategies

        if strategies.loads_whole(plan.recipe):
            console.print(Text("  Each GPU loads all of the 4-bit weights before it keeps its part."))


def _show_cards(plan: Plan, console: Console) -> None:
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


def _show_notes(plan: Plan, console: Console, verbose: bool) -> None:
    for fit in plan.fits:
        if fit.note:
            note(console, f"{short_card(fit.gpu)}: {fit.note}")
    if verbose and any(fit.verdict == "tight" for fit in plan.fits):
        note(console, TIGHT)


def _show_first(plan: Plan, advice: Advice, console: Console) -> None:
    """Print the changes that come first, a line each; of a run that fits, what there is room for."""
    if advice.room:
        show_advice(advice, console)
        return
    good = [change for change in advice.changes if change.verdict != "does not fit"]
    rows: list[list[Cell]] = [
        [
            "" if change.needed_bytes is None else f"{gib(change.needed_bytes)} GiB",
            Text(change.verdict, VERDICT_STYLES[change.verdict]),
            change.command if plan.read is None else change.config,
            Text(change.title, QUIET),
        ]
        for change in good[:_MOST_CHANGES]
    ]
    if rows:
        heading(console, f"To fit the {short_card(advice.gpu)}", "one of these")
        table(console, rows, "><<<", gives_way=3)
    elif advice.combination is not None:
        heading(console, f"To fit the {short_card(advice.gpu)}", "together")
        note(console, f"  {'; '.join(advice.combination.titles)}")
    if advice.cards:
        note(console, f"As it is, it fits on {', '.join(short_card(card) for card in advice.cards)}.")


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
