"""The verifier on a CPU: real training of small true-shaped models, and what it says of bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
    torch = pytest.importorskip("torch")
    for package in ("transformers", "peft", "bitsandbytes", "accelerate"):
        pytest.importorskip(package)
    from memplan.verify.made import Random, build

from conftest import Outcome
from small_specs import config

from memplan.asked.recipe import Recipe
from memplan.errors import MemplanError
from memplan.tape import Category, replay
from memplan.tape.diff import diff
from memplan.verify import attention, child, runner
from memplan.verify import train as training
from memplan.verify.campaign import fingerprint
from memplan.verify.checkpoint import Checkpoint
from memplan.verify.compare import compare
from memplan.verify.host import Host
from memplan.verify.job import Job, make_job, peak_bytes
from memplan.verify.measurement import Device, Measurement, OutOfMemory, Run, read
from memplan.verify.runner import RunDied, TimeIsUp, run_job

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' warnings are theirs

Memplan = Callable[..., Outcome]
CPU = torch.device("cpu")


def model_folder(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A folder with the config.json of a small model of two layers."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config(family, 2), **changes}), encoding="utf-8")
    return folder


def job_of(folder: Path, family: str = "llama", run: dict[str, Any] | None = None, **options: Any) -> Job:
    recipe = Recipe(trainer="peft", **{"batch_size": 2, "seq_len": 64, **options})
    return make_job(str(model_folder(folder / "model", family)), recipe, Run(**(run or {})), device="cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: threads that wait for one another cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"mode": "qlora"}),
        ("llama", {"mode": "qlora", "quant_type": "fp4", "double_quant": False, "use_dora": True}),
        ("qwen2", {"mode": "qlora", "kbit_prep": False, "gradient_accumulation_steps": 2}),
        ("llama", {"mode": "lora", "dtype": "float16", "lora_dropout": 0.1, "attn": "eager"}),
        ("mixtral", {"mode": "qlora", "autocast": True, "lora_dropout": 0.0}),
        ("gemma3", {"mode": "lora", "gradient_checkpointing": True, "seq_len": 120, "batch_size": 1}),
        ("mistral", {"mode": "full", "optimizer": "adamw_bnb_8bit", "seq_len": 110, "batch_size": 1}),
        ("llama-tied", {"mode": "full", "optimizer": "adafactor"}),
    ],
    ids=str,
)
def test_real_training_takes_what_the_plan_says(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    from memplan.predict.step import write_tape
    from memplan.verify.job import spec_of
    from memplan.verify.workspaces import without_workspaces

    job = job_of(tmp_path, family, **options)
    trained = training.train(job, Host(), lambda kind, value: None)
    plan = without_workspaces(write_tape(spec_of(job.model), job.recipe, folded=False))
    assert trained.tape is not None
    peak = replay(trained.tape)
    assert peak.allocated_bytes == replay(plan).allocated_bytes
    assert trained.steps[-1].allocated_bytes == peak.allocated_bytes
    assert diff(plan, trained.tape).equal
    assert trained.evidence.real, trained.evidence.doubts
    if options["mode"] == "full":  # 1 + 0.001 is 1 in bfloat16: the norms stay
        assert trained.evidence.changed_tensors == trained.evidence.trained_tensors - 5
    else:
        assert trained.evidence.changed_tensors == trained.evidence.trained_tensors
    assert trained.evidence.frozen_tensors > 0 or options["mode"] == "full"


@pytest.mark.parametrize("loss", ["chunked", "liger"])
def test_fused_losses_are_trained_on_a_gpu_by_the_plain_loop(tmp_path: Path, loss: str) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    with pytest.raises(MemplanError, match="need a GPU"):
        job_of(tmp_path, mode="lora", loss=loss)
    folder, recipe = (
        str(model_folder(tmp_path / "model", "llama")),
        Recipe(trainer="peft", mode="lora", loss=loss),
    )
    assert make_job(folder, recipe, Run(), device="cuda").recipe.loss == loss
    with pytest.raises(MemplanError, match="--loop memplan"):
        make_job(folder, recipe, Run(loop="trainer"), device="cuda")


def test_the_loss_of_an_older_transformers_is_trained_in_memplan_s_own_loop(tmp_path: Path) -> None:
    folder = str(model_folder(tmp_path / "model", "llama"))
    recipe = Recipe(trainer="peft", mode="lora", loss="shifted", seq_len=16)
    assert make_job(folder, recipe, Run(), device="cpu").recipe.loss == "shifted"
    with pytest.raises(MemplanError, match="no trainer's of today"):
        make_job(folder, recipe, Run(loop="trainer"), device="cpu")


def test_so_does_training_with_memplan_s_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # plain torch in place of Triton's interpreter, which takes ten times as long
    monkeypatch.setattr("memplan.kernels.launch.INTERPRETED", False)
    options = {"mode": "qlora", "kernels": "memplan", "kbit_prep": False, "seq_len": 20}
    test_real_training_takes_what_the_plan_says(tmp_path, "llama", options)


def test_a_trainers_step_is_what_is_planned_in_its_loop(tmp_path: Path) -> None:
    from memplan.verify.compare import compare
    from memplan.verify.trainer import train_with_trainer

    job = job_of(tmp_path, mode="qlora", run={"loop": "trainer"})
    measured = child.run(job)
    assert measured.outcome.kind == "trained", measured.outcome.why
    found = compare(measured)
    assert found.diff is not None
    assert found.diff.peak_only_a == () == found.diff.peak_only_b
    assert found.allocated.error == 0
    momentum = job_of(tmp_path, mode="lora", optimizer="sgd", momentum=0.9)
    with pytest.raises(MemplanError, match="no momentum"):
        train_with_trainer(momentum, Host(), lambda kind, value: None, [])


def test_the_first_step_is_not_the_steady_one(tmp_path: Path) -> None:
    # the optimizer's state is made at its end
    job = job_of(tmp_path, mode="full", dtype="bfloat16")
    first, second, third = training.train(job, Host(), lambda kind, value: None).steps
    assert first.resting_bytes == second.resting_bytes == third.resting_bytes
    assert first.allocated_bytes < second.allocated_bytes == third.allocated_bytes


def test_no_two_weights_are_there_in_16_bits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    job = job_of(tmp_path, mode="qlora")
    seen: list[int] = []
    quantise = Params4bit._quantize

    def watched(self: Any, device: Any) -> Any:
        model = models[0]
        plain = [
            layer.weight
            for layer in model.modules()
            if isinstance(layer, Linear4bit)
            and layer.weight.device.type != "meta"
            and not layer.weight.bnb_quantized
        ]
        seen.append(len(plain))
        return quantise(self, device)

    models: list[Any] = []
    from memplan.verify import made as module

    materialise = module.materialise
    monkeypatch.setattr(
        module, "materialise", lambda model, *rest: (models.append(model), materialise(model, *rest))
    )
    monkeypatch.setattr(Params4bit, "_quantize", watched)
    build(job.model.config, job.recipe, CPU, Random())
    assert seen == [1] * 14


def test_a_measurement_is_of_the_job_that_was_asked_for(tmp_path: Path) -> None:
    # by which --resume knows it again; transformers adds to the nested settings that it is given
    from memplan.verify.campaign import fingerprint

    scaling = {"rope_type": "linear", "factor": 2.0}
    folder = model_folder(tmp_path / "model", rope_scaling=scaling)
    job = make_job(str(folder), Recipe(trainer="peft", mode="lora", seq_len=16), Run(steps=2), device="cpu")
    measured = child.run(job)
    assert job.model.config["rope_scaling"] == scaling
    again = Measurement.model_validate_json(measured.model_dump_json())
    assert fingerprint("cpu", again) == fingerprint("cpu", job)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_values_is_pytorchs(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 17, 16, requires_grad=True) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), grad)
    with torch.no_grad():
        out, lse = attention.forward(q, k, v, None, 0.0, causal, None)
        mine = attention.backward(grad, q, k, v, None, 0.0, causal, None)
    assert torch.allclose(out, expected, atol=1e-5)
    assert lse.shape == (2, 4, 17)
    for own, theirs in zip(mine, gradients, strict=True):
        assert torch.allclose(own, theirs, atol=1e-5)


def test_a_checksum_sees_any_byte() -> None:
    tensor = torch.zeros(1003, dtype=torch.bfloat16)
    sums = {training.checksum(tensor)}
    for position in (0, 500, 1001, 1002):
        changed = tensor.clone()
        changed[position] = 1e-30
        sums.add(training.checksum(changed))
    # the same change at another place of eight bytes is the same sum, which is not what it is for
    assert len(sums) >= 3
    assert training.checksum(tensor.clone()) == training.checksum(tensor)


# -- weights from disk -------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny checkpoint as transformers writes one, in two files."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = model_folder(tmp_path / "checkpoint")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="3MB")
    model_folder(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_weights_of_a_checkpoint_are_the_models(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    job = make_job(str(checkpoint), Recipe(trainer="peft", mode="lora", seq_len=16), Run(), device="cpu")
    model = build(job.model.config, job.recipe, CPU, Checkpoint(checkpoint)).get_base_model()
    stored = {name: t for file in checkpoint.glob("*.safetensors") for name, t in load_file(file).items()}
    assert len(stored) == 21
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, stored[name.replace(".base_layer", "")]), name


def test_a_checkpoint_trains(checkpoint: Path) -> None:
    recipe = Recipe(trainer="peft", mode="qlora", seq_len=32)
    job = make_job(str(checkpoint), recipe, Run(), device="cpu", weights=str(checkpoint))
    trained = training.train(job, Host(), lambda kind, value: None)
    assert trained.evidence.real
    assert (
        trained.steps[-1].allocated_bytes == peak_bytes(job.model, job.recipe, looped=False) - 2 * 8_519_680
    )


def _spoil(folder: Path, how: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the checkpoint as one file, changed."""
    from safetensors.torch import load_file, save_file

    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    how(tensors)
    save_file(tensors, folder / "model.safetensors")


