"""docs/dry-run.md, from data/dry_runs.json and data/dry_run_matrix.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).parent / "templates" / "dry-run.md"
GIB = 1 << 30
USUAL = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl"}  # all of them in most rows


def page() -> str:
    """The page."""
    rows = json.loads((ROOT / "data" / "dry_runs.json").read_text(encoding="utf-8"))["rows"]
    through = [row for row in rows if row["why"] is None]
    matrix = json.loads((ROOT / "data" / "dry_run_matrix.json").read_text(encoding="utf-8"))
    usual = [row for row in through if "environment" not in row]
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in row["libraries"].items() if name in USUAL)
        for row in usual
        if row["libraries"].keys() >= USUAL
    )
    failed = [f"- `{row['name']}` does not go through: {row['why']}\n" for row in rows if row not in through]
    return (
        TEMPLATE.read_text(encoding="utf-8")
        .replace("{rows}\n", "".join(map(_row, through)))
        .replace("{failed}\n", "\n" + "".join(failed) if failed else "\n")
        .replace("{matrix}\n", "".join(map(_tried, matrix["rows"])) + "\n")
        .replace("{matrix_when}", matrix["date"])
        .replace("{when}", f"memplan {through[0]['memplan_version']}")
        .replace("{versions}", "; ".join(versions))
    )


def _tried(row: dict[str, Any]) -> str:
    beside = "beside" if row["beside"] else "–"
    if row["why"] is not None:
        return (
            f"| {row['torch']} | – | {row['python']} | {beside} | does not go through: {row['why']} | – |\n"
        )
    needed, last = row["needed_bytes"], row["allocated_bytes"][-1]
    torch = f"{row['torch']}, {row['machine']}" if "machine" in row else row["torch"]
    return f"| {torch} | {row['cuda']} | {row['python']} | {beside} | {needed:,} | {last:,} |\n"


def _row(row: dict[str, Any]) -> str:
    needed = "–" if row["needed_bytes"] is None else f"{row['needed_bytes'] / GIB:.2f} GiB"
    last = f"{row['steps'][-1]['allocated_bytes'] / GIB:.2f} GiB" if row["steps"] else "–"
    card = row["gpu"].removeprefix("NVIDIA ").removeprefix("GeForce ")
    if row.get("count", 1) > 1:
        card = f"{row['count']} × {card}"
    cells = (row["what"], row["model"], card, row["verdict"], needed, last, f"{row['seconds']:.0f}")
    return f"| {' | '.join(cells)} |\n"
