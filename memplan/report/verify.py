"""A measurement against the plan: on the terminal, as Markdown, and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import QUIET, Cell, heading, note, paragraph, table
from memplan.report.html import escape
from memplan.report.markdown import markdown_table, markdown_text
from memplan.report.plan import CATEGORIES
from memplan.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.tape.diff import Held
    from memplan.verify.compare import Comparison, Figure, Where
    from memplan.verify.measurement import Measurement

MOST = 6  # kinds of tensors that are listed; memplan diff has all

_Rows = list[list[str]]


def show_verdict(measured: Measurement, comparison: Comparison, console: Console) -> None:
    """Print how a run ended, and predicted against measured."""
    good = comparison.outcome == "trained" and comparison.why is None
    console.print(Text.assemble((comparison.title, "bold")))
    paragraph(console, about(measured), "", QUIET)
    console.print(Text(verdict(comparison), "bold green" if good else "bold red"))
    for title, alignment, (head, *rows) in _parts(measured, comparison):
        console.print()
        heading(console, title)
        styled: list[Sequence[Cell]] = [[Text(cell, QUIET) for cell in head]] if any(head) else []
        table(
            console, [*styled, *rows], alignment, gives_way=len(alignment) - 1 if alignment[0] == ">" else 0
        )
    for remark in comparison.remarks:
        note(console, remark[:1].upper() + remark[1:] + ".")


def markdown(measured: Measurement, comparison: Comparison) -> str:
    """The same as Markdown."""
    title, run, ended = map(
        markdown_text, (comparison.title, ", ".join(about(measured)), verdict(comparison))
    )
    lines = [f"## {title}", "", run, "", f"**{ended}**"]
    for title, alignment, (head, *rows) in _parts(measured, comparison):
        lines += ["", f"### {title}", "", *markdown_table(head, alignment, rows)]
    lines += [line for remark in comparison.remarks for line in ("", f"*{markdown_text(remark)}*")]
    return "\n".join(lines) + "\n"


def html(measured: Measurement, comparison: Comparison) -> str:
    """The same as a page that loads nothing."""
    body = [f"<h1>{escape(comparison.title)}</h1>", f"<p>{escape(', '.join(about(measured)))}</p>"]
    body.append(f"<p><strong>{escape(verdict(comparison))}</strong></p>")
    for title, alignment, (head, *rows) in _parts(measured, comparison):
        body += [f"<h2>{escape(title)}</h2>", "<table>", _html_row(head, alignment, "th")]
        body += [_html_row(row, alignment, "td") for row in rows]
        body.append("</table>")
    body += [f"<p><em>{escape(remark)}</em></p>" for remark in comparison.remarks]
    return _PAGE.format(title=escape(comparison.title), body="\n".join(body))


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>memplan verify: {title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .8rem; border-bottom: 1px solid #8884; text-align: left }}
.right {{ text-align: right }}
</style>
<body>
{body}
</body>
</html>
"""


def about(measured: Measurement) -> list[str]:
    """What ran where, in phrases."""
    device = measured.device
    phrases = [measured.label, device.name if device.kind == "cuda" else f"host {device.name}"]
    phrases += [f"{name} {number}" for name, number in measured.libraries.items()]
    if measured.run.cap_bytes is not None:
        phrases.append(f"capped to {gib(measured.run.cap_bytes)} GiB ({measured.run.cap_name})")
    phrases.append(measured.date.partition("T")[0])
    return phrases


def verdict(comparison: Comparison) -> str:
    """One sentence."""
    if comparison.outcome == "failed":
        return f"The run failed: {comparison.why}."
    if comparison.outcome == "out of memory":
        expected = ", as the plan said" if comparison.fits_predicted is False else ""
        if comparison.fits_predicted:
            expected = ", though the plan said that it fits"
        event = comparison.event
        where = f" in step {event.step} ({event.phase})" if event else ""
        if event is not None and not event.step:
            where = " while the model was made"
        return f"Out of memory{where}{expected}."
    doubts = f", but {comparison.why}" if comparison.why else ""
    if comparison.fits_predicted is False:
        doubts += ", though the plan said that it would not fit"
    # of several ranks, the one that is the furthest off
    figures = [one.allocated for one in comparison.ranks] or [comparison.allocated]
    worst = max(figures, key=lambda figure: abs(figure.error or 0))
    error, percent = worst.error, worst.percent
    if error is None or percent is None:
        return f"Trained{doubts}; there is no steady step to compare."
    several = f" of all {len(figures)} ranks" if len(figures) > 1 else ""
    if not error:
        return f"Trained{doubts}; predicted and measured peaks{several} are equal to the byte."
    more = "above" if error > 0 else "below"
    whose = f" of rank {comparison.ranks[figures.index(worst)].rank}" if several else ""
    return (
        f"Trained{doubts}; the plan is {abs(error):,} bytes ({abs(percent):.3f} %) {more} the measured peak"
        f"{whose}."
    )


