"""Hold emulated runs against the same runs on a GPU: ``data/measured_emulated.json``, for docs/accuracy.md.

python benchmarks/dry_gpu/against_measured.py --up FOLDER... --down FOLDER... [--merge]

Records that memplan campaign wrote on the emulated card, with MEMPLAN_CARD_ADDRESSES up and down and the
torch that the GPU had: then code and allocator are the same, and what differs is what the card's driver does.
``--merge`` keeps the rows of runs that these folders don't have.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from memplan.errors import MemplanError
from memplan.tape import Phase, Tape
from memplan.verify.measurement import Measurement, read_all

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "data" / "measurements"
OUT = ROOT / "data" / "measured_emulated.json"

COUNTERS = ("allocated_bytes", "requested_bytes", "reserved_bytes")


def question(run: Measurement) -> str:
    """The same for two records of one run."""
    asked = run.run.model_dump(include={"loop", "steps", "cap_bytes", "cudnn_attention"})
    return json.dumps([run.model.model_dump(), run.recipe.model_dump(mode="json"), asked], sort_keys=True)


def counted(run: Measurement) -> dict[str, list[int | None]]:
    """Peaks of each step, in bytes."""
    return {counter: [getattr(step, counter) for step in run.steps] for counter in COUNTERS}


def same_events(one: Tape, other: Tape) -> bool:
    """Whether two recorded steps ask for and release the same sizes in the same order."""
    return _changes(one) == _changes(other)


def _changes(tape: Tape) -> tuple[list[int], list[int]]:
    begin = max((part.stop for part in tape.segments if part.phase is Phase.SETUP), default=0)
    return sorted(tape.deltas[:begin]), tape.deltas[begin:]


def rows(measured: list[Measurement], emulated: dict[str, list[Measurement]]) -> list[dict[str, Any]]:
    """A row for each measured run that trained and was emulated each way."""
    by_way = {way: {question(run): run for run in runs} for way, runs in emulated.items()}
    found = []
    for run in measured:
        twins = {way: runs.get(question(run)) for way, runs in by_way.items()}
        if run.outcome.kind != "trained" or any(
            twin is None or twin.libraries != run.libraries or len(twin.steps) != len(run.steps)
            for twin in twins.values()
        ):
            continue
        tape = run.read_tape()
        row: dict[str, Any] = {"run": run.run.campaign, "title": run.title, "measured": counted(run)}
        for way, twin in twins.items():
            assert twin is not None
            theirs = twin.read_tape()
            row[way] = counted(twin)
            row[f"{way}_has_the_same_events"] = same_events(tape, theirs) if tape and theirs else None
        found.append(row)
    return found


def main(emulated: dict[str, list[Path]], out: Path = OUT, *, merge: bool = False) -> None:
    """Write the rows, with ``merge`` beside those that are there. Raises MemplanError for a damaged record or
    where nothing can be compared."""
    measured = [run for _, run in read_all(MEASURED) if run.device.kind == "cuda"]
    found = rows(
        measured,
        {
            way: [run for folder in folders for _, run in read_all(folder) if run.emulated]
            for way, folders in emulated.items()
        },
    )
    if not found:
        raise MemplanError("no run was both measured and emulated each way with the same libraries")
    if merge:
        anew = {row["run"] for row in found}
        before = json.loads(out.read_text(encoding="utf-8"))["rows"]
        found += [row for row in before if row["run"] not in anew]
    document = {
        "about": "Program output: benchmarks/dry_gpu/against_measured.py. Bytes, a number for each step.",
        "libraries": measured[0].libraries,
        "rows": sorted(found, key=lambda row: str(row["run"])),
    }
    out.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Holds emulated runs against measured ones.")
    for way in ("up", "down"):
        parser.add_argument(f"--{way}", type=Path, nargs="+", required=True, help="folders of such records")
    parser.add_argument("--merge", action="store_true", help="beside the rows that are there")
    arguments = parser.parse_args()
    try:
        main({"up": arguments.up, "down": arguments.down}, merge=arguments.merge)
    except MemplanError as error:
        sys.exit(f"error: {error}")
