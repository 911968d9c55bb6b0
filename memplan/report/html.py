"""A plan as one page that needs nothing else: no network, no other file. What users and configs name is
escaped, and the page forbids itself to load anything."""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.report.headline import Line, remedies, verdicts
from memplan.report.plan import (
    CATEGORIES,
    FOOTNOTE,
    RESTS,
    SUMMARY,
    TIGHT,
    known,
    lacking,
    moment,
    needed,
    rests,
)
from memplan.report.wording import asked_and_default, micro_steps, short_card
from memplan.streams import visible
from memplan.tape import ALLOCATION_GRANULARITY, Category, Tape
from memplan.tape.curves import Held, live_bytes, moments, phases, resident, shown, step_start
from memplan.units import count, gib, ratio, share

if TYPE_CHECKING:
    from memplan.planning.plan import Plan
    from memplan.planning.records import Advice

# Of the chart, each with the lowest and the highest of its events: two for every pixel of the widest chart
# would lose some between two pixels, one does not.
COLUMNS = 480
LARGEST = 8  # tensors told at each moment

# What is there all the time lies at the bottom.
STACK = (
    "weights",
    "quantization_state",
    "adapters",
    "optimizer_state",
    "gradients",
    "activations",
    "logits_and_loss",
    "temporaries",
    "communication",
)

_ASSETS = Path(__file__).parent / "assets"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def escape(words: str) -> str:
    """The words as they are, on one line: nothing in them is HTML, or turns around what stands beside."""
    return html.escape(visible(words))


def page(plan: Plan, tape: Tape, given: Collection[str] = ()) -> str:
    """The page. ``tape`` is the plan's, unfolded; ``given`` are the recipe's fields that were asked for."""
    sections = (
        _peak(plan),
        timeline(tape, micro_steps(plan.recipe, tape.provenance)),
        _fits(plan),
        *map(_advice, plan.advice),
        _resident(tape),
    )
    lines = [*verdicts(plan.fits, plan.recipe.gpus), *remedies(plan)]
    title = f"{plan.model.name}: {lines[0].text if lines else gib(plan.peak.allocated_bytes) + ' GiB'}"
    head = _verdict(lines) + _head(plan, given)
    return document(title, head, sections, tape, plan.memplan_version)


def document(title: str, head: str, sections: Iterable[str], tape: Tape, version: str) -> str:
    """A page around ``sections``, one of which is the timeline of the unfolded ``tape``."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{_asset("uplot/uPlot.min.css")}
{_asset("page.css")}</style>
</head>
<body>
{head}
{"".join(sections)}
<footer class="quiet small">memplan {escape(version)}. Chart: uPlot.</footer>
<script type="application/json" id="data">{_json(_chart(tape))}</script>
<script>
/*
{_asset("uplot/LICENSE")}
*/
{_asset("uplot/uPlot.iife.min.js")}
{_asset("page.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or begins a comment."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


# -- the chart's data --------------------------------------------------------------------------------------


class _Numbers:
    """Numbers instead of repeated values, in the order in which they are first asked for."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}

    def __call__(self, value: Any) -> int:
        return self.known.setdefault(value, len(self.known))


