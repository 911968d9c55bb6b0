"""The frontier on the terminal: a line a recipe, a column a batch size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.planning.frontier import LONGEST
from memplan.report.console import GAP, HEADING, QUIET, Cell, heading, note, table
from memplan.report.wording import short_card
from memplan.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.planning.frontier import Frontier, Row

AT_MOST = (
    "At most: what the tensors at the peak leave room for. What the allocator loses comes out of it; "
    "without --no-exact that is simulated."
)
EXACT = "The allocator is simulated: this fits with 2 % to spare, and one token more does not."
CHECKPOINTED = "ckpt: gradient checkpointing"
CAPPED = "* the model's own limit"
CAPPED_BY_US = f"* the model's own limit, or {LONGEST:,} tokens: no longer ones are looked for"


def show_frontier(frontier: Frontier, console: Console) -> None:
    """Print the table."""
    several = max((row.recipe.gpus for row in frontier.rows), default=1)
    each = f"each of {several} " if several > 1 else ""
    usable = f"{gib(frontier.usable_bytes)} GiB usable"
    heading(console, frontier.model, f"on {each}{short_card(frontier.gpu)}, {usable}")
    how = "longest sequence" if frontier.simulated else "longest sequence, at most"
    console.print(f"{how}, by batch size; most tokens a step")
    batches = [cell.batch_size for cell in frontier.rows[0].cells] if frontier.rows else []
    lines: list[list[Cell]] = [
        [Text(cell, QUIET) for cell in ("recipe", *(str(batch) for batch in batches), "tokens")]
    ]
    for row in frontier.rows:
        best = max((cell.tokens for cell in row.cells), default=0)
        cells: list[Cell] = []
        for cell in row.cells:
            text = "-" if cell.seq_len is None else f"{cell.seq_len:,}{'*' if cell.capped else ''}"
            cells.append(Text(text, HEADING if cell.tokens == best > 0 else ""))
        lines.append([_label(row), *cells, f"{best:,}" if best else "-"])
    for columns in _pages(lines, console.width):
        rows = [[line[0], *(line[column] for column in columns)] for line in lines]
        table(console, rows, "<" + ">" * len(columns))
    note(console, CHECKPOINTED)
    if any(cell.capped for row in frontier.rows for cell in row.cells):
        longest = max(cell.seq_len or 0 for row in frontier.rows for cell in row.cells)
        note(console, CAPPED_BY_US if longest == LONGEST else CAPPED)
    note(console, EXACT if frontier.simulated else AT_MOST)
    if frontier.note is not None:
        note(console, f"{short_card(frontier.gpu)}: {frontier.note}")


def _pages(lines: list[list[Cell]], width: int) -> Iterator[range]:
    """The columns after the first, as many at a time as there is room for beside it."""
    widths = [max(len(cell) for cell in column) + len(GAP) for column in zip(*lines, strict=True)]
    first = 1
    while first < len(widths):
        last = first + 1
        while last < len(widths) and len(GAP) + widths[0] + sum(widths[first : last + 1]) - len(GAP) <= width:
            last += 1
        yield range(first, last)
        first = last


def _label(row: Row) -> str:
    checkpointing = "ckpt" if row.recipe.gradient_checkpointing else ""
    return f"{row.recipe.mode.value:5} {checkpointing:4} {row.recipe.optimizer}"
