"""What scripts took on a real card, held against the plan (benchmarks/measure.py)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import ModuleType

from programs import load

ROOT = Path(__file__).parent.parent


@cache
def measure() -> ModuleType:
    return load("measure", ROOT / "benchmarks" / "measure.py")


def test_the_comparison_is_what_was_measured_and_what_the_plan_says_now() -> None:
    module = measure()
    kept = json.loads(module.COMPARED.read_text(encoding="utf-8"))["rows"]
    now = module.compared(module.RESULTS, None)
    assert json.loads(json.dumps(now)) == kept, "run benchmarks/measure.py --compare"


def test_most_scripts_allocate_what_the_plan_says_on_a_real_card() -> None:
    kept = json.loads(measure().COMPARED.read_text(encoding="utf-8"))["rows"]
    off = [abs(row["allocated"]["predicted"] / row["allocated"]["measured"][-1] - 1) for row in kept]
    assert len(kept) >= 78
    assert off.count(0.0) >= 52
    assert sum(one <= 1e-3 for one in off) >= 72


def test_nothing_emulated_is_among_what_was_measured() -> None:
    module = measure()
    assert not module.found(module.RESULTS, emulated=True)
    listed = module.cases(None)
    assert len({case.name for case in listed}) == len(listed)
    assert not any("a3b" in case.model for case in listed if case.of == "ranks")