def _cut_short(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: _spoil(f, lambda t: t.pop(LAST)), f"lack 1 of the model's 21 tensors.* {LAST}"),
        (
            lambda f: _spoil(f, lambda t: t.update({LAST: torch.zeros(256, 639)})),
            r"has the shape \[256, 639\], but the configuration makes it \[256, 640\]",
        ),
        (_cut_short, "can't be read"),
        (lambda f: [file.unlink() for file in f.glob("*.safetensors*")], "has no safetensors"),
        (lambda f: next(f.glob("*.safetensors")).unlink(), "can't be read"),
        (
            lambda f: _spoil(f, lambda t: t.update({LAST + ".absmax": torch.zeros(1)})),
            "quantised already",
        ),
    ],
)
def test_bad_checkpoints(checkpoint: Path, spoil: Callable[[Path], Any], complaint: str) -> None:
    spoil(checkpoint)
    recipe = Recipe(trainer="peft", mode="qlora", seq_len=32)
    job = make_job(str(checkpoint), recipe, Run(), device="cpu", weights=str(checkpoint))
    with pytest.raises(MemplanError, match=complaint) as caught:
        training.train(job, Host(), lambda kind, value: None)
    assert "\n" not in str(caught.value)


# -- the command, with its child ---------------------------------------------------------------------------


