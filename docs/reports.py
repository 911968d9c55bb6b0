"""The section "Against people's reports" of docs/accuracy.md, from data/reports_comparison.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMPARISON = Path(__file__).resolve().parent.parent / "data" / "reports_comparison.json"

HEAD = """\
## Against people's reports

Provenance: *published*. People said what their runs took, in issues, READMEs and tables: seldom to the byte,
never with all of their settings. `data/reports.json` has {reports} such reports, and what their author would
have said to `memplan fit`: their trainer's file, or the words of their issue with `--trainer`; nothing is
set to match. `python benchmarks/reports.py` asks memplan so ({date}, memplan {version}).
Of the {runs} runs in them {said} can be said, and {agree} of those are within 3 % or have the verdict that
was seen; {deviate} deviate. Those of other code than today's libraries', and numbers that no run was, are
[apart](#what-cant-be-compared). In italics: a run that says what such a reason asks for, which the author
would not have said.

| report | run | reported | memplan | |
| --- | --- | ---: | ---: | --- |
"""

TIGHT = """
*tight* is a run that fits only because PyTorch gives its cache back; it counts as one that fits. GiB after
a context's error are what the plan of the reported context leaves of the card (-: is short of).
"""

DEVIATE = """
What deviates, and why:

"""

INCOMPARABLE = """
### What can't be compared

Asked as it was reported, and answered for something else.

| report | run | reported | memplan, of today's code | what it was |
| --- | --- | ---: | ---: | --- |
"""

REFUSED = """
### What can't be said

Each of these is refused with one sentence and exit status 2.

| report | run | reported | what memplan does not plan | it says |
| --- | --- | --- | --- | --- |
"""


def section() -> str:
    """The section, in Markdown."""
    comparison: dict[str, Any] = json.loads(COMPARISON.read_text(encoding="utf-8"))
    runs = [(report, run) for report in comparison["reports"] for run in report["runs"]]
    asked = [(report, run) for report, run in runs if not run["explains"]]
    by_status: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
        status: [(report, run) for report, run in asked if run["status"] == status]
        for status in ("agrees", "deviates", "refused", "not comparable")
    }
    text = HEAD.format(
        reports=len(comparison["reports"]),
        date=comparison["date"],
        version=comparison["version"],
        runs=len(asked),
        said=len(by_status["agrees"]) + len(by_status["deviates"]),
        agree=len(by_status["agrees"]),
        deviate=len(by_status["deviates"]) or "none",
    )
    text += "".join(_said(report, run) for report, run in runs if run["status"] in ("agrees", "deviates"))
    text += TIGHT
    if by_status["deviates"]:
        text += DEVIATE
    reasons: dict[tuple[str, str], list[str]] = {}
    for report, run in by_status["deviates"]:
        reasons.setdefault((report["setup"], run["reason"]), []).append(run["about"])
    for (setup, reason), abouts in reasons.items():
        named = f" ({', '.join(filter(None, abouts))})" if any(abouts) else ""
        text += f"- {setup}{named}: {reason}.\n"
    text += INCOMPARABLE + "".join(_said(report, run) for report, run in by_status["not comparable"])
    return text + REFUSED + "".join(_not_said(report, run) for report, run in by_status["refused"])


def _run(report: dict[str, Any], run: dict[str, Any]) -> str:
    about = f"*{run['about']}*" if run["explains"] else run["about"]
    return f"{report['setup']} – {about}" if about else str(report["setup"])


def _said(report: dict[str, Any], run: dict[str, Any]) -> str:
    reported, answer = run["reported"], run["answer"]
    if "bytes" in reported:
        counted = reported["counted"]
        cells = [f"{each['bytes'] / 2**30:.2f} GiB {counted}" for each in (reported, answer)]
    elif "tokens" in reported:
        cells = [_tokens(each["tokens"]) for each in (reported, answer)]
    else:
        cells = [reported["verdict"], f"{answer['verdict']}, {answer['needed_bytes'] / 2**30:.2f} GiB needed"]
    if answer.get("verdict") == "depends on the card":
        cells[1] += f", and on {_named(answer['gets_through_on'])} it gets through"
    end = f"{answer['error_percent']:+.1f} %" if "error_percent" in answer else "the same verdict"
    if "left_bytes" in answer:
        end += f" ({answer['left_bytes'] / 2**30:+.2f} GiB)"
    if run["status"] == "not comparable":
        end = run["reason"]
    elif run["status"] == "deviates":
        end = f"**{end if 'error_percent' in answer else 'another verdict'}**"
    elif "error_percent" in answer and "verdict" in reported:
        end += ", and it fits" if reported["verdict"] == "fits" else ", and it runs out"
    return f"| {report['source']} | {_run(report, run)} | {cells[0]} | {cells[1]} | {end} |\n"


def _named(cards: list[str]) -> str:
    return " or ".join(f"an {card.removeprefix('NVIDIA ')}" for card in cards)


def _tokens(number: int) -> str:
    return f"{number:,} tokens" if number else "none fits"


def _not_said(report: dict[str, Any], run: dict[str, Any]) -> str:
    says = run["answer"].partition("; predicted are")[0].removeprefix("run.yaml: ").replace("|", "\\|")
    cells = [report["source"], _run(report, run), run["reported"]["words"], run["reason"], says]
    return f"| {' | '.join(cells)} |\n"
