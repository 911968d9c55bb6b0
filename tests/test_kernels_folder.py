"""The folder ``kernels/`` has the name of a Hugging Face library, and is in nobody's way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code: str, *paths: Path, cwd: Path = ROOT) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_it_is_no_package() -> None:
    """A folder without ``__init__.py`` is a namespace: any installed package of the name goes before it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert run("import kernels; print(kernels.__file__)") == "None"


def test_an_installed_library_of_that_name_is_found_first(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("get_kernel = 'the real one'\n", encoding="utf-8")
    # behind the current folder and the checkout, as site-packages is
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.get_kernel)"
    assert run(code, ROOT) == "the real one"


@pytest.mark.slow
def test_transformers_and_bitsandbytes_work_from_the_root() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    code = """
import warnings
warnings.simplefilter("ignore")
from importlib.metadata import PackageNotFoundError, version
import bitsandbytes, torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
try:
    version("kernels")
except PackageNotFoundError:
    assert not is_kernels_available()
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=9, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
layer.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
model.set_submodule("model.layers.0.mlp.up_proj", layer)
ids = torch.ones(1, 5, dtype=torch.int64)
print(bool(model(input_ids=ids, labels=ids).loss > 0))
"""
    assert run(code) == "True"


def test_the_code_is_found_in_a_checkout() -> None:
    code = "import memplan.kernels.strips as strips, sys; print(strips.__file__, 'torch' in sys.modules)"
    assert run(code, ROOT, cwd=ROOT.parent).split() == [str(ROOT / "kernels" / "strips.py"), "False"]


@pytest.mark.slow
def test_without_triton_the_operators_run_in_plain_torch() -> None:
    pytest.importorskip("bitsandbytes")
    code = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["triton"] = None
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from memplan.kernels.launch import refusal
from memplan.kernels.nf4_dequantize import nf4_dequantize
packed, state = quantize_4bit(torch.randn(64, 64), quant_type="nf4")
assert torch.equal(nf4_dequantize(packed, state), dequantize_4bit(packed, state))
print(refusal(torch.device("cuda", 0)))
"""
    assert "which is not installed: run `pip install triton`" in run(code, ROOT)
