"""``memplan campaign PLAN.yaml``: a list of runs, within a budget of time."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.commands.arguments import Parser, add_json
from memplan.streams import remark

if TYPE_CHECKING:
    from memplan.verify.campaign import Planned
    from memplan.verify.measurement import Measurement

STATUS_DONE, STATUS_LEFT = 0, 1

_RESERVE = 8.0  # seconds of the budget kept for ending a run that takes too long, and for the summary

EXAMPLES = """\
A plan is YAML: benchmarks/campaign.yaml is one, docs/verify.md says what may
stand in it. Runs go by priority, then as they stand. One that is estimated not
to end within the budget is left for later, and one that does not end is ended,
so the budget is never overrun. Every run that ends is written at once, to be
passed over by --resume.

exit status: 0 every run of the plan has a measurement, 1 some are left or
failed, 2 bad plan.

examples:
  memplan campaign benchmarks/campaign.yaml --budget 540 --resume
  memplan campaign benchmarks/campaign.yaml --dry-run
"""


def parser() -> Parser:
    """The arguments that ``memplan campaign`` takes."""
    result = Parser("campaign", "Many verified runs, one after another.", "PLAN [options]", EXAMPLES)
    result.add_argument("plan", metavar="PLAN", help="a YAML file")
    result.add_argument(
        "--budget", type=float, metavar="S", default=None, help="seconds for all (default: no limit)"
    )
    result.add_argument(
        "--resume", action="store_true", default=False, help="pass over runs that have a measurement"
    )
    result.add_argument(
        "--out", metavar="FOLDER", default=None, help="where measurements are, as for memplan verify"
    )
    result.add_argument(
        "--device", choices=["cuda", "cpu"], default=None, help="in place of what the plan says"
    )
    result.add_argument(
        "--only", metavar="TEXT", default=None, help="only runs with this text in their names"
    )
    result.add_argument("--dry-run", action="store_true", default=False, help="list the runs, start none")
    add_json(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Run what is left, print how each ended; 0 if nothing is left."""
    from memplan import stack
    from memplan.commands.verify import default_folder
    from memplan.verify import campaign

    began = time.monotonic()  # planning and reading what is done take of the budget, too
    planned = campaign.expand(campaign.load(Path(arguments.plan)), arguments.device)
    if arguments.only is not None:
        planned = [run for run in planned if arguments.only in run.name]
    folder = Path(arguments.out) if arguments.out else default_folder()
    there = campaign.done(folder) if arguments.resume else {}
    rows: dict[str, dict[str, Any]] = {
        run.name: _row(run, there[run.key]) if run.key in there else _left(run) for run in planned
    }
    if not arguments.dry_run:
        stack.require(doing="verifying")
        _run_all([run for run in planned if run.key not in there], rows, folder, arguments.budget, began)
    _print(list(rows.values()), arguments.json)
    finished = all(row["outcome"] in ("trained", "out of memory") for row in rows.values())
    return STATUS_DONE if finished or arguments.dry_run else STATUS_LEFT


def _run_all(
    waiting: list[Planned], rows: dict[str, dict[str, Any]], folder: Path, budget: float | None, began: float
) -> None:
    from memplan.report.progress import campaigning
    from memplan.verify.campaign import slowness
    from memplan.verify.measurement import make_ready, write
    from memplan.verify.runner import Refused, RunDied, TimeIsUp, run_job

    make_ready(folder)
    seen: list[tuple[float, float]] = []
    with campaigning(len(waiting)) as (tell, begin, advance):
        for run in waiting:
            left = None if budget is None else budget - _RESERVE - (time.monotonic() - began)
            if left is not None and run.seconds * slowness(seen) > left:
                rows[run.name]["why"] = f"needs about {run.seconds * slowness(seen):.0f} s"
                advance()
                continue
            begin(run.name)
            started = time.monotonic()
            try:
                measured = run_job(run.job, tell=tell, seconds=left)
            except (Refused, RunDied, TimeIsUp) as error:
                kind = "refused" if isinstance(error, Refused) else "no result"
                rows[run.name] |= {"outcome": kind, "why": str(error)}
                remark(f"{run.name}: {error}")
            else:
                path = write(measured, folder)
                rows[run.name] = _row(run, measured) | {"file": path.name}
                seen.append((run.seconds, time.monotonic() - started))
            advance()


def _left(run: Planned) -> dict[str, Any]:
    return {
        "name": run.name,
        "outcome": "left",
        "seconds": round(run.seconds),
        "predicted": run.job.predicted_bytes,
        "measured": None,
        "percent": None,
        "why": None,
    }


def _row(run: Planned, measured: Measurement) -> dict[str, Any]:
    from memplan.verify.compare import compare

    found = compare(measured)
    return {
        "name": run.name,
        "outcome": found.outcome,
        "seconds": round(run.seconds),
        "predicted": found.allocated.predicted,
        "measured": found.allocated.measured,
        "percent": found.allocated.percent,
        "why": found.why,
    }


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        from memplan.report.machine import print_list

        print_list("runs", rows)
    else:
        from memplan.report.console import terminal
        from memplan.report.measured import show_campaign

        show_campaign(rows, terminal())
