"""The measured sections of docs/accuracy.md: what `memplan report` prints of data/measurements, and what the
differences are, with data/measured_emulated.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from memplan.commands.report import BEGIN, END
from memplan.report import measured
from memplan.tape import Part, Tape
from memplan.verify.compare import Comparison, compare
from memplan.verify.measurement import Measurement, read_all

DATA = Path(__file__).resolve().parent.parent / "data"
FOLDER = DATA / "measurements"

LT_WORKSPACE = 1 << 20  # bytes that torch 2.11 takes for cuBLASLt, for each thread that multiplies with it

WAYS = {"up": "each segment above the last", "down": "each segment below the last"}

TEMPLATE = Path(__file__).parent / "templates" / "differences.md"


def section() -> str:
    """Between the marks that `memplan report --into` looks for; what differs stands below."""
    text = f"{BEGIN}\n{measured.section(_pairs())}{END}\n"
    return f"{text}\n{differences()}" if on_gpus() else text


def on_gpus() -> bool:
    """Whether any was made on one."""
    return any(run.device.kind == "cuda" for run, _ in _pairs())


def summary() -> str:
    """What was measured on GPUs in three sentences, which other pages have word for word."""
    on_cards = [(run, found) for run, found in _pairs() if run.device.kind == "cuda"]
    peaks = [found.allocated for run, found in on_cards if run.outcome.kind == "trained"]
    ran_out = [
        found.fits_predicted is False for run, found in on_cards if run.outcome.kind == "out of memory"
    ]
    names, days, versions = (
        " and ".join(sorted(set(words)))
        for words in (
            [run.device.name for run, _ in on_cards],
            [run.date[:10] for run, _ in on_cards],
            [run.libraries["torch"] for run, _ in on_cards],
        )
    )
    held = [found.reserved for run, found in on_cards if run.outcome.kind == "trained"]
    worst, farthest = (max(abs(it.percent or 0) for it in figures) for figures in (peaks, held))
    equal, same = (sum(it.error == 0 for it in figures) for figures in (peaks, held))
    return (
        f"{len(on_cards)} runs were measured on an {names} ({days}, torch {versions}). Of {len(peaks)} that "
        f"trained, {equal} have the predicted peak of allocated bytes to the byte and the worst is "
        f"{worst:.3f} % off; of the reserved bytes {same} are equal and the worst are {farthest:.1f} % off. "
        f"{sum(ran_out)} of {len(ran_out)} that ran out of memory were predicted to."
    )


@cache
def _pairs() -> list[tuple[Measurement, Comparison]]:
    return [(run, compare(run)) for _, run in read_all(FOLDER)]


# -- what the differences are ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What a difference is made of, in bytes; what workspaces do not explain is ``blocks``.
    ``emulated``: what an emulated card says less what was measured, for each way that addresses go."""

    run: str
    difference: int
    workspaces: int
    emulated: dict[str, int | None]

    @property
    def blocks(self) -> int:
        """Where tapes hold the same tensors, nothing else is left."""
        return self.difference - self.workspaces


def parts(run: Measurement, found: Comparison) -> Parts:
    """Of a run that trained. One without a tape (the Trainer's) is taken to have the workspaces that the same
    recipe had in memplan's loop."""
    assert found.allocated.error is not None
    name = run.run.campaign or found.title
    row = next((row for row in _emulated() if row["run"] == run.run.campaign), None)
    at = next(i for i, step in enumerate(run.steps) if step == run.steady)
    emulated = {
        way: None if row is None else row[way]["allocated_bytes"][at] - run.steps[at].allocated_bytes
        for way in WAYS
    }
    return Parts(name, found.allocated.error, -LT_WORKSPACE * _lt_workspaces(run), emulated)


@cache
def _emulated() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((DATA / "measured_emulated.json").read_text(encoding="utf-8"))[
        "rows"
    ]
    return rows


def _lt_workspaces(run: Measurement) -> int:
    tape = run.read_tape() or next(
        (tape for other, _ in _pairs() if _alike(run, other) and (tape := other.read_tape())), None
    )
    return 0 if tape is None else lt_workspaces(tape)


