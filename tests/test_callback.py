"""``MemoryCallback`` in the real Trainer, on a CPU with a tiny model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
    torch = pytest.importorskip("torch")
    for package in ("transformers", "peft", "bitsandbytes", "accelerate"):
        pytest.importorskip(package)
    from memplan.verify.callback import MemoryCallback, MemoryWarning

from memplan.asked.recipe import Mode, Recipe
from memplan.cuda.card import Card

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' warnings are theirs

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: threads that wait for one another cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Rows(torch.utils.data.Dataset):  # type: ignore[misc]
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.arange(48) + index
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def loaded(folder: Path, recipe: Recipe) -> Any:
    """A model as a training script gets it: from a checkpoint, through the libraries' own functions."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

    torch.manual_seed(0)
    new = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG), dtype=torch.bfloat16)
    if recipe.mode is Mode.FULL:
        return new
    new.save_pretrained(folder / "checkpoint")
    quantization = None
    if recipe.mode is Mode.QLORA:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint", dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu"
    )
    if recipe.kbit_prep is not False and quantization is not None:
        model = prepare_model_for_kbit_training(model)
    targets = "all-linear" if recipe.target_modules == "all-linear" else ["q_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))


def trainer(folder: Path, recipe: Recipe, callback: Any, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "optim": recipe.optimizer,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "bf16": recipe.autocast,
        "gradient_checkpointing": False,
        **options,
    }
    arguments = TrainingArguments(**settings)
    return Trainer(loaded(folder, recipe), arguments, train_dataset=Rows(), callbacks=[callback])


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "qlora"},
        {"mode": "qlora", "kbit_prep": False, "gradient_checkpointing": False, "target_modules": "q,v"},
        {"mode": "lora", "autocast": True},
        {"mode": "full", "optimizer": "adamw_torch"},
        {"mode": "full", "optimizer": "adamw_torch", "max_grad_norm": 0.0},
        {"mode": "lora", "autocast": True, "gradient_accumulation_steps": 3},
    ],
    ids=str,
)
def test_predicted_and_measured_in_the_real_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    lines: list[str] = []
    callback = MemoryCallback(tell=lines.append)
    same = {key: options[key] for key in ("max_grad_norm", "gradient_accumulation_steps") if key in options}
    trainer(tmp_path, Recipe(trainer="peft", **options), callback, **same).train()
    figure = callback.figure
    assert figure is not None
    assert figure.predicted is not None
    assert figure.predicted > 2 << 20
    assert figure.error == 0  # with every number that the loop keeps, and the batches that wait
    assert callback.recipe is not None
    wanted = Recipe(trainer="peft", **options).resolved()
    planned = callback.recipe.resolved()
    for field in ("mode", "kbit_prep", "gradient_checkpointing", "autocast", "optimizer", "dtype"):
        assert getattr(planned, field) == getattr(wanted, field), field
    assert (planned.batch_size, planned.seq_len) == (2, 48)
    assert len(lines) == 2
    assert "is predicted to allocate" in lines[0]
    assert f"predicted {figure.predicted:,} bytes, measured, CPU storages {figure.measured:,}" in lines[1]
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_a_run_that_will_not_fit_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = MemoryCallback(recipe=Recipe(trainer="peft", mode="lora"), tell=lambda line: None)
    model = loaded(tmp_path, Recipe(trainer="peft", mode="full"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.warns(MemoryWarning, match="will not fit"):
        callback.on_train_begin(None, None, None, model=model)


def test_on_a_card_whole_blocks_are_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memplan.device.playback import simulate
    from memplan.predict.parameters import resolve_recipe
    from memplan.predict.step import write_tape

    lines: list[str] = []
    callback = MemoryCallback(tell=lines.append)
    own = trainer(tmp_path, Recipe(trainer="peft", mode="full"), callback)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {
        "mem_get_info": (1 << 40, 1 << 40),
        "memory_reserved": 0,
        "get_device_capability": (9, 0),
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 1000,
        "max_memory_reserved": 2000,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    given = SimpleNamespace(**{**vars(own.args), "use_cpu": False})
    there = {"model": own.model, "train_dataloader": own.get_train_dataloader()}
    callback.on_train_begin(given, None, None, **there)
    callback.on_step_begin(given, SimpleNamespace(global_step=1), None, **there)
    callback.on_step_end(given, None, None, **there)
    assert callback._spec is not None
    assert callback.recipe is not None
    resolved = resolve_recipe(callback._spec, callback.recipe)
    tape = write_tape(callback._spec, resolved, card=Card((9, 0)), looped=True, folded=False)
    assert callback.figure is not None
    assert callback.figure.predicted == simulate(tape).allocated
    assert (callback.figure.measured, callback.reserved) == (1000, 2000)
    assert "measured 1,000, error" in lines[1]


def test_a_trainer_on_the_host_of_a_machine_with_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    callback = MemoryCallback(tell=lines.append)
    own = trainer(tmp_path, Recipe(trainer="peft", mode="full"), callback)
    assert own.args.use_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    callback.on_train_begin(
        own.args, None, None, model=own.model, train_dataloader=own.get_train_dataloader()
    )
    assert not callback.on_cuda
    assert "GiB at its peak" in lines[0]
    assert "are free" not in lines[0]


def test_what_cannot_be_planned_is_said_and_does_not_stop_the_run(tmp_path: Path) -> None:
    lines: list[str] = []
    callback = MemoryCallback(tell=lines.append)
    trainer(tmp_path, Recipe(trainer="peft", mode="full"), callback, optim="adagrad").train()
    assert len(lines) == 1
    assert "no plan for this run: unknown optimizer 'adagrad'" in lines[0]
    assert callback.figure is None


@pytest.mark.parametrize(
    ("loss_type", "trl", "loss"),
    [
        (None, None, "standard"),  # no SFTConfig
        ("nll", "1.15.2", "standard"),
        ("nll", "1.16.0", "chunked"),
        ("chunked_nll", "1.15.2", "chunked"),
    ],
)
def test_the_loss_of_an_sft_trainer(
    loss_type: str | None, trl: str | None, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    from memplan.importers.trainer import loss_of

    monkeypatch.setattr(importlib.metadata, "version", lambda name: trl)
    arguments = type("Arguments", (), {"use_liger_kernel": False, "loss_type": loss_type})
    assert loss_of(arguments) == loss
