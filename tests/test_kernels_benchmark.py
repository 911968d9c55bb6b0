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
    for part in ("nf4_dequantize", "nf4_quantize", "nf4_linear", "nf4_lora_linear", "step"):
        assert f"\n{part} rehearsal" in process.stdout
    assert "NOT EQUAL" not in process.stdout
    assert sorted(RESULTS.glob("*")) == before


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
