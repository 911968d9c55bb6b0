"""Public reports of people's runs against what memplan says (benchmarks/reports.py), and the page of it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from programs import load

pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
COMPARISON: dict[str, Any] = json.loads((ROOT / "data" / "reports_comparison.json").read_text("utf-8"))
RUNS = [
    pytest.param(number, place, id=f"{report['source'].partition(',')[0]} {run['about']}".strip())
    for number, report in enumerate(COMPARISON["reports"])
    for place, run in enumerate(report["runs"])
]
UNSLOTH = "docs.unsloth.ai, benchmarks, longest context, column of Hugging Face with FlashAttention 2"
# Whose answer is of something else than what was reported: each has its reason in data/reports.json.
INCOMPARABLE = {
    UNSLOTH: ["8 GB", "12 GB", "16 GB", "24 GB", "40 GB", "48 GB", "80 GB"],
    "foundation-model-stack/fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv, accelerated-peft-bnb": [
        ""
    ],
    "axolotl-ai-cloud/axolotl, docs/expert_quantization.qmd, examples/glm4.7-flash/qlora.yaml": [
        "experts in 16 bits"
    ],
    "hiyouga/LlamaFactory#4026": ["as it was configured"],
}


@cache
def script(folder: str) -> ModuleType:
    return load(f"{folder}_reports", ROOT / folder / "reports.py")


def entry(number: int, place: int) -> dict[str, Any]:
    found: dict[str, Any] = COMPARISON["reports"][number]["runs"][place]
    return found


def test_all_eighteen_reports_are_in_the_comparison() -> None:
    reports = script("benchmarks").reports()
    assert len(reports) == 18
    for report, compared in zip(reports, COMPARISON["reports"], strict=True):
        assert [report["source"], report["setup"]] == [compared["source"], compared["setup"]]
        assert [run["asks"] for run in report["runs"]] == [run["asks"] for run in compared["runs"]]


@pytest.mark.parametrize(("number", "place"), RUNS)
def test_the_comparison_is_what_memplan_says_now(
    number: int, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of a prediction changes this page: it is renewed by hand, so that somebody reads it."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    benchmark = script("benchmarks")
    told = benchmark.compare(benchmark.reports()[number]["runs"][place])
    assert entry(number, place) == told, "run benchmarks/reports.py and docs/generate.py"


@pytest.mark.parametrize(("number", "place"), RUNS)
def test_an_answer_is_within_three_percent_or_has_its_verdict_or_a_reason(number: int, place: int) -> None:
    run, source = entry(number, place), COMPARISON["reports"][number]["source"]
    if run["status"] == "refused":
        assert run["exit_status"] == 2
        assert run["reason"] and "words" in run["reported"]
        assert "a bug in memplan" not in run["answer"] and "\n" not in run["answer"]
        return
    assert run["exit_status"] in (0, 1)
    assert run["status"] in ("agrees", "not comparable")
    assert (run["status"] == "not comparable") == (run["about"] in INCOMPARABLE.get(source, []))
    assert bool(run["reason"]) == (run["status"] == "not comparable")
    if run["status"] == "agrees":
        assert abs(run["answer"].get("error_percent", 0.0)) <= 3.0
        if "verdict" in run["reported"]:
            runs_out = run["reported"]["verdict"] == "runs out"
            if run["answer"]["verdict"] == "depends on the card":
                assert "GB" in run["asks"] and run["answer"]["gets_through_on"]
            else:
                assert (run["answer"]["verdict"] == "runs out") == runs_out


def test_unsloth_s_table_is_a_straight_line() -> None:
    """So that it is of no runs: each row's tokens, but for rounding, follow from two others'."""
    (report,) = [one for one in COMPARISON["reports"] if one["source"] == UNSLOTH]
    points = [(int(run["about"].split()[0]), run["reported"]["tokens"]) for run in report["runs"]]
    seen = [(size, tokens) for size, tokens in points if tokens]
    (first, low), (last, high) = seen[0], seen[-1]
    slope = (high - low) / (last - first)
    assert all(abs(low + slope * (size - first) - tokens) <= 1 for size, tokens in seen)


def test_no_author_says_what_no_trainer_asks_for() -> None:
    """Nothing that would set memplan to a report: dtypes of adapters and upcasts are the trainers' matter."""
    for report in script("benchmarks").reports():
        for run in report["runs"]:
            words = run["asks"].split()
            assert not {"--kbit-prep", "--no-kbit-prep", "--adapter-dtype", "--autocast", "--loss"} & {*words}
            assert {"FILE", "--trainer"} & {*words} or "config" in run


def test_the_page_has_every_run_and_every_reason() -> None:
    section = script("docs").section()
    assert section.startswith("## Against people's reports\n")
    for report in COMPARISON["reports"]:
        assert f"| {report['source']} |" in section
        for run in report["runs"]:
            assert run["about"] in section and run["reason"] in section