def _chart(tape: Tape) -> dict[str, Any]:
    """What page.js draws. Sizes are in units of 512 bytes."""
    start, live = step_start(tape), live_bytes(tape)
    columns = shown(live, start, COLUMNS)
    chosen = [event for events in columns for event in events]
    found = list(moments(tape, chosen, LARGEST))
    texts, kinds = _Numbers(), _Numbers()
    used = [field for field in STACK if any(m.by_category[Category(field)] for m in found)]

    def kind(held: Held) -> int:
        category = used.index(held.category.value)
        return kinds((texts(_name(held)), held.size // ALLOCATION_GRANULARITY, category))

    return {
        "categories": [[field, CATEGORIES[field][0]] for field in used],
        "events": [event - start for event in chosen],
        "x": list(_places(columns, len(live) - start)),
        "live": [
            [moment.by_category[Category(field)] // ALLOCATION_GRANULARITY for moment in found]
            for field in used
        ],
        "where": [
            [texts(moment.phase.value), moment.layer, texts(moment.operation), texts(moment.module)]
            for moment in found
        ],
        "held": [[n for held in moment.held for n in (kind(held), held.count)] for moment in found],
        "ground": min(moment.resident_bytes for moment in found) // ALLOCATION_GRANULARITY,
        "peak": max(range(len(found)), key=lambda number: found[number].allocated_bytes),
        "phases": [
            [span.name, span.start - start, span.stop - start] for span in phases(tape) if span.start >= start
        ],
        "kinds": list(kinds.known),
        "texts": list(texts.known),
    }


def _places(columns: Sequence[Sequence[int]], events: int) -> Iterator[int]:
    """Where the moments are drawn: the first at the beginning of its column, the second in the middle, since
    at its own event it could be thinner than a pixel."""
    edges = [events * number // len(columns) for number in range(len(columns) + 1)]
    for column, (begin, end) in zip(columns, pairwise(edges), strict=True):
        yield from (begin, (begin + end) // 2)[: len(column)]


def _name(held: Held) -> str:
    return f"{held.operation} in {held.module}" if held.module else held.operation


# -- the page's parts --------------------------------------------------------------------------------------


def _verdict(lines: Iterable[Line]) -> str:
    """The answer, before all else."""
    told = "".join(
        f'<p class="{(line.verdict or "quiet").replace(" ", "-")}">{escape(line.text)}</p>\n'
        for line in lines
    )
    return f'<div class="verdict">\n{told}</div>\n' if told else ""


def _head(plan: Plan, given: Collection[str]) -> str:
    model = plan.model
    hub_id = f"{escape(model.hub_id)} · " if model.hub_id and model.hub_id != model.name else ""
    asked, default = asked_and_default(plan.recipe, given)
    total, trainable = plan.parameters.total, plan.parameters.trainable
    return f"""<header>
<h1>{escape(model.name)}</h1>
<p class="quiet">{hub_id}{escape(model.architecture)} · {count(total)} parameters, {count(trainable)} of them
trainable ({ratio(trainable, total)})</p>
{paragraph(model.note, "quiet small")}
<p>Asked: {escape(", ".join(asked))}</p>
<p class="quiet small">Defaults: {escape(", ".join(default))}</p>
</header>
"""


def paragraph(text: str | None, style: str) -> str:
    """A paragraph, if there is anything to say."""
    return f'<p class="{style}">{escape(text)}</p>' if text else ""


def _peak(plan: Plan) -> str:
    peak = plan.peak
    whole = peak.allocated_bytes
    libraries = ", ".join(f"{name} {version}" for name, version in plan.libraries.items())
    rows = [
        row(
            f'<span class="swatch" style="background:var(--{field})"></span>{label}',
            f"{gib(size)} GiB",
            share(size, whole),
        )
        for field, (label, _) in CATEGORIES.items()
        if (size := getattr(peak.by_category, field))
    ]
    if rest := rests(plan):
        rows.append(row(f'<span class="swatch"></span>{RESTS}', f"{gib(rest)} GiB", share(rest, whole)))
    four = [
        row(SUMMARY[field], f"{gib(size)} GiB", share(size, whole)) for field, size in known(plan).items()
    ]
    return f"""<section>
<h2>Peak</h2>
<div class="peak"><strong>{gib(whole)} GiB</strong>
<span>allocated ({escape(plan.provenance)}), in {escape(moment(peak))}</span></div>
{paragraph(libraries and f"{plan.provenance} with {libraries}", "quiet small")}
{_bar(plan)}
<div class="tables">
<table>{"".join(rows)}</table>
<div><h3>The same in the four categories that people know</h3>
<table>{"".join(four)}</table>
<p class="quiet small">{FOOTNOTE}</p></div>
</div>
</section>
"""


def _bar(plan: Plan) -> str:
    parts = [(field, getattr(plan.peak.by_category, field)) for field in STACK]
    spans = "".join(
        f'<span style="flex:{size} 0 0;background:var(--{field})" '
        f'title="{CATEGORIES[field][0]}: {gib(size)} GiB"></span>'
        for field, size in parts
        if size
    )
    return f'<div class="bar" role="img" aria-label="The peak by category">{spans}</div>'


def timeline(tape: Tape, remark: str = "") -> str:
    """The chart of a step, and what is alive at the moment that one points at."""
    events = len(tape.events) - step_start(tape)
    each = -(-events // COLUMNS)
    thinned = f", of which the chart shows the lowest and the highest of each {each:,}" if each > 1 else ""
    return f"""<section>
<div class="top"><h2>The step</h2>
<label class="small"><input type="checkbox" id="cut"> axis from <span id="ground"></span>,
which is always there</label></div>
<div id="chart" tabindex="0" role="img" aria-label="Live bytes over the step, by category"></div>
<noscript><p>The chart needs JavaScript, which is in this page and loads nothing.</p></noscript>
<div id="moment" aria-live="off">
<div id="when"></div>
<table><tbody id="live"></tbody></table>
<div id="held"><table><thead><tr><th>largest tensors made in the step</th><th class="number wide"></th>
<th class="number">bytes</th></tr></thead><tbody id="tensors"></tbody></table></div>
</div>
<p class="quiet small">Point at the chart, or use the arrow keys; drag to zoom, double-click to see all again.
{events:,} allocations and releases{thinned}. Tensors that differ only in their layer are counted together.
{remark}</p>
</section>
"""


def _fits(plan: Plan) -> str:
    fits = plan.fits
    if not fits:
        return ""
    rows = [
        f'<tr><td class="name">{escape(short_card(fit.gpu))}</td>'
        + "".join(
            f'<td class="number">{gib(size)}</td>'
            for size in (fit.total_bytes, fit.needed_bytes, fit.headroom_bytes)
        )
        + f'<td class="{fit.verdict.replace(" ", "-")}">{fit.verdict}</td></tr>'
        for fit in fits
    ]
    head = "".join(f'<th class="number">{title}</th>' for title in ("usable", "needed", "headroom"))
    tight = f" {TIGHT}" if any(fit.verdict == "tight" for fit in fits) else ""
    return f"""<section>
<h2>Cards</h2>
<table class="cards"><thead><tr><th>GiB</th>{head}<th></th></tr></thead><tbody>{"".join(rows)}</tbody></table>
<p class="quiet small">{needed(plan)}{tight}</p>
{paragraph("; ".join(lacking(plan, named=True)), "quiet small")}</section>
"""


def _advice(advice: Advice) -> str:
    card = escape(short_card(advice.gpu))
    if advice.room:
        items = "".join(f"<li>{escape(line)}</li>" for line in advice.room)
        return f'<section>\n<h2>Room on the {card}</h2>\n<ol class="advice">{items}</ol>\n</section>\n'
    if not advice.changes:
        return ""
    items = "".join(
        f'<li><span class="saves">−{gib(one.saves_bytes)} GiB'
        f' <span class="{one.verdict.replace(" ", "-")}">{one.verdict}</span></span>{escape(one.title)}<br>'
        f'<span class="quiet small">{escape(one.cost)}</span><br><code>{escape(one.command)}</code></li>'
        for one in advice.changes
    )
    together = ""
    if advice.combination is not None:
        command = escape(advice.combination.command)
        together = f"<p>Together {advice.combination.verdict}: <code>{command}</code></p>"
    return f"""<section>
<h2>To fit the {card}</h2>
<p class="quiet small">One change each, planned anew: what it saves at the peak, and whether it is enough.</p>
<ol class="advice">{items}</ol>
{together}</section>
"""


def _resident(tape: Tape) -> str:
    rows = [
        f'<tr><td class="name"><span class="swatch" style="background:var(--{held.category.value})"></span>'
        f'{escape(_name(held))}</td><td class="number wide">{held.count} × {_mib(held.size)}</td>'
        f'<td class="number">{gib(held.nbytes)} GiB</td></tr>'
        for held in resident(tape, LARGEST)
    ]
    if not rows:
        return ""
    return f"""<section>
<h2>The largest of what is there all the time</h2>
<table>{"".join(rows)}</table>
</section>
"""


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def row(name: str, *numbers: str) -> str:
    """A row of a table; ``name`` is HTML already."""
    return f"<tr><td>{name}</td>" + "".join(f'<td class="number">{n}</td>' for n in numbers) + "</tr>"
