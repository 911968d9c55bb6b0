"""Predicted equals traced, to the byte: a part of benchmarks/reconcile.py, and the committed run of all."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
    for package in ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "liger_kernel"):
        pytest.importorskip(package)

ROOT = Path(__file__).parent.parent
EVERY = 4  # of the cases, one in so many is run here


@cache
def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("reconcile", ROOT / "benchmarks" / "reconcile.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["reconcile"] = module
    found.loader.exec_module(module)
    return module


@cache
def committed() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / "data" / "reconciliation.json").read_text(encoding="utf-8"))
    return result


def chosen() -> list[dict[str, Any]]:
    """The 70B at full depth, and a part of the cover."""
    cases = [result["case"] for result in committed()["results"]]
    deep = [case for case in cases if case["layers"] is None]
    return [case for case in deep if case["model"] == "llama-3.3-70b"] + cases[len(deep) :: EVERY]


@pytest.mark.filterwarnings("default")  # the libraries' warnings are theirs
@pytest.mark.parametrize("case", chosen(), ids=lambda case: f"{case['model']}-{case['mode']}")
def test_predicted_is_traced(case: dict[str, Any]) -> None:
    reconcile = script()
    result = reconcile.compare(case)
    assert not reconcile.complaints([result], reconcile.known_deviations())
    assert result["static_agrees"]


def test_the_committed_run_is_of_the_whole_matrix_and_has_no_undeclared_deviation() -> None:
    reconcile = script()
    results = committed()["results"]
    assert len(results) >= 200
    assert [reconcile.label(result["case"]) for result in results] == [
        reconcile.label(case) for case in reconcile.matrix()
    ]
    assert not reconcile.complaints(results, reconcile.known_deviations())


def test_every_declared_deviation_is_met_by_a_case() -> None:
    reconcile = script()
    for deviation in reconcile.known_deviations():
        assert any(reconcile.declared(result["case"], [deviation]) for result in committed()["results"])


@pytest.mark.parametrize("off", [0, 512])
def test_a_difference_of_one_block_is_a_complaint(off: int) -> None:
    reconcile = script()
    result = committed()["results"][0]
    changed = {**result["predicted"], "peak_bytes": result["predicted"]["peak_bytes"] + off}
    changed = {**result, "predicted": changed, "agrees": changed == result["traced"]}
    assert bool(reconcile.complaints([changed], [])) is bool(off)


def test_a_deviation_that_is_gone_is_a_complaint() -> None:
    reconcile = script()
    result = committed()["results"][0]
    gone = {"case": {"model": result["case"]["model"]}, "tensor": "none", "reason": "", "bytes": 512}
    assert reconcile.complaints([result], [gone])


def test_results_know_what_code_they_are_of() -> None:
    """Every room that writes a step, or that is below one which does."""
    package = ROOT / "memplan"
    above = {
        "planning",
        "report",
        "commands",
        "verify",
        "snapshot",
        "device",
        "importers",
        "runfiles",
        "kernels",
        "emulate",
    }
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(script().SOURCES) == rooms - above
    assert script().source_hash() == script().source_hash()
