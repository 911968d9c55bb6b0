"""A dry run on the terminal: the verdict, what each step took, the peak's lines, where it ran out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import QUIET, Cell, heading, note, table
from memplan.report.plan import VERDICT_STYLES
from memplan.report.wording import short_card
from memplan.tape.modules import plain_name
from memplan.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.emulate.answer import DryRun, Held, Line, Peak, RanOut

_SHOWN = 5  # lines that hold the most: the answer is to stay on a screen
_VERSIONS = 4  # libraries, the rest is in --json
_BETWEEN = ("evaluation", "saving", "between steps")
_WORTH = 64 << 20  # bytes on the host: what is less is nobody's offloading


def show_dry_run(answer: DryRun, console: Console) -> None:
    """Print the answer."""
    console.print(Text.assemble((answer.verdict, VERDICT_STYLES[answer.verdict]), f" {_on_what(answer)}"))
    note(console, " ".join(answer.command))
    versions = [f"{name} {version}" for name, version in answer.libraries.items()]
    note(console, f"with {', '.join(versions[:_VERSIONS])}")
    console.print()
    head: list[Cell] = [Text(cell, QUIET) for cell in ("GiB", "allocated", "reserved", "resting")]
    table(console, [head, *map(list, rows(answer))], "<>>>")
    if answer.ran_out is not None:
        _show_ran_out(answer.ran_out, console)
    if answer.peak is not None:
        _show_peak(answer.peak, console, ended=answer.ran_out is not None)
    for sentence in sentences(answer):
        note(console, sentence)


def headline(answer: DryRun) -> str:
    """The verdict, on what, and what is needed of it."""
    return f"{answer.verdict} {_on_what(answer)}"


def _on_what(answer: DryRun) -> str:
    card = short_card(answer.gpu) if answer.count == 1 else f"{answer.count} × {short_card(answer.gpu)}"
    words = f"on the {card} (emulated)"
    if answer.needed_bytes is None:
        return words
    each = " on each" if answer.count > 1 else ""
    return f"{words}: {gib(answer.needed_bytes)} of {gib(answer.total_bytes)} GiB needed{each}"


def rows(answer: DryRun) -> Iterator[tuple[str, str, str, str]]:
    """Each stretch of the run: allocated and reserved at most, and what rests after it, in GiB."""
    steps = {f"step {number}": step for number, step in enumerate(answer.steps, 1)}
    others = {"evaluation": answer.evaluation, "saving": answer.saving, "afterwards": answer.afterwards}
    for name, found in {"loading": answer.loaded, **steps, **others}.items():
        if found is not None:
            yield name, gib(found.allocated_bytes), gib(found.reserved_bytes), gib(found.resting_bytes)


def where(peak: Peak) -> str:
    """The step, phase and module of the peak."""
    of = f" of {plain_name(peak.module)}" if plain_name(peak.module) else ""
    if peak.phase in _BETWEEN:
        return f"{peak.phase} after step {peak.step}{of}"
    return f"step {peak.step}, {peak.phase}{of}"


def made_by(one: Held) -> str:
    """The line that made tensors, or who did where no Python ran."""
    if not one.file:
        return "autograd" if one.phase in ("backward", "recomputation") else "PyTorch"
    return f"{one.file}:{one.line}"


def _of_ranks(answer: DryRun) -> Iterator[str]:
    if len({one.rank for one in answer.ranks}) > 1:
        each = (
            f"{one.rank}: {gib(one.allocated_bytes)} and {gib(one.reserved_bytes)}" for one in answer.ranks
        )
        yield f"Allocated and reserved at most, by rank, in GiB: {'; '.join(each)}."


def sentences(answer: DryRun) -> Iterator[str]:
    """What has to be said beside the numbers."""
    yield from _of_ranks(answer)
    resting = [step.resting_bytes for step in answer.steps]
    if len(resting) > 2 and resting[-1] > resting[-2] > resting[-3]:
        yield f"What rests grows by {gib(resting[-1] - resting[-2])} GiB a step: is something kept?"
    if answer.host.tensor_bytes > _WORTH:
        yield (
            f"The host holds {gib(answer.host.tensor_bytes)} GiB of tensors for each process after a step; "
            f"PyTorch's pinned memory, which rounds up, takes {gib(answer.host.pinned_bytes)} GiB."
        )
    if answer.needed_bytes is not None:
        yield (
            f"Needed: what is reserved, and {gib(answer.context_bytes)} GiB for the process beside it "
            "(assumed)."
        )
    for sentence in answer.notes:
        yield f"Note: {sentence}."


def _show_peak(peak: Peak, console: Console, *, ended: bool) -> None:
    console.print()
    if ended:
        heading(console, "Held there", f"{gib(peak.held_bytes)} GiB")
    else:
        heading(console, "Peak")
        note(console, f"  {where(peak)}")
        note(console, f"  {_place(peak)}, asking for {gib(peak.asked_bytes)} GiB")
    lines: list[list[Cell]] = [[Text(cell, QUIET) for cell in ("GiB", "tensors", "made in", "by")]]
    shown = peak.largest[:_SHOWN]
    lines += [[gib(one.bytes), str(one.count), one.phase, made_by(one)] for one in shown]
    rest = peak.held_bytes - sum(one.bytes for one in shown)
    if rest > 0:
        lines.append([gib(rest), "", "", "everything else"])
    table(console, lines, ">><<", gives_way=3)


def _show_ran_out(at: RanOut, console: Console) -> None:
    console.print()
    phase = "while loading" if not at.step else f"in step {at.step}, {at.phase}"
    heading(console, "Out of memory")
    note(console, f"  {phase}" + (f" of {plain_name(at.module)}" if plain_name(at.module) else ""))
    note(console, f"  {_place(at)}")
    note(
        console,
        f"  {gib(at.asked_bytes)} GiB asked for with {gib(at.reserved_bytes)} reserved, "
        f"{gib(at.allocated_bytes)} of them allocated, and {gib(at.free_bytes)} free on the card",
    )


def _place(line: Line) -> str:
    if not line.file:
        where = "in autograd or PyTorch, where no Python runs"
        return f"{where}, below {line.own}" if line.own else where
    near = f"{line.file}:{line.line} ({line.function})"
    if line.own and not line.own.endswith(f"{line.file}:{line.line}"):
        return f"at {line.own}, by {near}"
    return f"at {near}"
