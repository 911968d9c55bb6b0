"""docs/dry-run.md, from data/dry_runs.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).parent / "templates" / "dry-run.md"
GIB = 1 << 30


def page() -> str:
    """The page."""
    rows = json.loads((ROOT / "data" / "dry_runs.json").read_text(encoding="utf-8"))["rows"]
    through = [row for row in rows if row["why"] is None]
    libraries = through[0]["libraries"]
    failed = [f"- `{row['name']}` does not go through: {row['why']}\n" for row in rows if row not in through]
    return (
        TEMPLATE.read_text(encoding="utf-8")
        .replace("{rows}\n", "".join(map(_row, through)))
        .replace("{failed}\n", "\n" + "".join(failed) if failed else "\n")
        .replace("{when}", f"memplan {through[0]['memplan_version']}")
        .replace("{versions}", ", ".join(f"{name} {version}" for name, version in libraries.items()))
    )


def _row(row: dict[str, Any]) -> str:
    needed = "–" if row["needed_bytes"] is None else f"{row['needed_bytes'] / GIB:.2f} GiB"
    last = f"{row['steps'][-1]['allocated_bytes'] / GIB:.2f} GiB" if row["steps"] else "–"
    card = row["gpu"].removeprefix("NVIDIA ").removeprefix("GeForce ")
    if row.get("count", 1) > 1:
        card = f"{row['count']} × {card}"
    cells = (row["what"], row["model"], card, row["verdict"], needed, last, f"{row['seconds']:.0f}")
    return f"| {' | '.join(cells)} |\n"