def _parts(measured: Measurement, comparison: Comparison) -> Iterator[tuple[str, str, _Rows]]:
    """Titles, alignments and rows, the first of which is the head."""
    if comparison.outcome == "trained":
        yield "Peak, bytes", "<>>>>", _figures(comparison)
        if comparison.ranks:
            yield "Every rank's peak, bytes", "<>>>>", _ranks(comparison)
        rows = [
            [CATEGORIES[category.value][0], *_cells(figure)]
            for category, figure in comparison.categories.items()
            if figure.predicted or figure.measured
        ]
        yield "At the peak, by category", "<>>>>", [["", "predicted", "measured", "error", ""], *rows]
        yield "Where the peak is", "<<<", _places(comparison)
        held = [] if comparison.diff is None else [*comparison.diff.peak_only_a[:MOST]]
        if held:
            yield "Only the plan holds at its peak", ">>><<", _held(held)
        held = [] if comparison.diff is None else [*comparison.diff.peak_only_b[:MOST]]
        if held:
            yield "Only measured", ">>><<", _held(held)
    if comparison.event is not None:
        yield "What did not fit", "<>", _event(comparison)
    if measured.steps:
        yield "Steps", ">>>>>", _steps(measured)
    if measured.evidence is not None:
        evidence = measured.evidence
        rows = [
            ["", ""],
            ["loss on the same batch", " → ".join(map(_loss, (evidence.first_loss, evidence.last_loss)))],
            ["trained tensors that changed", f"{evidence.changed_tensors} of {evidence.trained_tensors}"],
            ["frozen tensors that changed", f"{evidence.frozen_changed} of {evidence.frozen_tensors}"],
            ["gradients", "finite" if evidence.gradients_finite else "not finite"],
        ]
        yield "Did it train?", "<>", rows


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _figures(comparison: Comparison) -> _Rows:
    rows = [["", "predicted", "measured", "error", ""], ["allocated", *_cells(comparison.allocated)]]
    if comparison.tensors.measured not in (None, comparison.allocated.measured):
        rows.append(["its tensors", *_cells(comparison.tensors)])
    for name, figure in (("reserved", comparison.reserved), ("on the card", comparison.on_card)):
        if figure.measured is not None:
            rows.append([name, *_cells(figure)])
    return rows


def _ranks(comparison: Comparison) -> _Rows:
    rows = [["rank", "predicted", "measured", "error", ""]]
    for one in comparison.ranks:
        rows.append([f"{one.rank}", *_cells(one.allocated)])
        if one.reserved.measured is not None:
            rows.append(["  reserved", *_cells(one.reserved)])
    return rows


def _cells(figure: Figure) -> list[str]:
    cells = ["–" if number is None else f"{number:,}" for number in (figure.predicted, figure.measured)]
    if figure.error is None:
        return [*cells, "", ""]
    percent = "" if figure.percent is None else f"{figure.percent:+.3f} %"
    return [*cells, f"{figure.error:+,}" if figure.error else "0", percent if figure.error else ""]


def _places(comparison: Comparison) -> _Rows:
    def column(where: Where | None) -> list[str]:
        if where is None:
            return [""] * 4
        return [where.phase, "" if where.layer is None else str(where.layer), where.operation, where.module]

    columns = (["phase", "layer", "operation", "module"], column(comparison.predicted_peak))
    rows = zip(*columns, column(comparison.measured_peak), strict=True)
    return [["", "predicted", "measured"], *map(list, rows)]


def _held(held: Sequence[Held]) -> _Rows:
    rows = [[f"{h.nbytes:,}", str(h.count), f"{h.size:,}", h.operation, h.module] for h in held]
    return [["bytes", "×", "each", "operation", "module"], *rows]


def _event(comparison: Comparison) -> _Rows:
    event = comparison.event
    assert event is not None
    asked = "" if event.requested_bytes is None else f"{event.requested_bytes:,}"
    return [
        ["", ""],
        ["step", str(event.step)],
        ["phase", event.phase],
        ["module", event.module],
        ["asked for", asked],
        ["allocated then", f"{event.allocated_bytes:,}"],
        ["reserved then", f"{event.reserved_bytes:,}"],
        ["room", f"{comparison.room:,}"],
        ["predicted peak, allocated", f"{comparison.allocated.predicted:,}"],
    ]


def _steps(measured: Measurement) -> _Rows:
    rows = [["step", "loss", "allocated", "reserved", "seconds"]]
    for step in measured.steps:
        reserved = "–" if step.reserved_bytes is None else f"{step.reserved_bytes:,}"
        loss = "" if step.loss is None else f"{step.loss:.4f}"
        seconds = "" if step.seconds is None else f"{step.seconds:.1f}"
        rows.append([str(step.number), loss, f"{step.allocated_bytes:,}", reserved, seconds])
    return rows


def _html_row(cells: Sequence[str], alignment: str, tag: str) -> str:
    parts = (
        f"<{tag}{' class=' + chr(34) + 'right' + chr(34) if side == '>' else ''}>{escape(cell)}</{tag}>"
        for cell, side in zip(cells, alignment, strict=True)
    )
    return "<tr>" + "".join(parts) + "</tr>"
