"""The part of docs/accuracy.md about data/emulated.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

SECTION = """\
## Predicted against emulated

*Emulated*: real training code on PyTorch's CUDA build with its real caching allocator, and no GPU: NVIDIA's
libraries are replaced by ones that hand out and count memory and compute nothing ([dry-run.md](dry-run.md)).
Allocations are the host code's own, scratch around CUDA kernels included; what NVIDIA's closed libraries and
the driver take beside the allocator is not in it, and no value is right.
`python benchmarks/dry_gpu/compare.py` wrote `data/emulated.json` from {runs} runs of
`benchmarks/campaign.yaml` ({versions}).

| of {trained} runs that got to the end | equal to the byte | largest error |
| --- | ---: | ---: |
| `max_memory_allocated` | {allocated} | {worst_allocated:+.3f} % |
| `max_memory_reserved` | {reserved} | {worst_reserved:+.3f} % |

{verdicts} of {judged} runs ended as the simulated allocator said, {ran_out} of them out of memory.{wrong}

Not equal to the byte, or not as said:

| run | options | cap | allocated | error | reserved | error |
| --- | --- | --- | ---: | ---: | ---: | ---: |
{rows}
{failed}
"""


def section() -> str:
    """The section, from the file's rows."""
    rows = json.loads((ROOT / "data" / "emulated.json").read_text(encoding="utf-8"))["rows"]
    trained = [row for row in rows if row["outcome"] == "trained"]
    judged = [row for row in rows if row["fits"]["emulated"] is not None]
    right = [row for row in judged if row["fits"]["predicted"] == row["fits"]["emulated"]]
    wrong = [row for row in judged if row not in right]
    failed = [row for row in rows if row["outcome"] == "failed"]
    off = [row for row in trained if _error(row["allocated"]) or _error(row["reserved"])]
    versions = sorted({", ".join(f"{k} {v}" for k, v in row["libraries"].items()) for row in rows})
    return SECTION.format(
        runs=len(rows),
        versions="; ".join(versions),
        trained=len(trained),
        allocated=sum(not _error(row["allocated"]) for row in trained),
        reserved=sum(not _error(row["reserved"]) for row in trained),
        worst_allocated=max((_percent(row["allocated"]) for row in trained), key=abs),
        worst_reserved=max((_percent(row["reserved"]) for row in trained), key=abs),
        verdicts=len(right),
        judged=len(judged),
        ran_out=sum(row["outcome"] == "out of memory" for row in right),
        wrong="".join(f" Not so: {_name(row)}." for row in wrong),
        rows="".join(map(_row, off)) + "".join(map(_row, wrong)),
        failed="".join(f"Not emulated: {_name(row)} ({row['why']}).\n" for row in failed),
    )


def _error(figure: dict[str, int]) -> int:
    return figure["predicted"] - figure["emulated"]


def _percent(figure: dict[str, int]) -> float:
    return 100 * _error(figure) / figure["emulated"]


def _options(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["options"].items()) or "–"


def _name(row: dict[str, Any]) -> str:
    cap = f" with the room of {row['cap']}" if row["cap"] else ""
    return f"{row['run']} ({_options(row)}){cap}"


def _row(row: dict[str, Any]) -> str:
    cells = [row["run"], _options(row), row["cap"] or "–"]
    for figure in (row["allocated"], row["reserved"]):
        seen = figure["emulated"]
        cells += ["–", "–"] if seen is None else [f"{seen:,}", f"{_error(figure):+,}"]
    return f"| {' | '.join(cells)} |\n"
