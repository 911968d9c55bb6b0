"""``memplan trace``: the plan's answer from the tracer, and what it says when it can't give one."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from small_specs import config

from memplan import libraries, losses, rooms
from memplan.asked.recipe import Recipe
from memplan.device.playback import simulate
from memplan.planning.plan import Plan, plan
from memplan.planning.traced import layers, trace_plan
from memplan.tape.file import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in libraries.TESTED:
        pytest.importorskip(package)
    import memplan.trace

assert memplan.trace  # imported here so that the libraries' deprecations are not this module's errors
pytestmark = pytest.mark.filterwarnings("default")

Run = Callable[..., Outcome]

FALCON = {
    "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_kv_heads": 2, "vocab_size": 999,
    "new_decoder_architecture": True,
}  # fmt: skip
SHORT = ("--seq-len", "64")


@pytest.fixture(autouse=True)
def tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed here; the test of the warning sets its own."""
    numbers = {name: f"{number}.0" for name, number in libraries.TESTED.items()}
    monkeypatch.setattr(libraries, "installed", lambda loss="standard": numbers)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return written(tmp_path, config("llama", 3))


def written(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# -- answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_the_trace_answers_as_the_plan_does(mode: str, memplan: Run, llama: Path) -> None:
    question = (llama, "--mode", mode, *SHORT, "--gpu", "4090", "--json")
    traced, planned = memplan("trace", *question), memplan("plan", *question)
    assert (traced.status, traced.err) == (0, "")
    a, b = json.loads(traced.out), json.loads(planned.out)
    assert (a.pop("provenance"), b.pop("provenance")) == ("traced", "predicted")
    assert set(a.pop("libraries")) == set(libraries.TESTED)
    assert b.pop("libraries") == {}
    peaks = a.pop("peak"), b.pop("peak")
    for key in ("allocated_bytes", "phase", "operation", "layer"):
        assert peaks[0][key] == peaks[1][key]
    a.pop("summary")  # a few tensors lie in other categories
    b.pop("summary")
    assert a.pop("evaluation") is None  # which is predicted only
    assert b.pop("evaluation")["batch_size"] == 8
    assert a.pop("slip") is None
    slip = b.pop("slip")
    assert (slip is None) is (mode == "full")
    assert a == b
    assert Plan.model_validate_json(traced.out).provenance == "traced"


# wide enough that blocks are split and left over, as small models' are not
WIDE = {"hidden_size": 2048, "intermediate_size": 4096, "head_dim": 128, "vocab_size": 32000}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"trainer": "trl", "mode": "qlora"}),  # whose adapters are cast back to bf16
        ("llama", {"trainer": "peft", "mode": "qlora", "modules_to_save": ("lm_head",)}),
        ("llama", {"trainer": "llama_factory", "mode": "lora"}),  # loaded onto the card
        (
            "qwen3_moe",
            {"trainer": "trl", "mode": "lora", "target_modules": "attention"},
        ),  # experts are merged
        ("mixtral", {"trainer": "peft", "mode": "qlora", "target_modules": "attention"}),  # experts are cast
        ("gemma2", {"trainer": "peft", "mode": "qlora", "double_quant": False}),
        ("stored", {"trainer": "peft", "mode": "qlora"}),  # in 4 bits already
    ],
)
def test_a_trace_reserves_what_the_plan_does_for_loading_is_played_in_both(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
           "bnb_4bit_compute_dtype": "bfloat16"}  # fmt: skip
    stored = {"quantization_config": how} if family == "stored" else {}
    path = written(tmp_path, {**config("llama" if stored else family, 3), **WIDE, **stored})
    recipe = Recipe(**options, seq_len=64)
    traced, tape = trace_plan(path, recipe)
    assert traced.allocator == plan(path, recipe).allocator
    assert traced.allocator.loading == "predicted"
    # which says something: begun with what rests, the run would take another amount
    assert simulate(tape).reserved != traced.allocator.reserved_bytes


def test_the_loading_of_an_architecture_without_a_plan_is_played_too(tmp_path: Path) -> None:
    path = written(tmp_path, {**FALCON, "hidden_size": 2048, "vocab_size": 65024, "num_attention_heads": 32})
    recipe = Recipe(trainer="peft", mode="qlora", target_modules=["query_key_value"], seq_len=64)
    traced, tape = trace_plan(path, recipe)
    assert traced.allocator.loading == "predicted"
    assert simulate(tape).reserved != traced.allocator.reserved_bytes


