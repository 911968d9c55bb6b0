"""The other way to train: the Hugging Face Trainer, or TRL's SFTTrainer, with :class:`MemoryCallback`.

What is measured is the callback's step 2: allocated bytes, and without CUDA its tape, too.
"""

from __future__ import annotations

import gc
import math
import tempfile
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import DistributedType
from transformers import TrainerCallback

from memplan import losses, weights
from memplan.asked.recipe import Batches
from memplan.errors import MemplanError
from memplan.importers.trainer import tiled_by_trl
from memplan.trace.recorder import own_part
from memplan.verify.callback import MEASURED_STEP, MemoryCallback
from memplan.verify.job import Job
from memplan.verify.made import build
from memplan.verify.measurement import Evidence, Step
from memplan.verify.train import (
    Backend,
    Tell,
    Training,
    checksums,
    count_changed,
    finite,
    frozen_tensors,
    halves,
    make_batch,
    source_of,
)


class Rows(torch.utils.data.Dataset):
    """The rows of one batch, over and over."""

    def __init__(self, batch: dict[str, torch.Tensor], rows: int) -> None:
        self.batch, self.rows = batch, rows

    def __len__(self) -> int:
        """Enough for all steps."""
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Row by row, as the batch has them."""
        return {key: value[index % len(value)] for key, value in self.batch.items()}


class Counting(TrainerCallback):
    """Tells the backend which step runs; has checksums of what there was to train before the first, where a
    model is not what it was made as: ranks that share its step have parts of it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.before: Sums = {}, {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at it."""
        if args.world_size > 1:
            self.before = _sums(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From 1 on."""
        self._backend.number = state.global_step + 1


Sums = tuple[dict[str, int], dict[str, int]]  # of what is trained, of what is frozen


def _sums(model: torch.nn.Module) -> Sums:
    trained = {name: own_part(p) for name, p in model.named_parameters() if p.requires_grad}
    return checksums(trained), checksums({name: own_part(p) for name, p in frozen_tensors(model)})


def train_with_trainer(job: Job, backend: Backend, tell: Tell, steps: list[Step]) -> Training:
    """As :func:`memplan.verify.train.train`."""
    recipe, run = job.recipe, job.run
    if recipe.momentum:
        raise MemplanError("the Trainer's sgd has no momentum: leave --momentum out, or use --loop memplan")
    if run.loop == "sft" and find_spec("trl") is None:
        raise MemplanError("--loop sft needs TRL: run `pip install trl`")
    torch.manual_seed(run.seed)
    tell("state", "building the model")
    # where the backend changes how a CPU runs, the callback does so itself, in the step that it measures
    environment = backend.environment() if backend.device.type == "cuda" else None
    with tempfile.TemporaryDirectory() as folder:
        if environment is not None:
            environment.__enter__()
        try:
            several = recipe.gpus > 1
            # as a script has it: an engine brings the model onto the card itself, if it is not in 4 bits
            on_card = not several or weights.of(recipe) is not None
            place = backend.device if on_card else torch.device("cpu")
            model = build(job.model.config, recipe, place, source_of(job))
            counting = Counting(backend)
            if not several:
                counting.before = _sums(model)
            callback = MemoryCallback(recipe=recipe, tell=lambda line: tell("state", line[:60]))
            trainer = _trainer(job, model, callback, folder)
            del model
            trainer.add_callback(counting)
            if backend.device.type == "cuda":  # as before the first step of memplan's own loop
                gc.collect()
                torch.cuda.empty_cache()
            trainer.train()
            after = _sums(trainer.model)
        finally:
            if environment is not None:
                environment.__exit__(None, None, None)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    if callback.figure is None or callback.figure.measured is None or len(logs) < run.steps:
        raise RuntimeError("the Trainer ended without a measured step")
    steps.append(_step(callback, logs))
    evidence = Evidence(
        first_loss=finite(float(logs[0]["loss"])),
        last_loss=finite(float(logs[-1]["loss"])),
        trained_tensors=len(after[0]),
        changed_tensors=count_changed(counting.before[0], after[0]),
        frozen_tensors=len(after[1]),
        frozen_changed=count_changed(counting.before[1], after[1]),
        gradients_finite=all(math.isfinite(float(entry.get("grad_norm", 0.0))) for entry in logs),
    )
    return Training(tuple(steps), evidence, callback.tape)


def _step(callback: MemoryCallback, logs: list[dict[str, Any]]) -> Step:
    assert callback.figure is not None
    assert callback.figure.measured is not None
    cuda = callback.on_cuda
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    stats = torch.cuda.memory_stats() if cuda else {}
    resting = sum(callback.tape.deltas) if callback.tape is not None else torch.cuda.memory_allocated()
    return Step(
        number=MEASURED_STEP,
        loss=float(logs[MEASURED_STEP - 1]["loss"]),
        allocated_bytes=callback.figure.measured,
        resting_bytes=resting,
        reserved_bytes=callback.reserved,
        driver_bytes=total - free if cuda else None,
        alloc_retries=stats.get("num_alloc_retries"),
        ooms=stats.get("num_ooms"),
    )


def _trainer(job: Job, model: Any, callback: MemoryCallback, folder: str) -> Any:
    recipe, run = job.recipe.as_fed(), job.run
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": run.steps,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "optim": recipe.optimizer,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": recipe.max_grad_norm,
        "use_cache": recipe.use_cache,
        "bf16": recipe.autocast and recipe.dtype.value != "float16",
        "fp16": recipe.autocast and recipe.dtype.value == "float16",
        "gradient_checkpointing": bool(recipe.gradient_checkpointing),
        "gradient_checkpointing_kwargs": {"use_reentrant": bool(recipe.use_reentrant)},
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": run.seed,
    }
    batch = make_batch(job)
    rows = recipe.batch_size * recipe.gradient_accumulation_steps * run.steps * recipe.gpus
    if run.loop == "sft":
        return _sft(job, settings, model, callback, batch, rows)
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(**settings)
    _shared(job, arguments)
    return Trainer(model, arguments, train_dataset=Rows(batch, rows), callbacks=[callback])


