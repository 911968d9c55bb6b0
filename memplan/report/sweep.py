"""Many plans on the terminal, a line each: what they differ in, what they take, and what that fits on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import HEADING, QUIET, Cell, bar, heading, note, paragraph, speaks_unicode, table
from memplan.report.plan import VERDICT_STYLES
from memplan.report.wording import common_and_own, short_card
from memplan.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.planning.plan import Plan

_BAR = 16  # columns
_WORDS = {"fits": "fits", "tight": "tight", "does not fit": "no"}
ON_A_CARD = "Needed is with the allocator simulated and what a process takes beside it."
AT_THE_PEAK = "The first of the usual cards that it fits on; --gpu NAME judges a card."


def show_sweep(plans: Sequence[Plan], console: Console, *, judged: bool) -> None:
    """Print the plans, of which each differs from the others in something. ``judged``: somebody named the
    cards."""
    recipes = [plan.recipe for plan in plans]
    names = list(dict.fromkeys(plan.model.name for plan in plans))
    varied = [
        field
        for field in type(recipes[0]).model_fields
        if len({str(getattr(recipe, field)) for recipe in recipes}) > 1
    ]
    varied = [field for field in varied if field not in _following(varied)]
    common, _ = common_and_own(recipes)
    heading(console, ", ".join(names))
    paragraph(console, common, "all  ", QUIET)
    console.print()
    most = max(plan.peak.allocated_bytes for plan in plans)
    head = [*(["model"] if len(names) > 1 else []), *(field.replace("_", "-") for field in varied)]
    cards = [short_card(fit.gpu) for fit in plans[0].fits] if judged else ["fits from"]
    bars = len(cards) == 1  # several cards need the room
    rows: list[list[Cell]] = [[Text(cell, QUIET) for cell in (*head, "peak GiB", *[""][:bars], *cards)]]
    for plan in plans:
        told: list[Cell] = [plan.model.name] if len(names) > 1 else []
        told += [_value(getattr(plan.recipe, field)) for field in varied]
        size = plan.peak.allocated_bytes
        drawn = Text(bar(size, most, _BAR, unicode=speaks_unicode(console)), "blue")
        rows.append([*told, Text(gib(size), HEADING), *[drawn][:bars], *_verdicts(plan, judged)])
    table(console, rows, "<" * len(head) + ">" + "<" * (bars + len(cards)))
    note(console, ON_A_CARD if judged else AT_THE_PEAK)


def _following(varied: Sequence[str]) -> set[str]:
    """Fields that follow from another one that varies, as the alpha does from the rank."""
    follows = {"lora_alpha": "r", "kbit_prep": "mode", "use_reentrant": "mode", "device_map": "gpus"}
    return {field for field, other in follows.items() if other in varied}


def _value(value: object) -> str:
    value = getattr(value, "value", value)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _verdicts(plan: Plan, judged: bool) -> list[Cell]:
    if judged:
        return [
            Text(f"{gib(fit.needed_bytes)} {_WORDS[fit.verdict]}", VERDICT_STYLES[fit.verdict])
            for fit in plan.fits
        ]
    fitting = [gpu for gpu, verdict in plan.glances() if verdict != "does not fit"]
    if not fitting:
        return [Text("none", VERDICT_STYLES["does not fit"])]
    smallest = min(fitting, key=lambda gpu: gpu.visible_bytes)
    return [Text(short_card(smallest.name), VERDICT_STYLES["fits"])]
