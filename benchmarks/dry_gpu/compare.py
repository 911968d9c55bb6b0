"""Hold emulated runs against the plan: ``data/emulated.json``, which docs/accuracy.md is made from.

python benchmarks/dry_gpu/compare.py FOLDER    # records that memplan verify or campaign wrote on the card
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from memplan.asked.recipe import Recipe
from memplan.errors import MemplanError
from memplan.verify.compare import Figure, compare
from memplan.verify.measurement import Measurement, read_all

ROOT = Path(__file__).resolve().parents[2]


def row(measured: Measurement) -> dict[str, Any]:
    """A run: what is not the default of its recipe, and both sides in bytes."""
    found = compare(measured)
    usual = (
        Recipe(mode=measured.recipe.mode, trainer=measured.recipe.trainer).resolved().model_dump(mode="json")
    )
    options = {
        name: value
        for name, value in measured.recipe.model_dump(mode="json").items()
        if value != usual[name] and name not in ("batch_size", "seq_len", "mode")
    }
    return {
        "run": measured.title,
        "options": options,
        "card": measured.device.name,
        "cap": measured.run.cap_name,
        "outcome": measured.outcome.kind,
        "why": None if measured.outcome.kind != "failed" else measured.outcome.why,
        "allocated": _figure(found.allocated),
        "reserved": _figure(found.reserved),
        "fits": {"predicted": found.fits_predicted, "emulated": found.fits_measured},
        "libraries": measured.libraries,
        "date": measured.date[:10],
    }


def _figure(figure: Figure) -> dict[str, int | None]:
    return {"predicted": figure.predicted, "emulated": figure.measured}


def main(folder: Path, out: Path = ROOT / "data" / "emulated.json") -> None:
    """Write the rows, by name. Raises MemplanError for a damaged record or where there are none."""
    rows = [row(measured) for _, measured in read_all(folder) if measured.emulated]
    if not rows:
        raise MemplanError(f"{folder} holds no emulated runs")
    rows.sort(key=lambda it: (it["run"], json.dumps(it["options"], sort_keys=True), it["cap"] or ""))
    out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Holds emulated runs against the plan.")
    parser.add_argument("folder", type=Path, help="of records that were written on the emulated card")
    try:
        main(parser.parse_args().folder)
    except MemplanError as error:
        sys.exit(f"error: {error}")