def test_the_command_trains_and_agrees_to_the_byte(tmp_path: Path, memplan: Memplan) -> None:
    folder = model_folder(tmp_path / "small")
    out = tmp_path / "measured"
    asked = ("verify", folder, "--device", "cpu", "--layers", "1", "--seq-len", "64", "--out", out)
    outcome = memplan(*asked, "--mode", "qlora")
    assert outcome.status == 0
    assert "predicted and measured peaks are equal to the byte" in outcome.out
    assert "measured, CPU storages" in outcome.out
    assert "small (1 layer), qlora, 1 × 64" in outcome.out
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    (file,) = out.iterdir()
    assert f"wrote {file}" in outcome.err
    measured = read(file)
    assert measured.label == "measured, CPU storages"
    assert measured.device.kind == "cpu"
    assert measured.evidence is not None
    assert measured.evidence.real
    assert measured.libraries["torch"] == version("torch")
    assert memplan("diff", file, file).status == 0
    report = memplan("report", out)
    assert report.status == 0
    assert "No measurement on a GPU is among these" in report.out
    assert "median 0 %, worst 0 %" in report.out


def test_a_trainers_file_is_trained_as_it_says_and_kept_only_where_told(
    tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "small")
    text = "base_model: ./small\nadapter: lora\nlora_r: 4\nlora_target_linear: true\nmicro_batch_size: 2\n"
    Path("run.yaml").write_text(f"{text}sequence_len: 64\noptimizer: adamw_torch\nbf16: true\n")
    before = sorted(tmp_path.iterdir())
    outcome = memplan("verify", "run.yaml", "--device", "cpu", "--layers", "1")
    assert outcome.status == 0, outcome.err
    assert "small (1 layer), lora, 2 × 64" in outcome.out
    assert "predicted and measured peaks are equal to the byte" in outcome.out
    assert "read from run.yaml (axolotl): " in outcome.err
    assert "as a guess; --out FOLDER would keep the measurement" in outcome.err
    assert sorted(tmp_path.iterdir()) == before