def _alike(one: Measurement, other: Measurement) -> bool:
    return (one.device, one.model, one.recipe) == (other.device, other.model, other.recipe)


def lt_workspaces(tape: Tape) -> int:
    """Blocks of that size which were there before the recorded step and are nobody's."""
    resting = (segment for segment in tape.segments if segment.part is Part.RESTING)
    there = (event for segment in resting for event in tape.events[segment.start : segment.stop])
    return sum(
        tape.sizes[event] == LT_WORKSPACE and tape.operations[event] == "unattributed" for event in there
    )


def differences() -> str:
    """The section about them."""
    trained = [
        (run, found) for run, found in _pairs() if run.device.kind == "cuda" and run.outcome.kind == "trained"
    ]
    off = [parts(run, found) for run, found in trained if found.allocated.error]
    tapes = [
        (found.tensors.error, -LT_WORKSPACE * _lt_workspaces(run))
        for run, found in trained
        if found.tensors.error is not None
    ]
    assert all(error == workspaces for error, workspaces in tapes), "a measured tape holds another tensor"
    rows = _emulated()
    recorded = [row["up_has_the_same_events"] for row in rows if row["up_has_the_same_events"] is not None]
    asked = [row for row in rows if None not in row["measured"]["requested_bytes"]]
    blocks = [one for one in off if one.blocks]
    driver = [one for one in blocks if one.emulated["up"] and one.emulated["down"] == 0]
    own = [one for one in blocks if one.emulated["up"] == 0]
    assert len(blocks) == len(driver) + len(own), "a difference of blocks that no emulated card explains"
    return TEMPLATE.read_text(encoding="utf-8").format(
        blocks=len(blocks),
        driver=len(driver),
        order=len(own),
        own=", ".join(f"`{one.run}` ({one.blocks:+,})" for one in own),
        trained=len(trained),
        off=len(off),
        rows="".join(map(_row, sorted(off, key=lambda one: one.difference))),
        tapes=len(tapes),
        compared=len(rows),
        requested=sum(_equal(row, "up", "requested_bytes") for row in asked),
        events=sum(recorded),
        recorded=len(recorded),
        ways="".join(_way(rows, way, name) for way, name in WAYS.items()),
        largest=_largest(rows),
    )


def _row(one: Parts) -> str:
    made_of = [f"{number:+,}" if number else "–" for number in (one.workspaces, one.blocks)]
    emulated = ["" if number is None else f"{number:+,}" for number in one.emulated.values()]
    return f"| {one.run} | {one.difference:+,} | {' | '.join([*made_of, *emulated])} |\n"


def _equal(row: dict[str, Any], way: str, counter: str) -> bool:
    return bool(row[way][counter] == row["measured"][counter])


def _percents(row: dict[str, Any], way: str, counter: str) -> list[float]:
    pairs = zip(row[way][counter], row["measured"][counter], strict=True)
    return [100 * (emulated - measured) / measured for emulated, measured in pairs]


def _way(rows: list[dict[str, Any]], way: str, name: str) -> str:
    counters = ("allocated_bytes", "reserved_bytes")
    equal = [f"{sum(_equal(row, way, counter) for row in rows)} of {len(rows)}" for counter in counters]
    worst = [
        max((percent for row in rows for percent in _percents(row, way, counter)), key=abs)
        for counter in counters
    ]
    return f"| {name} | {' | '.join(equal)} | {' | '.join(f'{percent:+.3f} %' for percent in worst)} |\n"


def _largest(rows: list[dict[str, Any]]) -> str:
    """The run whose reserved bytes depend most on addresses."""
    row = max(rows, key=lambda row: max(map(abs, _percents(row, "up", "reserved_bytes"))))
    last = {side: row[side]["reserved_bytes"][-1] for side in ("up", "measured", "down")}
    return (
        f"`{row['run']}`: upwards {last['up']:,} are reserved, downwards {last['down']:,}, and "
        f"{last['measured']:,} were measured"
    )