def _shared(job: Job, arguments: Any) -> None:
    """accelerate (1.15 state.py) takes processes on a CPU for none that FSDP could be of; its own set-up of
    FSDP2 works there, too."""
    if job.device == "cpu" and job.recipe.parallel == "fsdp2":
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU


def _sft(job: Job, settings: dict[str, Any], model: Any, callback: Any, batch: Any, rows: int) -> Any:
    """TRL's, on tokens as they are, and with a tokenizer that it wants and nobody uses."""
    recipe = job.recipe.as_fed()
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {"<unk>": 0, "<pad>": 1, "</s>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    if not losses.find(recipe.loss).tiled and tiled_by_trl("nll"):
        raise MemplanError("this TRL computes every loss in tiles: ask for --loss chunked")
    length = batch["input_ids"].shape[1]
    ids = batch["input_ids"].tolist()
    packed = recipe.batches is Batches.PACKED
    columns: dict[str, list[Any]] = {"input_ids": [ids[row % len(ids)] for row in range(rows)]}
    if recipe.batches is Batches.PADDED:
        columns["input_ids"][:: recipe.batch_size] = [ids[0][:-1]] * (rows // recipe.batch_size)
    if packed:
        columns["seq_lengths"] = [halves(length)] * rows
    table = InMemoryTable.from_pydict(columns)
    data = Dataset(table, fingerprint="memplan")  # it would be found by pickling pyarrow, which may fail
    arguments = SFTConfig(
        **settings,
        max_length=length,
        packing=packed,
        loss_type="chunked_nll" if losses.find(recipe.loss).sft else "nll",  # one and the same in TRL 1.16
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    _shared(job, arguments)
    return SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback])
