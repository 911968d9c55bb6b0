"""Two tapes compared: on the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import QUIET, Cell, heading, table
from memplan.report.markdown import markdown_table
from memplan.report.plan import CATEGORIES

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.tape.diff import Diff, Held, Place, Side

MOST = 12  # rows of a list; --json has all

_Rows = list[list[str]]


def show_diff(diff: Diff, names: tuple[str, str], console: Console) -> None:
    """Print what is different, or that nothing is."""
    console.print(Text.assemble((verdict(diff), "bold green" if diff.equal else "bold red")))
    for title, alignment, (head, *rows) in _parts(diff, names):
        console.print()
        heading(console, title)
        styled: list[Sequence[Cell]] = [[Text(cell, QUIET) for cell in head]]
        table(console, [*styled, *rows], alignment)


def markdown(diff: Diff, names: tuple[str, str]) -> str:
    """The same as Markdown."""
    lines = [f"**{verdict(diff)}**"]
    for title, alignment, (head, *rows) in _parts(diff, names):
        lines += ["", f"### {title}", "", *markdown_table(head, alignment, rows)]
    return "\n".join(lines) + "\n"


def verdict(diff: Diff) -> str:
    """One sentence."""
    if diff.equal:
        return f"Equal: {diff.a.allocations:,} allocations of the same sizes, and the same peak."
    apart = diff.b.allocated_bytes - diff.a.allocated_bytes
    if not apart:
        return "Different, at an equal peak."
    return f"Different: B peaks {abs(apart):,} bytes {'above' if apart > 0 else 'below'} A."


def _parts(diff: Diff, names: tuple[str, str]) -> Iterator[tuple[str, str, _Rows]]:
    """Titles, alignments and rows, the first of which is the head."""
    yield "Peaks", "<<<", _peaks(diff, names)
    yield "Bytes at the peak", "<>>>", _categories(diff)
    for title, places in (
        ("First difference", diff.first_difference),
        ("First allocation at which live bytes differ", diff.first_live_difference),
    ):
        if places is not None:
            yield title, "<<<", [["", "A", "B"], *_places(places.a, places.b)]
    for title, held in (("Only A holds at its peak", diff.peak_only_a), ("Only B", diff.peak_only_b)):
        if held:
            yield title, ">>><<", _held(held)
    if diff.changes:
        rows = [
            [str(c.count), c.phase.value, c.operation, c.module, _size(c.size_a), _size(c.size_b)]
            for c in diff.changes[:MOST]
        ]
        rows += _more(len(diff.changes), 6)
        yield "Allocations that differ", "><<<>>", [["×", "phase", "operation", "module", "A", "B"], *rows]
    if diff.renamed:
        rows = [[str(r.count), r.phase.value, r.operation_a, r.operation_b] for r in diff.renamed[:MOST]]
        rows += _more(len(diff.renamed), 4)
        yield "Equal but for the operation's name", "><<<", [["×", "phase", "A", "B"], *rows]


def _peaks(diff: Diff, names: tuple[str, str]) -> _Rows:
    def row(label: str, a: object, b: object) -> list[str]:
        return [label, str(a), str(b)]

    def layer(side: Side) -> str:
        return "" if side.layer is None else str(side.layer)

    a, b = diff.a, diff.b
    return [
        row("", "A", "B"),
        row("tape", *names),
        row("provenance", a.provenance, b.provenance),
        row("tensors", f"{a.allocated_bytes:,}", f"{b.allocated_bytes:,}"),
        row("phase", a.phase.value, b.phase.value),
        row("layer", layer(a), layer(b)),
        row("operation", a.operation, b.operation),
        row("module", a.module, b.module),
        row("allocations", f"{a.allocations:,}", f"{b.allocations:,}"),
    ]


def _categories(diff: Diff) -> _Rows:
    rows = [["", "A", "B", "B - A"]]
    for category, a in diff.a.by_category.items():
        b = diff.b.by_category[category]
        if a or b:
            rows.append([CATEGORIES[category.value][0], f"{a:,}", f"{b:,}", f"{b - a:+,}" if b != a else "="])
    return rows


def _places(a: Place | None, b: Place | None) -> Iterator[list[str]]:
    def cells(label: str, attribute: str) -> list[str]:
        values = [None if place is None else getattr(place, attribute) for place in (a, b)]
        return [label, *("" if value is None else _cell(value) for value in values)]

    yield cells("number", "index")
    yield cells("phase", "phase")
    yield cells("layer", "layer")
    yield cells("module", "module")
    yield cells("operation", "operation")
    yield ["size", *("none" if place is None else f"{place.size:,}" for place in (a, b))]
    yield cells("live", "live_bytes")


def _cell(value: object) -> str:
    return f"{value:,}" if type(value) is int else str(getattr(value, "value", value))


def _size(size: int | None) -> str:
    return "none" if size is None else f"{size:,}"


def _held(held: Sequence[Held]) -> _Rows:
    rows = [[f"{h.nbytes:,}", str(h.count), f"{h.size:,}", h.operation, h.module] for h in held[:MOST]]
    return [["bytes", "×", "each", "operation", "module"], *rows, *_more(len(held), 5)]


def _more(number: int, columns: int) -> _Rows:
    if number <= MOST:
        return []
    cells = [""] * columns
    cells[-1 if columns != 6 else 3] = f"and {number - MOST} more"
    return [cells]
