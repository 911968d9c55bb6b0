"""Live bytes over the step, drawn in characters: one column for some events, one glyph for each category."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import heading, note, speaks_unicode
from memplan.report.plan import CATEGORIES
from memplan.report.wording import micro_steps
from memplan.tape import Category
from memplan.tape.curves import Moment, Span, live_bytes, moments, phases, shown, step_start
from memplan.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.asked.recipe import Recipe
    from memplan.tape import Tape

# What is there all the time lies at the bottom; the second glyph is for terminals without block characters.
GLYPHS = {
    "weights": "█#",
    "quantization_state": "QQ",
    "adapters": "AA",
    "optimizer_state": "▓%",
    "gradients": "GG",
    "activations": "▒=",
    "logits_and_loss": "LL",
    "temporaries": "░.",
    "communication": "CC",
}

_CATEGORY = {category.value: category for category in Category}
_ROWS = 14
_LABELS = len("1,000.00")


def show_timeline(tape: Tape, console: Console, recipe: Recipe) -> None:
    """Print the timeline of an unfolded tape with the first highest moment marked."""
    start = step_start(tape)
    live = live_bytes(tape)
    width = max(console.width - 2 - _LABELS - 3, 16)
    columns = [max(events, key=live.__getitem__) for events in shown(live, start, width)]
    chart = _Chart(list(moments(tape, columns)), speaks_unicode(console))
    heading(console, "Timeline")
    console.print(chart.pointer(width), soft_wrap=True)
    for row in reversed(range(_ROWS)):
        console.print(chart.row(row), soft_wrap=True)
    for line in chart.axis(phases(tape), start, len(live)):
        console.print(line, soft_wrap=True)
    _legend(chart, console)
    _notes(chart, -(-(len(live) - start) // len(columns)), micro_steps(recipe, tape.provenance), console)


class _Chart:
    """Columns of stacked categories between ``floor`` and ``top`` bytes."""

    def __init__(self, columns: Sequence[Moment], unicode: bool) -> None:
        self.columns = columns
        self.unicode = unicode
        self.top = max(moment.allocated_bytes for moment in columns)
        self.peak = next(n for n, moment in enumerate(columns) if moment.allocated_bytes == self.top)
        # Where what never changes would fill half the picture or more, the axis begins below its end.
        ground = min(moment.resident_bytes for moment in columns)
        cut = 2 * ground > self.top > ground
        self.unit = (self.top - ground) / (_ROWS - 1) if cut else max(self.top, 1) / _ROWS
        self.floor = self.top - _ROWS * self.unit if cut else 0.0
        self.drawn: set[str] = set()

    def pointer(self, width: int) -> Text:
        """The line above, which points to the peak."""
        said = f"peak {gib(self.top)} GiB"
        arrow = "▼" if self.unicode else "v"
        left = " " * self.peak
        line = f"{left}{arrow} {said}"
        if len(line) > width and self.peak > len(said):
            line = f"{said} {arrow}".rjust(self.peak + 1)
        return Text("  " + "GiB".rjust(_LABELS) + "  " + line)

    def row(self, number: int) -> Text:
        """One line of the picture; 0 is the lowest."""
        label = ""
        if number in (_ROWS - 1, _ROWS // 2 - 1):
            label = gib(round(self.floor + (number + 1) * self.unit))
        line = Text(f"  {label:>{_LABELS}} {'│' if self.unicode else '|'}")
        middle = self.floor + (number + 0.5) * self.unit
        for moment in self.columns:
            line.append_text(self._cell(moment, middle))
        line.rstrip()
        return line

    def _cell(self, moment: Moment, height: float) -> Text:
        reached = 0
        for field in GLYPHS:
            reached += moment.by_category[_CATEGORY[field]]
            if height < reached:
                self.drawn.add(field)
                return Text(self.glyph(field), CATEGORIES[field][1])
        return Text(" ")

    def glyph(self, field: str) -> str:
        """How a category is drawn."""
        return GLYPHS[field][0 if self.unicode else 1]

    def axis(self, spans: Sequence[Span], start: int, stop: int) -> list[Text]:
        """The line below, on which the phases begin, and their names."""
        count = len(self.columns)
        corner, line, tick = "└─┬" if self.unicode else "+-+"
        ticks = [line] * count
        names = [" "] * count
        told = [span for span in spans if span.start >= start]
        begins = [(span.start - start) * count // (stop - start) for span in told]
        for span, begin, end in zip(told, begins, [*begins[1:], count], strict=True):
            ticks[begin] = tick
            name = span.name
            if end == count and len(name) > end - begin:  # the last may begin earlier than its phase
                begin = max(count - len(name), 0)
                name = name if not "".join(names[max(begin - 1, 0) :]).strip() else ""
            elif len(name) >= end - begin and end < count:
                name = name[: max(end - begin - 1, 0)]
            names[begin : begin + len(name)] = name
        label = gib(round(self.floor)) if round(self.floor) else "0"
        return [
            Text(f"  {label:>{_LABELS}} {corner}{''.join(ticks)}"),
            Text(f"  {'':{_LABELS}}  {''.join(names)}".rstrip()),
        ]


def _legend(chart: _Chart, console: Console) -> None:
    entries = [(chart.glyph(f), CATEGORIES[f]) for f in GLYPHS if f in chart.drawn]
    line = Text("  ")
    for glyph, (label, colour) in entries:
        entry = Text.assemble((glyph, colour), f" {label}")
        if line.cell_len + entry.cell_len > console.width:
            line.rstrip()
            console.print(line, soft_wrap=True)
            line = Text("  ")
        line.append_text(entry).append("  ")
    line.rstrip()
    console.print(line, soft_wrap=True)


def _notes(chart: _Chart, events: int, micro: str, console: Console) -> None:
    hidden = [
        label
        for field, (label, _) in CATEGORIES.items()
        if field not in chart.drawn and any(m.by_category[_CATEGORY[field]] for m in chart.columns)
    ]
    sentences = [f"A column shows the highest of {events:,} events."] if events > 1 else []
    if chart.floor:
        sentences.append(f"The axis begins at {gib(round(chart.floor))} GiB.")
    if hidden:
        sentences.append(f"Below the axis or too thin to be drawn: {', '.join(hidden)}.")
    if micro:
        sentences.append(micro)
    if sentences:
        note(console, " ".join(sentences))
