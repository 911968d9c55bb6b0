"""docs/architectures.md, from data/architectures.json (benchmarks/architectures.py)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memplan import families

TEMPLATE = Path(__file__).parent / "templates" / "architectures.md"
RESULTS = Path(__file__).parent.parent / "data" / "architectures.json"
MODES = ("full", "lora", "qlora")

Row = dict[str, Any]


def page() -> str:
    """The page."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows: list[Row] = found["types"]
    texts = {
        family.config.images[1]: name
        for name, family in families.everyone()
        if family.config.images is not None
    }
    predicted = [row for row in rows if row["model_type"] in families.names()]
    asked = [row for row in rows if row["model_type"] not in {*families.names(), *texts}]
    others = [row for row in asked if "why" in row]
    whole = [row for row in asked if all(row.get(mode) == "traced" for mode in MODES)]
    part = [row for row in asked if row not in others and row not in whole]
    plain = [row for row in others if not row["sees"]]
    values = {
        "transformers": found["versions"]["transformers"],
        "date": found["date"],
        "all": len(rows),
        "predicted_number": len(predicted),
        "predicted": _listed(predicted),
        "texts": ", ".join(f"`{sees}` (`{text}`)" for sees, text in sorted(texts.items())),
        "traced_number": len(whole),
        "traced": _listed(whole),
        "part_number": len(part),
        "part": "".join(map(_row, part)),
        "seeing": _listed(row for row in others if row["sees"]),
        "other_number": len(plain),
        "others": _listed(plain),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def _listed(rows: Iterable[Row]) -> str:
    return ", ".join(f"`{row['model_type']}`" for row in rows)


def _row(row: Row) -> str:
    """A type that can't be traced in every mode, with the reasons why, each once."""
    reasons = dict.fromkeys(row[mode] for mode in MODES if row[mode] != "traced")
    cells = ("yes" if row[mode] == "traced" else "no" for mode in MODES)
    why = "; ".join(reasons).replace("|", "\\|")
    return f"| `{row['model_type']}` | {' | '.join(cells)} | {why} |\n"
