"""Several processes that train together on a CPU, with accelerate's real FSDP2 and DDP over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
    torch = pytest.importorskip("torch")
    for package in ("transformers", "peft", "bitsandbytes", "accelerate"):
        pytest.importorskip(package)

from conftest import Outcome
from small_specs import config

from memplan.asked.recipe import Recipe
from memplan.errors import MemplanError
from memplan.importers.trainer import _spread
from memplan.report.verify import verdict
from memplan.verify import child, ranks, runner
from memplan.verify.campaign import expand, load
from memplan.verify.compare import compare
from memplan.verify.job import Job, make_job
from memplan.verify.measurement import Measurement, Run, read
from memplan.verify.measurement import Outcome as Ended
from memplan.verify.runner import RunDied, run_job

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' warnings are theirs

Memplan = Callable[..., Outcome]
ROOT = Path(__file__).resolve().parents[1]


def model_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config("llama", 2)), encoding="utf-8")
    return folder


def job_of(folder: Path, device: Any = "cpu", **options: Any) -> Job:
    recipe = Recipe(**{"trainer": "peft", "gpus": 2, "mode": "lora", "seq_len": 32, **options})
    return make_job(str(model_folder(folder / "model")), recipe, Run(loop="trainer"), device=device)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """A real run on two processes: FSDP2 in mixed precision, of a vocabulary that does not halve."""
    return run_job(
        job_of(tmp_path_factory.mktemp("ranks"), mode="full", parallel="fsdp2", autocast=True, batch_size=2)
    )


def test_every_rank_of_fsdp2_takes_what_the_plan_of_that_rank_says(measured: Measurement) -> None:
    assert measured.outcome.kind == "trained", measured.outcome.why
    found = compare(measured)
    assert found.allocated.error == 0
    assert all(figure.error == 0 for figure in found.categories.values())
    assert found.diff is not None
    assert found.diff.peak_only_a == () == found.diff.peak_only_b
    assert [one.allocated.error for one in found.ranks] == [0, 0]
    first, second = (one.allocated.measured for one in found.ranks)
    assert first is not None
    assert second is not None
    assert first > second  # 500 rows of embeddings and 499
    assert "of all 2 ranks are equal to the byte" in verdict(found)
    assert any("over gloo" in remark for remark in found.remarks)
    for one in measured.ranks:
        assert one.evidence is not None
        assert one.evidence.changed_tensors == one.evidence.trained_tensors == 21
        assert one.evidence.real


def test_replicas_whose_layers_stay_gathered_take_what_the_plan_says(tmp_path: Path) -> None:
    """Two replicas of two shards; gloo's groups of each are their own."""
    job = job_of(
        tmp_path, mode="full", parallel="fsdp2", gpus=4, dp_replicate=2, autocast=True, seq_len=16,
        reshard_after_forward=False,
    )  # fmt: skip
    measured = run_job(job)
    assert measured.outcome.kind == "trained", measured.outcome.why
    found = compare(measured)
    assert [one.allocated.error for one in found.ranks] == [0, 0, 0, 0]
    most, least, *again = (one.allocated.measured for one in found.ranks)
    assert [most, least] == again
    assert most > least  # 500 rows of embeddings and 499


def test_a_file_has_every_rank(measured: Measurement, tmp_path: Path) -> None:
    from memplan.verify.measurement import write

    again = read(write(measured, tmp_path))
    assert again == measured
    assert again.title.endswith("fsdp2 on 2")
    tapes = [one.read_tape() for one in again.by_rank()]
    assert [tape is not None for tape in tapes] == [True, True]
    assert [one.tape is None for one in again.ranks] == [True, False]  # the first is the measurement's


def test_a_rank_that_failed_is_the_measurement(measured: Measurement) -> None:
    alone = dict(enumerate(measured.by_rank()))
    ended = Ended(kind="failed", why="it did")
    alone[1] = alone[1].model_copy(update={"outcome": ended, "steps": (), "tape": None})
    both = ranks.together(alone, 1)
    assert (both.rank, both.outcome) == (1, ended)
    assert [one.outcome.kind for one in both.ranks] == ["trained", "failed"]
    assert verdict(compare(both)) == "The run failed: it did."


SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments
from memplan.verify import MemoryCallback

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, index):
        ids = torch.arange(48) + index
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

torch.manual_seed(0)
settings = json.load(open(sys.argv[1] + "/model/config.json"))
model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.bfloat16)
arguments = TrainingArguments(
    output_dir=sys.argv[1], max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    logging_strategy="no", gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    per_device_train_batch_size=2, optim="adamw_torch",
)
told = []
callback = MemoryCallback(tell=told.append, every_rank="every" in sys.argv)
Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback]).train()
figure = callback.figure
with open(f"{sys.argv[1]}/told-{arguments.process_index}.json", "w") as file:
    json.dump([told, figure.predicted, figure.measured, callback.recipe.parallel, callback.recipe.gpus], file)
