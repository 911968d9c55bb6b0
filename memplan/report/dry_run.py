"""A dry run on the terminal: the verdict, what each step took, the peak's lines, where it ran out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import QUIET, Cell, heading, note, paragraph, table
from memplan.report.plan import VERDICT_STYLES
from memplan.report.wording import short_card
from memplan.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.emulate.answer import Counters, DryRun, Held, Line, Peak, RanOut

_SHOWN = 8  # lines that hold the most


def show_dry_run(answer: DryRun, console: Console) -> None:
    """Print the answer."""
    card = short_card(answer.gpu) if answer.count == 1 else f"{answer.count} × {short_card(answer.gpu)}"
    words = Text.assemble((f"{answer.verdict}", VERDICT_STYLES[answer.verdict]), f" on the {card} (emulated)")
    if answer.needed_bytes is not None:
        each = " on each" if answer.count > 1 else ""
        words.append(f": {gib(answer.needed_bytes)} of {gib(answer.total_bytes)} GiB needed{each}")
    console.print(words)
    note(console, " ".join(answer.command))
    versions = [f"{name} {version}" for name, version in answer.libraries.items()]
    paragraph(console, versions, "emulated with ", QUIET)
    console.print()
    _show_steps(answer, console)
    if answer.ran_out is not None:
        _show_ran_out(answer.ran_out, console)
    if answer.peak is not None:
        _show_peak(answer.peak, console, ended=answer.ran_out is not None)
    if answer.needed_bytes is not None:
        note(
            console,
            f"Needed is what PyTorch's allocator reserved, and {gib(answer.context_bytes)} GiB for the "
            "process beside it (assumed).",
        )
    for sentence in answer.notes:
        note(console, f"Note: {sentence}.")


def _show_steps(answer: DryRun, console: Console) -> None:
    rows: list[list[Cell]] = [[Text(cell, QUIET) for cell in ("GiB", "allocated", "reserved", "resting")]]
    if answer.loaded is not None:
        rows.append(["loading", *_sizes(answer.loaded)])
    rows += [[f"step {number}", *_sizes(step)] for number, step in enumerate(answer.steps, 1)]
    table(console, rows, "<>>>")
    resting = [step.resting_bytes for step in answer.steps]
    if len(resting) > 2 and resting[-1] > resting[-2] > resting[-3]:
        note(console, f"What rests grows by {gib(resting[-1] - resting[-2])} GiB a step: is something kept?")


def _show_peak(peak: Peak, console: Console, *, ended: bool) -> None:
    console.print()
    if ended:
        heading(console, "Held there", f"{gib(peak.held_bytes)} GiB")
    else:
        where = f"step {peak.step}, {peak.phase}" + (f" of {peak.module}" if peak.module else "")
        heading(console, "Peak", where)
        note(console, f"  {_place(peak)}, for {gib(peak.asked_bytes)} GiB more")
    rows: list[list[Cell]] = [[Text(cell, QUIET) for cell in ("GiB", "tensors", "made in", "by")]]
    shown = peak.largest[:_SHOWN]
    rows += [[gib(one.bytes), str(one.count), one.phase, _made_by(one)] for one in shown]
    rest = peak.held_bytes - sum(one.bytes for one in shown)
    if rest > 0:
        rows.append([gib(rest), "", "", "everything else"])
    table(console, rows, ">><<", gives_way=3)


def _sizes(counters: Counters) -> list[Cell]:
    return [gib(counters.allocated_bytes), gib(counters.reserved_bytes), gib(counters.resting_bytes)]


def _show_ran_out(at: RanOut, console: Console) -> None:
    console.print()
    where = "while loading" if not at.step else f"in step {at.step}, {at.phase}"
    heading(console, "Out of memory", where + (f" of {at.module}" if at.module else ""))
    note(console, f"  {_place(at)}")
    note(
        console,
        f"  {gib(at.asked_bytes)} GiB asked for with {gib(at.reserved_bytes)} reserved, "
        f"{gib(at.allocated_bytes)} of them allocated, and {gib(at.free_bytes)} free on the card",
    )


def _place(line: Line) -> str:
    if not line.file:
        return "in autograd or PyTorch, where no Python runs"
    near = f"{line.file}:{line.line} ({line.function})"
    if line.own and not line.own.endswith(f"{line.file}:{line.line}"):
        return f"at {line.own}, by {near}"
    return f"at {near}"


def _made_by(one: Held) -> str:
    if not one.file:
        return "autograd" if one.phase == "backward" else "PyTorch"
    return f"{one.file}:{one.line}"
