"""What planning imports: never torch or anything that needs it, and nothing at all before it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FORBIDDEN = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "huggingface_hub")

REFUSE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise AssertionError(f"the planning path imports {{name}}")

sys.meta_path.insert(0, Refuse())
"""


def run(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["llama-70b", "--mode", "qlora", "--r", "8"],
        ["llama-3.2-1b", "--mode", "full", "--json"],
        ["llama-3.2-1b", "--timeline"],
        ["llama-3.2-1b", "--html", "/dev/null", "--trace-json", "/dev/stdout"],
        ["llama-3.2-1b", "--snapshot", "/dev/null"],
        ["compare", "llama-3.2-1b"],
        ["compare", "llama-3.2-1b", "--kernels", "memplan"],
        ["compare", "llama-3.2-1b", "qwen2.5-0.5b", "--sweep", "r=4,8"],
        ["frontier", "llama-3.2-1b", "--gpu", "t4", "--modes", "lora", "--batch-sizes", "4"],
        ["llama-3.2-1b", "--qlora", "--lora_r", "4", "--bf16"],
        ["fit", "llama-3.2-1b", "--gpu", "h100"],
        ["diff", "plan:llama-3.2-1b", "plan:llama-3.2-1b", "--mode", "lora"],
        ["report"],
        ["models"],
        ["gpus"],
        ["completion", "bash"],
    ],
    ids=" ".join,
)
def test_commands_need_no_torch(arguments: list[str]) -> None:
    assert run(f"{REFUSE}\nfrom memplan.cli import main\nassert main({arguments!r}) == 0")


def test_listing_a_campaign_needs_no_torch() -> None:
    pytest.importorskip("yaml")
    arguments = ["campaign", str(ROOT / "benchmarks" / "campaign_smoke.yaml"), "--dry-run"]
    run(f"{REFUSE}\nfrom memplan.cli import main\nassert main({arguments!r}) == 0")


def test_the_python_api_needs_no_torch() -> None:
    code = "from memplan import Recipe, plan; print(plan('llama-3.2-1b', Recipe(mode='lora')).peak.phase)"
    assert run(f"{REFUSE}\n{code}").strip() in ("forward", "backward", "optimizer")


def test_the_guard_guards() -> None:
    process = subprocess.run(
        [sys.executable, "-c", f"{REFUSE}\nimport torch"], capture_output=True, text=True, check=False
    )
    assert "the planning path imports torch" in process.stderr


def test_imports_follow_the_arrows() -> None:
    """The contract is in pyproject.toml; imports inside functions count."""
    code = "from importlinter.cli import lint_imports\nraise SystemExit(lint_imports(no_cache=True))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr


def test_importing_memplan_is_lazy() -> None:
    loaded = run("import sys, memplan; print(*sys.modules)").split()
    assert [name for name in loaded if name.startswith("memplan")] == ["memplan"]
    assert not {"pydantic", "rich", "argparse", "json"} & set(loaded)


def test_importing_memplan_takes_less_than_30_ms() -> None:
    code = "import time; start = time.perf_counter(); import memplan; print(time.perf_counter() - start)"
    # The least of some: what else the machine does can only add to it.
    assert min(float(run(code)) for _ in range(5)) < 0.030


def test_public_names_are_there() -> None:
    run("import memplan\nfor name in memplan.__all__: getattr(memplan, name)")
