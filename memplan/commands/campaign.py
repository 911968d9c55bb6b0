"""``memplan campaign PLAN.yaml``: a list of runs, within a budget of time."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.commands.arguments import Parser, UsageError, add_json, add_switch, positive
from memplan.errors import MemplanError, reason, shown
from memplan.streams import remark

if TYPE_CHECKING:
    from memplan.verify.campaign import Planned
    from memplan.verify.measurement import Measurement

STATUS_DONE, STATUS_LEFT = 0, 1

_RESERVE = 8.0  # seconds of the budget kept for ending a run that takes too long, and for the summary

EXAMPLES = """\
A plan is YAML, with recipes as --json prints them:

  defaults: {device: cuda, steps: 3}
  runs:
    - {name: small, model: llama-3.2-1b, recipe: {mode: qlora, r: 8}}
    - {name: long, model: llama-3.2-1b, recipe: {mode: lora, seq_len: 8192}}

Runs go by priority, then as they stand. One that is estimated not to end within
the budget is left for later, and one that takes five times its estimate, or all
that is left, is ended, so the budget is never overrun. Every run that ends is
written at once, to be passed over by --resume. A folder takes one campaign at a
time.

exit status: 0 every run of the plan has a measurement, 1 some are left or
failed, 2 bad plan.

examples:
  memplan campaign plan.yaml --dry-run
  memplan campaign plan.yaml --out measured --budget 540 --resume
"""


def parser() -> Parser:
    """The arguments that ``memplan campaign`` takes."""
    result = Parser("campaign", "Many verified runs, one after another.", "PLAN [options]", EXAMPLES)
    result.add_argument("plan", metavar="PLAN", help="a YAML file")
    result.add_argument(
        "--budget", type=positive, metavar="S", default=None, help="seconds for all (default: no limit)"
    )
    result.add_argument(
        "--timeout",
        type=positive,
        metavar="S",
        default=None,
        help="end a run after S seconds (default: five times its estimate, at least 120)",
    )
    add_switch(result, "--resume", "pass over runs that have a measurement")
    result.add_argument(
        "--out", metavar="FOLDER", default=None, help="where measurements are; needed unless --dry-run"
    )
    result.add_argument(
        "--device", choices=["cuda", "cpu"], default=None, help="in place of what the plan says"
    )
    result.add_argument(
        "--only", metavar="TEXT", default=None, help="only runs with this text in their names"
    )
    add_switch(result, "--dry-run", "list the runs, start none")
    add_json(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Run what is left, print how each ended; 0 if nothing is left."""
    from memplan import libraries
    from memplan.verify import campaign

    if arguments.out is None and not (arguments.dry_run and not arguments.resume):
        raise UsageError("say with --out FOLDER where the measurements are to be")
    began = time.monotonic()  # planning and reading what is done take of the budget, too
    planned = campaign.expand(campaign.load(Path(arguments.plan)), arguments.device)
    if arguments.only is not None:
        planned = [run for run in planned if arguments.only in run.name]
    folder = Path(arguments.out or "")  # of no matter where none is needed
    if arguments.dry_run:
        rows, _ = _begin(planned, folder, resume=arguments.resume)
    else:
        libraries.require(doing="verifying")
        with _to_itself(folder):  # before it is read: what another campaign ends meanwhile would be run again
            rows, waiting = _begin(planned, folder, resume=arguments.resume)
            _run_all(waiting, rows, folder, arguments, began)
    _print(list(rows.values()), arguments.json)
    finished = all(
        row["outcome"] in ("trained", "out of memory") and not row["lost"] for row in rows.values()
    )
    return STATUS_DONE if finished or arguments.dry_run else STATUS_LEFT


def _begin(planned: list[Planned], folder: Path, *, resume: bool) -> tuple[dict[str, Any], list[Planned]]:
    """A row for each run, and the runs that are left."""
    from memplan.verify import campaign

    there = campaign.done(folder, remark) if resume else {}
    rows = {run.name: _row(run, there[run.key]) if run.key in there else _left(run) for run in planned}
    return rows, [run for run in planned if run.key not in there]


@contextmanager
def _to_itself(folder: Path) -> Iterator[None]:
    """The folder for this campaign alone; made, and taken away again if nothing came into it. Raises
    MemplanError where another campaign has it, or where it can't be written to."""
    from memplan.verify.locks import alone
    from memplan.verify.measurement import make_ready

    make_ready(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MemplanError(f"{shown(str(folder))} can't be made: {reason(error)}") from None
    try:
        with alone(folder) as ours:
            if ours is False:
                raise MemplanError(
                    f"another campaign is writing to {shown(str(folder))}: wait for it, or give another --out"
                )
            yield
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()


def _run_all(
    waiting: list[Planned],
    rows: dict[str, dict[str, Any]],
    folder: Path,
    arguments: argparse.Namespace,
    began: float,
) -> None:
    from memplan.report.progress import campaigning
    from memplan.verify.campaign import patience, slowness
    from memplan.verify.measurement import keep
    from memplan.verify.runner import Refused, RunDied, TimeIsUp, run_job

    budget: float | None = arguments.budget
    seen: list[tuple[float, float]] = []
    with campaigning(len(waiting)) as (tell, begin, advance):
        for run in waiting:
            left = math.inf if budget is None else budget - _RESERVE - (time.monotonic() - began)
            expected = run.seconds * slowness(seen)
            if expected > left:
                rows[run.name]["why"] = f"needs about {expected:.0f} s"
                advance()
                continue
            begin(run.name)
            started = time.monotonic()
            try:
                limit = arguments.timeout or patience(expected)
                measured = run_job(run.job, tell=tell, seconds=min(left, limit))
            except (Refused, RunDied, TimeIsUp, OSError) as error:
                kind = "refused" if isinstance(error, Refused) else "no result"
                why = reason(error) if isinstance(error, OSError) else str(error)
                rows[run.name] |= {"outcome": kind, "why": why}
                remark(f"{run.name}: {why}")
            else:
                path, trouble = keep(measured, folder)
                rows[run.name] = _row(run, measured)
                if trouble is None and path is not None:
                    rows[run.name]["file"] = path.name
                else:
                    rows[run.name] |= {"lost": True, "why": trouble}
                    remark(f"{run.name}: {trouble}")
                    if path is None:
                        remark(
                            measured.model_copy(update={"tape": None, "tape_step": None}).model_dump_json()
                        )
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
        "lost": False,
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
        "lost": False,
    }


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        from memplan.report.machine import print_list

        print_list("runs", rows)
    else:
        from memplan.report.console import terminal
        from memplan.report.measured import show_campaign

        show_campaign(rows, terminal())