"""


def test_the_callback_measures_every_rank_of_a_stranger_s_trainer(tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    job = job_of(tmp_path)  # its environment is torchrun's, with nothing of an engine
    shell = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    port = ranks.free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env=ranks.environment(job, shell, rank, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, complaints = process.communicate(timeout=120)
        assert process.returncode == 0, complaints[-2000:]
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2))
    for told, predicted, seen, parallel, gpus in (first, second):
        assert (parallel, gpus) == ("ddp", 2)
        assert predicted == seen  # buckets that DDP keeps, too
        assert len(told) in (0, 2)
    assert "predicted to allocate" in first[0][0]
    assert "error +0" in first[0][1]
    assert second[0] == []  # only the main process tells


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "use --loop trainer"),
        (
            ("--loop", "trainer", "--parallel", "zero2", "--autocast"),
            "verify trains with ddp and fsdp2, not with zero2",
        ),
        (
            ("--loop", "trainer", "--parallel", "fsdp2", "--autocast", "--offload", "both"),
            "nothing to offload",
        ),
        (
            ("--loop", "trainer", "--parallel", "fsdp2", "--autocast", "--shard-dtype", "bf16"),
            "--shard-dtype",
        ),
        (("--loop", "trainer", "--gpus", "9"), "at most 8 processes"),
    ],
)
def test_what_cannot_be_run_is_said(
    tmp_path: Path, memplan: Memplan, options: tuple[str, ...], complaint: str
) -> None:
    asked = (
        "verify",
        model_folder(tmp_path / "small"),
        "--mode",
        "lora",
        "--device",
        "cpu",
        "--gpus",
        "2",
        *options,
    )
    outcome = memplan(*asked)
    assert (outcome.status, outcome.out) == (2, "")
    assert complaint in outcome.err


def test_too_few_gpus_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MemplanError, match=r"this machine has 1 GPU, and the run is of 2: `memplan dry-run"):
        child._backend(job_of(tmp_path, "cuda"))


def test_a_rank_that_is_killed_is_named_and_the_others_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> Any:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(runner.subprocess, "Popen", start)
    with pytest.raises(RunDied, match=r"training process of rank 1 was killed by SIGKILL"):
        run_job(job_of(tmp_path), tell=lambda kind, value: started[1].kill())
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


def test_an_environment_is_accelerate_s_and_no_shell_s(tmp_path: Path) -> None:
    shell = {"PATH": "x", "FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_USE_DEEPSPEED": "true"}
    job = job_of(tmp_path, parallel="fsdp2", autocast=True)
    told = ranks.environment(job, shell, 1, 1234)
    assert (told["RANK"], told["WORLD_SIZE"], told["MASTER_PORT"]) == ("1", "2", "1234")
    assert (told["ACCELERATE_USE_FSDP"], told["FSDP_OFFLOAD_PARAMS"]) == ("true", "false")
    assert "ACCELERATE_USE_DEEPSPEED" not in told
    assert "ACCELERATE_USE_FSDP" not in ranks.environment(job_of(tmp_path), shell, 0, 1)


def test_a_campaign_s_entry_takes_the_same_way(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "small")
    entry = (
        f"{{name: two, model: {folder}, loop: trainer, recipe: {{mode: lora, gpus: 2, parallel: fsdp2, "
        "autocast: true}}"
    )
    (tmp_path / "plan.yaml").write_text(f"defaults: {{device: cpu}}\nruns:\n  - {entry}\n", encoding="utf-8")
    (planned,) = expand(load(tmp_path / "plan.yaml"))
    assert (planned.job.recipe.gpus, planned.job.recipe.parallel) == (2, "fsdp2")
    assert planned.job.predicted_bytes > 0


@pytest.mark.parametrize("kind", ["FullyShardedDataParallel", "Module"])
def test_what_has_no_plan_here_is_said_of_a_trainer_of_several(kind: str) -> None:
    args = SimpleNamespace(
        world_size=2, distributed_state=SimpleNamespace(distributed_type="DistributedType.DEEPSPEED")
    )
    with pytest.raises(MemplanError, match=r"FSDP1 is not planned|DeepSpeed is not measured"):
        _spread(args, type(kind, (), {})())


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_what_a_model_is_divided_by_is_read_off_it(replicas: int, stays: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        shape = (2, 2) if replicas == 2 else (4,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        fully_shard(model[0], mesh=mesh, reshard_after_forward=not stays)
        fully_shard(model[2], mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
        told = _spread(SimpleNamespace(world_size=4, device="cpu"), model)
    finally:
        torch.distributed.destroy_process_group()
    assert told["parallel"] == "fsdp2"
    assert told.get("dp_replicate") == (2 if replicas == 2 else None)
    assert told.get("reshard_after_forward") is (False if stays else None)
