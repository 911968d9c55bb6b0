"""benchmarks/kernels.py can be rehearsed without a GPU, keeps nothing then, and docs/kernels.md reads what it
writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from nf4_weights import one_thread

assert one_thread
for package in ("torch", "triton", "transformers", "peft", "bitsandbytes"):
    pytest.importorskip(package)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "data" / "measurements" / "kernels"


def load(name: str, path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_rehearsal_goes_through_all_parts_and_keeps_nothing() -> None:
    before = sorted(RESULTS.glob("*"))
    process = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "kernels.py", "--rehearse"],
        capture_output=True, text=True, check=False, env={"PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.startswith("Rehearsal on a CPU") and "forgotten" in process.stdout
    for part in ("nf4_dequantize", "step_8b", "nf4_linear", "step_70b", "nf4_quantize", "nf4_lora_linear"):
        assert f"\n{part} rehearsal" in process.stdout
    assert "NOT EQUAL" not in process.stdout
    assert sorted(RESULTS.glob("*")) == before


def test_a_run_that_has_no_time_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written after every case; a part that would overrun its share is cut short, and said to be."""
    benchmark = load("kernels_benchmark", ROOT / "benchmarks" / "kernels.py")
    clock = iter(range(1000))
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: next(clock))

    def cases(_: object) -> object:
        for number in range(9):
            yield {"case": {"number": number}, "times": {}}

    monkeypatch.setattr(benchmark, "PARTS", dict.fromkeys(benchmark.PARTS, cases))
    monkeypatch.setattr(benchmark, "ceilings", lambda _: {})
    kept: list[int] = []
    bench = benchmark.Bench("cpu", 1)
    record = benchmark.run(
        list(benchmark.PARTS), bench, seconds=40, keep=lambda record: kept.append(len(record["results"]))
    )
    found = [result["part"] for result in record["results"]]
    assert list(dict.fromkeys(found)) == list(benchmark.PARTS)  # each has a case, however little time
    short = {part for part in found if found.count(part) < 9}
    assert short and short <= set(record["cut_short"])
    assert kept == [*range(1, len(found) + 1), len(found)]
    alone = benchmark.run(["step_8b"], bench, seconds=2)
    assert alone["cut_short"] == ["step_8b"] and not kept[len(found) + 1 :]


def test_rounds_end_where_they_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load("kernels_benchmark", ROOT / "benchmarks" / "kernels.py")
    clock = iter(range(1000))
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: next(clock))
    assert len(list(benchmark.Bench("cpu", 30).turns(100.0))) == 30
    assert len(list(benchmark.Bench("cpu", 30).turns(0.0))) == benchmark.LEAST_ROUNDS
    assert len(list(benchmark.Bench("cpu", 30).turns(0.0, 3))) == 3
    assert len(list(benchmark.Bench("cpu", 2).turns(0.0))) == 2
    spread = benchmark.spread([3.0, 1.0, 2.0, 5.0, 4.0])
    assert spread["median_us"] == 3 and 1 <= spread["p10_us"] <= spread["p90_us"] <= 5


def test_no_rehearsal_is_among_the_results() -> None:
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert "capability" in record["device"] and "CPU" not in record["device"]["name"]


def test_the_page_reads_what_the_benchmark_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    from memplan.kernels import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)  # plain torch is quicker
    benchmark = load("kernels_benchmark", ROOT / "benchmarks" / "kernels.py")
    page = load("kernels_page", ROOT / "docs" / "kernels_page.py")
    record = benchmark.run(["nf4_dequantize", "nf4_linear"], benchmark.Bench("cpu", 2))
    text = page.measured([json.loads(json.dumps(record))])
    assert "a rehearsal, nothing is measured" in text
    assert "#### nf4_dequantize" in text and "#### nf4_linear" in text
    assert text.count("| rehearsal up_proj [192, 64]") == 2 + 2
    assert "Not yet measured" in page.measured([])