def test_no_cuda_is_one_sentence(tmp_path: Path, memplan: Memplan) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    outcome = memplan("verify", model_folder(tmp_path / "small"), "--out", tmp_path / "out")
    assert (outcome.status, outcome.out) == (2, "")
    assert "--device cpu" in outcome.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--steps", "1"), "--steps must be at least 2"),
        (("--layers", "3"), "has 2 layers"),
        (("--optimizer", "paged_adamw_8bit"), "needs --device cuda"),
        (("--attn", "flash"), "runs on CUDA only"),
        (("--loss", "liger"), "need a GPU"),
        (("--cap", "no-such-card"), "unknown GPU"),
        (("--cap", "0GiB"), "leaves nothing"),
    ],
)
def test_what_cannot_be_run_is_said_before_it_is_begun(
    tmp_path: Path, memplan: Memplan, options: tuple[str, ...], complaint: str
) -> None:
    outcome = memplan("verify", model_folder(tmp_path / "small"), "--device", "cpu", *options)
    assert (outcome.status, outcome.out) == (2, "")
    assert complaint in outcome.err


def test_a_device_that_is_too_small_is_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path, mode="qlora").model_copy(update={"predicted_bytes": 1 << 60})
    with pytest.raises(MemplanError, match=r"the plan says that this run allocates .* or run it --anyway"):
        child.run(job)
    child._check_room(job.model_copy(update={"anyway": True}), child.device_of(job))


def test_a_text_that_is_too_short_or_not_there(tmp_path: Path) -> None:
    job = job_of(tmp_path, run={"text": str(tmp_path / "none.txt")})
    with pytest.raises(MemplanError, match="can't be read"):
        training.make_batch(job)
    (tmp_path / "none.txt").write_text("word", encoding="utf-8")
    with pytest.raises(MemplanError, match="no tokenizer"):
        training.make_batch(job)


