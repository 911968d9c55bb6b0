"""Ask memplan what the authors of public reports would have asked: data/reports.json.

    python benchmarks/reports.py

Runs ``memplan fit`` for each, prints its answer beside what was reported, and writes
data/reports_comparison.json. Needs no torch, no network and a few seconds. An answer **agrees** if it is
within 3 % of what was counted, or has the verdict; one that does not is shown with its error and the reason
that data/reports.json has for it; what can't be said to memplan is **refused**, with the sentence it says. A
run of other code than today's libraries', or a number that no run was, is **not comparable**: its answer is
shown with the reason, and held against nothing.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

from memplan import __version__
from memplan.cli import main as memplan

DATA = Path(__file__).resolve().parent.parent / "data"
REPORTS = DATA / "reports.json"
COMPARISON = DATA / "reports_comparison.json"

WITHIN = 3.0  # percent
DEPENDS = "depends on the card"
COUNTED = {"reserved": "reserved_bytes", "needed": "needed_bytes"}  # of a Fit


def reports() -> list[dict[str, Any]]:
    """The reports, in the file's order; each run with what makes the whole report not comparable."""
    found: list[dict[str, Any]] = json.loads(REPORTS.read_text(encoding="utf-8"))["reports"]
    for report in found:
        if "incomparable" in report:
            reason = report.pop("incomparable")
            report["runs"] = [{**run, "incomparable": reason} for run in report["runs"]]
    return found


def ask(run: dict[str, Any], asks: str) -> tuple[int, str, str]:
    """What ``memplan fit`` answers: its exit status, what it prints and what it says beside that."""
    out, beside = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    offline = mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"})
    with _somewhere(), offline:
        if "file" in run:
            Path("run.yaml").write_text(json.dumps(run["file"]), encoding="utf-8")  # JSON is YAML
        if "config" in run:
            Path("model").mkdir()
            Path("model/config.json").write_text(json.dumps(run["config"]), encoding="utf-8")
        given = {"FILE": "run.yaml", "MODEL": "./model"}
        words = [given.get(word, word) for word in asks.split()]
        with redirect_stdout(out), redirect_stderr(beside):
            status = memplan(["fit", *words, "--json", "--no-advise"])
    printed, said = _text(out), _text(beside)
    assert status in (0, 1, 2), said
    return status, printed, said


@contextmanager
def _somewhere() -> Iterator[None]:
    """In an empty folder, so that a file's name is as short as its author's."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _text(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


def compare(run: dict[str, Any]) -> dict[str, Any]:
    """A run and what came of it."""
    status, printed, beside = ask(run, run["asks"])
    entry: dict[str, Any] = {"about": run.get("about", ""), "asks": run["asks"]}
    entry |= {"explains": run.get("explains", False), "reported": run["reported"], "exit_status": status}
    if status == 2:
        said = beside.strip().splitlines()[-1].removeprefix("memplan: ")
        return entry | {"status": "refused", "answer": said, "reason": run["reason"]}
    entry["answer"] = answer(run, json.loads(printed) if printed else None)
    if "incomparable" in run:
        return entry | {"status": "not comparable", "reason": run["incomparable"]}
    agrees = all(_agrees(kind, run["reported"], entry["answer"]) for kind in ("bytes", "tokens", "verdict"))
    return entry | {"status": "agrees" if agrees else "deviates", "reason": "" if agrees else run["reason"]}


def answer(run: dict[str, Any], told: dict[str, Any] | None) -> dict[str, Any]:
    """What memplan says of what was reported. ``told``: nothing where not one token fits."""
    reported = run["reported"]
    found: dict[str, Any] = {}
    fit = told["fits"][0] if told else None
    if "tokens" in reported:
        found["tokens"] = told["recipe"]["seq_len"] if told else 0
    if reported.get("tokens"):
        asks = run["asks"].replace("--maximize seq-len", f"--seq-len {reported['tokens']}")
        found["left_bytes"] = json.loads(ask(run, asks)[1])["fits"][0]["headroom_bytes"]
    if "bytes" in reported:
        assert told is not None and fit is not None
        allocated = reported["counted"] == "allocated"
        found["bytes"] = told["peak"]["allocated_bytes"] if allocated else fit[COUNTED[reported["counted"]]]
    if fit is not None:
        found |= {"needed_bytes": fit["needed_bytes"], "gpu": fit["gpu"]}
        found["verdict"] = "runs out" if fit["verdict"] == "does not fit" else fit["verdict"]
        if fit["gets_through_on"]:
            found |= {"verdict": DEPENDS, "gets_through_on": fit["gets_through_on"]}
    for kind in ("bytes", "tokens"):
        if reported.get(kind):
            found["error_percent"] = round(100 * (found[kind] / reported[kind] - 1), 2)
    return found


def _agrees(kind: str, reported: dict[str, Any], found: dict[str, Any]) -> bool:
    if kind not in reported:
        return True
    if kind == "verdict" and found["verdict"] == DEPENDS:
        return True  # no card was named, and it is said on which of its size it is so
    if kind == "verdict":
        return bool((found["verdict"] == "runs out") == (reported["verdict"] == "runs out"))
    if not reported[kind]:
        return bool(found[kind] == 0)
    return abs(float(found["error_percent"])) <= WITHIN


def comparison() -> dict[str, Any]:
    """The whole file."""
    return {
        "about": "What memplan says of data/reports.json: output of benchmarks/reports.py.",
        "date": date.today().isoformat(),
        "version": __version__,
        "reports": [{**report, "runs": [compare(run) for run in report["runs"]]} for report in reports()],
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The comparison for a terminal."""
    for report in found["reports"]:
        yield report["setup"]
        for run in report["runs"]:
            told = run["answer"]
            if isinstance(told, dict):
                told = " ".join(f"{key}={value}" for key, value in told.items())
            yield f"  {run['status']:8} {run['about']} {run['reported']}: {told}"


def main() -> None:
    found = comparison()
    COMPARISON.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for line in lines(found):
        print(line)


if __name__ == "__main__":
    main()
