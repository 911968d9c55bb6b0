"""A dry run as a page that needs nothing else (:mod:`memplan.report.html`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.report.dry_run import headline, made_by, rows, sentences, where
from memplan.report.html import document, escape, paragraph, row, timeline
from memplan.units import gib

if TYPE_CHECKING:
    from memplan.emulate.answer import DryRun, Peak
    from memplan.tape import Tape


_WHICH = "It is the last step, from its first forward pass on; what is beside the steps is not in it."
_UP_TO_THERE = "It is the step in which it ran out of memory, up to there."


def page(answer: DryRun, tape: Tape) -> str:
    """The page; ``tape`` is the last step's."""
    libraries = ", ".join(f"{name} {version}" for name, version in answer.libraries.items())
    head = f"""<header>
<h1>{escape(headline(answer))}</h1>
<p><code>{escape(" ".join(answer.command))}</code></p>
{paragraph(f"emulated with {libraries}", "quiet small")}
</header>
"""
    sections = (
        _stretches(answer),
        _peak(answer.peak) if answer.peak is not None else "",
        timeline(tape, _WHICH if answer.ran_out is None else _UP_TO_THERE),
        "<section>" + "".join(paragraph(one, "quiet small") for one in sentences(answer)) + "</section>",
    )
    return document(headline(answer), head, sections, tape, answer.memplan_version)


def _stretches(answer: DryRun) -> str:
    head = "".join(f'<th class="number">{name}</th>' for name in ("allocated", "reserved", "resting"))
    body = "".join(row(escape(name), *sizes) for name, *sizes in rows(answer))
    return f"""<section>
<h2>The run</h2>
<table><thead><tr><th>GiB</th>{head}</tr></thead><tbody>{body}</tbody></table>
</section>
"""


def _peak(peak: Peak) -> str:
    body = "".join(
        row(f"{escape(made_by(one))}, {escape(one.phase)}", str(one.count), gib(one.bytes))
        for one in peak.largest
    )
    return f"""<section>
<h2>The peak: {escape(where(peak))}</h2>
<table><thead><tr><th>made by</th><th class="number">tensors</th><th class="number">GiB</th></tr></thead>
<tbody>{body}</tbody></table>
</section>
"""