def test_the_report_says_traced_and_by_what(
    memplan: Run, llama: Path, golden: Callable[[str, str], None]
) -> None:
    outcome = memplan("trace", llama, "--mode", "qlora", *SHORT, "--gpu", "4090")
    assert "GiB allocated (traced)" in outcome.out
    assert re.findall(".*predicted.*", outcome.out) == [
        "  loading predicted, which moves what is reserved only"
    ]
    name = llama.parent.name
    golden("trace.txt", outcome.out.replace(name, "small-llama"))


def test_trace_is_an_option_of_the_plan(memplan: Run, llama: Path) -> None:
    question = (llama, "--mode", "lora", *SHORT)
    assert memplan(*question, "--trace") == memplan("trace", *question)


def test_the_tape_is_kept(memplan: Run, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "tape.json.gz"
    assert memplan("trace", llama, "--mode", "lora", *SHORT, "--tape", path).status == 0
    tape, info = load(path)
    assert tape.provenance == "traced"
    assert (info.recipe["mode"], info.recipe["seq_len"]) == ("lora", 64)
    assert set(info.libraries) == set(libraries.TESTED)
    assert memplan("diff", f"plan:{llama}", path, "--mode", "lora", *SHORT).status == 0
    assert memplan("diff", f"trace:{llama}", path, "--mode", "lora", *SHORT).status == 0
    assert memplan("diff", f"plan:{llama}", path, "--mode", "lora", *SHORT, "--r", "4").status == 1


def test_a_registered_model_is_traced_by_its_alias(memplan: Run) -> None:
    outcome = memplan("trace", "smollm2-135m", "--mode", "lora", *SHORT, "--json")
    document = json.loads(outcome.out)
    assert (outcome.status, document["model"]["hub_id"]) == (0, "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_gemma_2_is_eager_in_both(memplan: Run, tmp_path: Path) -> None:
    path = written(tmp_path, config("gemma2", 2))
    document = json.loads(memplan("trace", path, "--mode", "lora", *SHORT, "--json").out)
    assert document["recipe"]["attn"] == "eager"
    assert "eager" in memplan("trace", path, "--attn", "sdpa").err


# -- an architecture without a predicted plan ----------------------------------------------------------------


def test_an_unknown_architecture_is_offered_a_trace(memplan: Run, tmp_path: Path) -> None:
    path = written(tmp_path, FALCON)
    outcome = memplan(path, "--mode", "lora")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert "FalconForCausalLM" in outcome.err and "--trace" in outcome.err
    traced = memplan(path, "--mode", "lora", *SHORT, "--trace")
    assert (traced.status, traced.err) == (0, "")
    assert "FalconForCausalLM" in traced.out and "GiB allocated (traced)" in traced.out


def test_an_unknown_activation_is_offered_one_too(memplan: Run, tmp_path: Path) -> None:
    path = written(tmp_path, {**config("llama", 2), "hidden_act": "relu"})
    assert "--trace" in memplan(path).err
    assert memplan(path, *SHORT, "--trace").status == 0


# -- what goes wrong -----------------------------------------------------------------------------------------

BAD = {
    "unknown model type": ({"model_type": "internlm2"}, (), "no model of the type 'internlm2'"),
    "its own code": ({"model_type": "internlm2", "auto_map": {}}, (), "no code that comes with a model"),
    "no model type": ({"hidden_size": 64}, (), "model_type"),
    "no language model": ({"model_type": "vit"}, (), "no causal language model"),
    "a bad value": ({**FALCON, "hidden_size": "many"}, (), "falcon"),
    "heads don't divide": ({**FALCON, "num_attention_heads": 7}, (), "can't trace this model"),
    "no such target": (FALCON, ("--mode", "lora", "--target-modules", "q_proj"), "q_proj"),
    "a list": ([1], (), "JSON object"),
    "fused loss": (FALCON, ("--loss", "liger"), "standard"),
    "rank 0": (FALCON, ("--r", "0"), "r"),
    "unknown card": (FALCON, ("--gpu", "a600"), "a6000"),
    "unwritable tape": (FALCON, (*SHORT, "--tape", "no/such/tape.json"), "no/such/tape.json"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_traced_is_one_sentence(kind: str, memplan: Run, tmp_path: Path) -> None:
    content, options, fragment = BAD[kind]
    outcome = memplan("trace", written(tmp_path, content), *options)  # type: ignore[arg-type]
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("memplan: ") and outcome.err.count("\n") == 1
    assert fragment in outcome.err
    assert "Traceback" not in outcome.err


def test_what_fails_is_named_with_module_and_phase(memplan: Run, tmp_path: Path) -> None:
    # PEFT's linear layer can't stand around Llama 4's router, which returns a tuple
    llama4 = {
        "model_type": "llama4_text", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1,
        "intermediate_size_mlp": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
        "num_local_experts": 4, "vocab_size": 999,
    }  # fmt: skip
    outcome = memplan("trace", written(tmp_path, llama4), "--mode", "lora", *SHORT)
    assert outcome.status == 2
    assert "in model.layers.0.feed_forward.router (forward): AttributeError" in outcome.err


def test_an_untested_version_is_named(memplan: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {name: f"{number}.0" for name, number in libraries.TESTED.items()} | {"transformers": "5.1.2"}
    monkeypatch.setattr(libraries, "installed", lambda loss="standard": numbers)
    outcome = memplan("trace", llama, *SHORT)
    assert outcome.status == 0
    assert outcome.err.startswith("memplan: warning: transformers 5.1.2 is not the version")
    assert outcome.err.count("\n") == 1


def test_versions() -> None:
    assert libraries.untested({"torch": "2.13.0+cpu", "peft": "0.21.9"}) == []
    assert len(libraries.untested({"torch": "2.12.1", "peft": "0.22.0"})) == 2


def test_tested_versions_are_the_pinned_ones() -> None:
    pins = (Path(__file__).parent.parent / "constraints.txt").read_text(encoding="utf-8")
    others = [losses.find(name).library for name in rooms.names("losses")]
    found = {one.name.replace("-", "_"): one.tested for one in others if one is not None}
    for name, number in (libraries.TESTED | found).items():
        assert re.search(rf"^{name}=={re.escape(number)}\.", pins, re.MULTILINE), name


def test_a_missing_extra_is_one_command(memplan: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name in ("torch", "peft") else object())
    outcome = memplan("trace", llama)
    assert (outcome.status, outcome.out) == (2, "")
    assert "torch and peft, which are not installed: run `pip install torch peft`" in outcome.err


@pytest.mark.parametrize(("loss", "package"), [("chunked", "trl"), ("liger", "liger-kernel")])
def test_a_loss_of_a_missing_library_is_one_command(
    loss: str, package: str, memplan: Run, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = package.replace("-", "_")
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == module else object())
    outcome = memplan("trace", llama, "--loss", loss)
    assert (outcome.status, outcome.out) == (2, "")
    assert f"needs {package}, which is not installed: run `pip install {package}`" in outcome.err
    assert outcome.err.count("\n") == 1


def test_without_the_extra_nothing_else_is_asked_for(llama: Path) -> None:
    # in a process where torch can't be imported: the sentence, not a traceback
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from memplan.cli import main; sys.exit(main(['trace', sys.argv[1]]))"
    )
    process = subprocess.run([sys.executable, "-c", code, llama], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "pip install torch" in process.stderr
    assert process.stderr.count("\n") == 1


def test_layers_are_counted_by_any_name() -> None:
    assert [layers({name: 4}) for name in ("num_hidden_layers", "n_layer", "n_layers", "layers")] == [
        4,
        4,
        4,
        None,
    ]


@pytest.mark.slow
def test_progress_is_shown_in_a_terminal_only(llama: Path) -> None:
    # standard error is a terminal, standard output is not
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "memplan", "trace", llama, *SHORT],
        stdout=subprocess.PIPE,
        stderr=writer,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(writer)
    seen = b""
    while True:
        try:
            chunk = os.read(reader, 4096)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    out, _ = process.communicate()
    os.close(reader)
    assert process.returncode == 0
    assert b"building the model" in seen
    assert b"\x1b" not in out and b"GiB allocated (traced)" in out