class Children:
    """The processes that the runner starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[subprocess.Popen[str]] = []
        popen = subprocess.Popen

        def start(*args: Any, **kwargs: Any) -> Any:
            self.started.append(popen(*args, **kwargs))
            return self.started[-1]

        monkeypatch.setattr(runner.subprocess, "Popen", start)


def test_an_interrupt_leaves_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch)

    def interrupt(kind: str, value: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job_of(tmp_path), tell=interrupt)
    (process,) = children.started
    assert process.returncode is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_being_told_to_end_leaves_no_child_and_no_folder(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    inherited = signal.signal(number, signal.SIG_DFL)  # who started the tests may have it ignored (nohup)
    try:
        with pytest.raises(SystemExit) as ended:
            run_job(job_of(tmp_path), tell=lambda kind, value: os.kill(os.getpid(), number))
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, inherited)
    assert ended.value.code == 128 + number
    assert children.started[0].returncode is not None
    assert not list(tmp_path.glob("memplan-verify-*"))


def test_a_signal_that_is_ignored_ends_nothing(tmp_path: Path) -> None:
    inherited = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        measured = run_job(job_of(tmp_path), tell=lambda kind, value: os.kill(os.getpid(), signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, inherited)
    assert measured.outcome.kind == "trained"


def test_a_result_that_can_t_be_written_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    # no file of the child may be larger than a byte, as on a full disk
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(limit, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    parsed = []
    parse = runner.parse
    monkeypatch.setattr(runner, "parse", lambda *given: parsed.append(given) or parse(*given))
    assert run_job(job_of(tmp_path)).outcome.kind == "trained"
    assert len(parsed) == 1


def test_nohup_stays_nohup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        told = []

        def hang_up(kind: str, value: Any) -> None:
            told.append(kind)
            os.kill(os.getpid(), signal.SIGHUP)

        assert run_job(job_of(tmp_path), tell=hang_up).outcome.kind == "trained"
        assert told
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("option", ["--learning-rate", "--timeout"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1", "1e999", "x"])
def test_numbers_that_are_none_are_refused_in_a_sentence(memplan: Memplan, option: str, value: str) -> None:
    outcome = memplan("verify", "qwen2.5-0.5b", "--device", "cpu", f"{option}={value}")
    assert (outcome.status, outcome.out) == (2, "")
    assert "must be a number above 0" in outcome.err
    assert "http" not in outcome.err


@pytest.mark.parametrize("seed", ["-1", str(1 << 63)])
def test_seeds_have_bounds(memplan: Memplan, seed: str) -> None:
    outcome = memplan("verify", "qwen2.5-0.5b", "--device", "cpu", f"--seed={seed}")
    assert (outcome.status, outcome.out) == (2, "")
    assert "whole number" in outcome.err


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch)
    began = time.monotonic()
    with pytest.raises(TimeIsUp):
        run_job(job_of(tmp_path), seconds=0.5)
    assert time.monotonic() - began < 8
    assert children.started[0].returncode is not None


def test_the_allocator_is_set_as_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in runner._environment(job_of(tmp_path))
    wanted = "expandable_segments:True"
    measured = run_job(job_of(tmp_path, alloc_conf=wanted))
    assert measured.run.settings["PYTORCH_ALLOC_CONF"] == wanted
    assert measured.run.settings["PYTORCH_CUDA_ALLOC_CONF"] == wanted
    # the shell's settings are no part of what makes a run the same
    job = job_of(tmp_path, alloc_conf=wanted)
    assert fingerprint("cpu", job) == fingerprint("cpu", measured)


def test_a_child_that_is_killed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch)

    def kill(kind: str, value: Any) -> None:
        os.kill(children.started[0].pid, signal.SIGKILL)

    with pytest.raises(RunDied, match=r"killed by SIGKILL \(did the host run out of memory\?\)"):
        run_job(job_of(tmp_path), tell=kill)


def test_a_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "memplan.verify.child", str(tmp_path / "result.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=runner._environment(job_of(tmp_path)),
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(job_of(tmp_path).model_dump_json() + "\n")
    process.stdin.close()  # what the end of the parent does
    assert process.wait(30) == 1
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("safe_path", [True, False])  # Python 3.10 does not know it
def test_code_in_the_current_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe_path: bool
) -> None:
    for name in ("json", "torch", "memplan", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path / 'mine'}:")
    settings = runner._environment(job_of(tmp_path))
    assert settings["PYTHONPATH"].split(os.pathsep) == [
        str(Path(runner.__file__).parents[2]),
        str(tmp_path / "mine"),
    ]
    if not safe_path:
        del settings["PYTHONSAFEPATH"]
    done = subprocess.run(
        [sys.executable, "-c", runner._CHILD, str(tmp_path / "result.json")],
        input="no job\n",
        capture_output=True,
        env=settings,
        text=True,
        check=False,
    )
    assert "validation error for Job" in done.stderr  # it came as far as to read its job
    assert not (tmp_path / "ran").exists()


def test_what_fails_while_it_trains_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path)
    monkeypatch.setattr(training, "make_optimizer", lambda *_: 1 / 0)
    measured = child.run(job)
    assert measured.outcome.kind == "failed"
    assert re.search(r"^division by zero \(test_verify.py:\d+\)", measured.outcome.why or "")
    assert measured.tape is None
    assert measured.steady is None


class NoRoom(Host):
    """A card that is full in the second step."""

    def step(self, number: int, *rest: Any) -> Any:
        if number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().step(number, *rest)

    def out_of_memory(self, error: BaseException) -> OutOfMemory:
        return OutOfMemory(step=2, phase="backward", allocated_bytes=1, reserved_bytes=2, message=str(error))


def test_a_loss_that_is_no_number_is_a_doubt_and_what_was_counted_is_kept(tmp_path: Path) -> None:
    measured = child.run(job_of(tmp_path, run={"learning_rate": 1e30}, mode="full"))
    assert measured.outcome.kind == "trained"
    assert "the loss is not finite" in (measured.outcome.why or "")
    assert measured.tape is not None
    found = compare(Measurement.model_validate_json(measured.model_dump_json()))
    assert found.allocated.error == 0


def test_a_full_disk_is_found_before_or_leaves_the_comparison(
    tmp_path: Path, memplan: Memplan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memplan.verify import measurement

    (tmp_path / "file").write_text("", encoding="utf-8")
    folder = model_folder(tmp_path)
    ask = ("verify", folder, "--device", "cpu", "--seq-len", 16, "--out")
    began = memplan(*ask, tmp_path / "file")
    assert (began.status, began.out) == (2, "")
    assert "can't be written" in began.err
    measured = child.run(job_of(tmp_path))
    monkeypatch.setattr(runner, "run_job", lambda *_, **__: measured)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measurement, "_place", full)
    ended = memplan(*ask, tmp_path / "m")
    assert ended.status == 2
    assert "No space left" in ended.err
    assert "equal to the byte" in ended.out
    assert list((tmp_path / "m").iterdir()) == []


def test_out_of_memory_is_a_result_with_the_steps_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path).model_copy(update={"device": "cuda"})
    here = child.device_of(job_of(tmp_path))
    monkeypatch.setattr(child, "_backend", lambda job: NoRoom())
    monkeypatch.setattr(child, "device_of", lambda job: here)
    monkeypatch.setattr(child, "_check_room", lambda job, device: None)
    monkeypatch.setattr(child, "_check_bitsandbytes", lambda job, device: None)
    measured = child.run(job)
    assert measured.outcome.kind == "out of memory"
    assert measured.outcome.event is not None
    assert (measured.outcome.event.step, measured.outcome.event.phase) == (2, "backward")
    assert [step.number for step in measured.steps] == [1]
    assert measured.steady is None
    assert child._out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not child._out_of_memory(RuntimeError("shapes differ"))


def test_a_card_that_others_have_filled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path).model_copy(update={"device": "cuda", "predicted_bytes": 3 << 30})
    card = Device(kind="cuda", name="Card of a test", capability=(8, 0), total_bytes=8 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    with pytest.raises(MemplanError, match=r"3.00 GiB, and on this Card of a test there are 2.00 GiB free"):
        child._check_room(job, card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 << 30, 8 << 30))
    child._check_room(job, card)
    capped = job.model_copy(update={"run": Run(cap_bytes=1 << 30, cap_name="1 GiB")})
    with pytest.raises(MemplanError, match=r"under the cap 1 GiB there are 1.00 GiB free"):
        child._check_room(capped, card)


def test_bitsandbytes_without_a_backend_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Method 'cquantize_blockwise' not available in CPU-only version")

    child._check_bitsandbytes(job_of(tmp_path, mode="qlora"), CPU)
    monkeypatch.setattr(functional, "quantize_4bit", broken)
    for options in ({"mode": "qlora"}, {"mode": "full", "optimizer": "lion_8bit"}):
        with pytest.raises(MemplanError, match=r"bitsandbytes .* has no working backend for cpu here"):
            child._check_bitsandbytes(job_of(tmp_path, **options), CPU)
    child._check_bitsandbytes(job_of(tmp_path, mode="lora"), CPU)


def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from memplan.verify import driver

    asked: list[Any] = []
    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=5 << 30)
    other = SimpleNamespace(pid=-1, usedGpuMemory=1 << 30)
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetHandleByIndex=lambda index: asked.append(index),
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid),
        nvmlMemory_v2=0x02000028,
        # what the driver keeps for itself is used in version 1 alone
        nvmlDeviceGetMemoryInfo=lambda handle, version=None: SimpleNamespace(
            used=(6 << 30) + (0 if version == 0x02000028 else 1 << 29)
        ),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [other, mine],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (driver.version(), driver.used_bytes(), driver.process_bytes()) == ("580.1", 6 << 30, 5 << 30)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,3")
    driver.used_bytes(0)
    driver.used_bytes(1)
    assert asked == [0, 0, "GPU-abc", 3]
    del nvml.nvmlMemory_v2  # an old nvidia-ml-py: nvidia-smi says the same in MiB
    monkeypatch.setattr(driver, "_smi", lambda field, device: {"memory.used": "6144"}[field])
    assert driver.used_bytes() == 6 << 30
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(driver.shutil, "which", lambda name: None)
    assert (driver.version(), driver.used_bytes(), driver.process_bytes()) == (None, None, None)


def test_sft_trainer_where_trl_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from memplan.verify.compare import compare

    options = {"mode": "qlora", "loss": "chunked", "adapter_dtype": "bfloat16"}
    measured = child.run(job_of(tmp_path, run={"loop": "sft"}, **options))
    assert measured.outcome.kind == "trained", measured.outcome.why
    found = compare(measured)
    for category in (Category.WEIGHTS, Category.ADAPTERS, Category.OPTIMIZER_STATE):
        assert found.categories[category].error == 0, category
