"""docs/tracing.md: its example runs, on fake tensors and on real ones, and it lists every stand-in."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from memplan import libraries

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in libraries.TESTED:
        pytest.importorskip(package)
    from memplan.trace import standins

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' warnings are theirs

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "tracing.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLE, "docs/tracing.md", "exec"), {})
    printed = capsys.readouterr().out
    # logits of 8 x 256 tokens, their log-softmax, and its gradient, all in fp32
    logits = 8 * 256 * 32000 * 4
    found = re.match(r"([\d,]+) bytes in backward, at (\w+)", printed)
    assert found and found[2] == "_log_softmax_backward_data"
    assert int(found[1].replace(",", "")) > 3 * logits
    weights = 4 * (32000 * 512 + 512 * 2048 + 2048 + 2048 * 32000 + 32000)
    assert f"{'weights':20}{weights:>15,}\n" in printed


def test_the_example_runs_on_real_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    small = EXAMPLE.replace("with FakeTensorMode():", "if True:").replace("32000", "500")
    exec(compile(small, "docs/tracing.md", "exec"), {})
    weights = 4 * (500 * 512 + 512 * 2048 + 2048 + 2048 * 500)
    bias = -(-4 * 500 // 512) * 512
    assert f"{'weights':20}{weights + bias:>15,}\n" in capsys.readouterr().out


def test_every_stand_in_is_listed() -> None:
    table = {
        name for line in PAGE.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)
    }
    assert {operator._schema.name.partition("::")[2] for operator in standins.OPERATORS} <= table
    modules = {function.__module__.rpartition(".")[2] for function in standins.OPERATORS.values()}
    assert modules <= table


@pytest.mark.parametrize("page", ["tracing.md", "architectures.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (DOCS / page).read_text(encoding="utf-8")):
        assert (DOCS / target).exists(), target
