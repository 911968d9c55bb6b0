"""data/files.json: example files of trainers against dry runs of them (benchmarks/files/run.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memplan import plan

ROOT = Path(__file__).parent.parent
ROWS: list[dict[str, Any]] = json.loads((ROOT / "data" / "files.json").read_text(encoding="utf-8"))["rows"]
MODEL = {"axolotl": "base_model", "llama_factory": "model_name_or_path", "trl": "model_name_or_path"}
PLACES = {
    "base_model", "model_name_or_path", "datasets", "dataset", "dataset_dir", "dataset_name", "output_dir",
    "dataset_prepared_path", "report_to", "eval_strategy", "val_set_size", "evals_per_epoch", "plot_loss",
    "excess_length_strategy", "special_tokens", "tokenizer_type",
}  # fmt: skip


def example(row: dict[str, Any]) -> dict[str, Any]:
    file = ROOT / "tests" / "run_files" / f"{row['trainer']}.json"
    listed = json.loads(file.read_text(encoding="utf-8"))
    return next(one["file"] for one in listed if one["name"] == row["file"])


def test_each_trainer_has_several() -> None:
    through = [row["trainer"] for row in ROWS if row["why"] is None]
    assert all(through.count(trainer) >= 3 for trainer in MODEL)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['trainer']}-{row['file']}")
def test_the_plan_is_the_row_s_and_its_tensors_those_of_the_dry_run(
    row: dict[str, Any], tmp_path: Path
) -> None:
    assert row["why"] is None
    assert row["edits"].keys() - PLACES <= {"sample_packing", "attn_implementation"}
    file = tmp_path / "run.yaml"
    asked = {**example(row), **row["edits"], MODEL[row["trainer"]]: row["model"]}
    file.write_text(json.dumps(asked), encoding="utf-8")
    planned = plan(file, gpus=[])
    assert planned.peak.tensor_bytes == row["tensors"]["predicted"]
    assert planned.allocator.allocated_bytes == row["allocated"]["predicted"]
    # every number that a loop keeps, and the batches that wait, are in the plan
    assert row["tensors"]["predicted"] == row["tensors"]["emulated"]
    assert row["allocated"]["predicted"] == row["allocated"]["emulated"]
