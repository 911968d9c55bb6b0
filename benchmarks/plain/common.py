"""What the plain scripts share: options, data, and the peaks that they write. Nothing of memplan's."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

STEPS = 3


def options(dtype: str | None = "bfloat16") -> argparse.Namespace:
    """The command line; ``dtype``: where it names none."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="where the peaks go, in JSON")
    parser.add_argument("--mode", choices=["full", "lora", "qlora"], default="qlora")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--targets", nargs="+", default=["all-linear"])
    parser.add_argument("--dtype", default=dtype)
    parser.add_argument("--storage", default="uint8", help="dtype that 4-bit weights are packed in")
    parser.add_argument("--compute-dtype", help="of 4-bit layers (default: that of --dtype)")
    parser.add_argument("--bare", action="store_true", help="BitsAndBytesConfig(load_in_4bit=True)")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--lengths", type=int, nargs="+", help="of the rows, one after the other")
    parser.add_argument("--packing", action="store_true", help="rows of --lengths, packed to --length")
    parser.add_argument("--images", type=int, default=1, help="pictures in each example")
    parser.add_argument("--width", type=int, default=1024, help="of each, in pixels")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--device-map")
    parser.add_argument("--history", type=Path, help="where the allocator's history goes, as a pickle")
    parser.add_argument("--no-double-quant", dest="double_quant", action="store_false")
    parser.add_argument("--no-prepare", dest="prepare", action="store_false")
    parser.add_argument("--open", action="store_true", help="prepare without gradient checkpointing")
    for name in ("checkpointing", "bf16", "fp16", "dora", "liger", "save", "tp"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args()


def load(asked: argparse.Namespace, kind: Any = AutoModelForCausalLM) -> Any:
    """The model of a ``kind`` as a script loads it: 4-bit ones onto the card, others onto the host; with
    ``--tp`` a part of it onto each card."""
    if asked.history:
        torch.cuda.memory._record_memory_history(max_entries=10_000_000, stacks="python")
    quantised = {"quantization_config": quantisation(asked)} if asked.mode == "qlora" else {}
    return kind.from_pretrained(
        asked.model,
        dtype=getattr(torch, asked.dtype),
        attn_implementation=asked.attention,
        device_map=asked.device_map,
        **quantised,
        **divided(asked),
    )


def divided(asked: argparse.Namespace) -> dict[str, Any]:
    """Tensor parallel, on as many cards as there are processes."""
    if not asked.tp:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def quantisation(asked: argparse.Namespace) -> Any:
    """In 4 bits; ``--bare`` says no more than that."""
    if asked.bare:
        return BitsAndBytesConfig(load_in_4bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=asked.double_quant,
        bnb_4bit_compute_dtype=asked.compute_dtype or asked.dtype or "float32",
        bnb_4bit_quant_storage=asked.storage,
    )


def lora(asked: argparse.Namespace) -> Any:
    from peft import LoraConfig

    targets = asked.targets[0] if asked.targets == ["all-linear"] else asked.targets
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=asked.r,
        lora_alpha=2 * asked.r,
        lora_dropout=asked.dropout,
        use_dora=asked.dora,
        target_modules=targets,
    )


def rows(asked: argparse.Namespace) -> Iterator[dict[str, list[int]]]:
    """Enough for the steps of all ranks; all of one length, or of the lengths that are named."""
    count = asked.batch * asked.accumulate * STEPS * int(os.environ.get("WORLD_SIZE", "1"))
    for length in asked.lengths or [asked.length] * count:
        ids = (list(range(1, 101)) * (length // 100 + 1))[:length]
        yield {"input_ids": ids, "attention_mask": [1] * length, "labels": ids}


def arguments(asked: argparse.Namespace) -> dict[str, Any]:
    """TrainingArguments that every trainer here takes."""
    return {
        "output_dir": str(asked.out.with_suffix("")),
        "max_steps": STEPS,
        "per_device_train_batch_size": asked.batch,
        "gradient_accumulation_steps": asked.accumulate,
        "gradient_checkpointing": asked.checkpointing,
        "bf16": asked.bf16,
        "fp16": asked.fp16,
        "optim": asked.optim,
        "use_liger_kernel": asked.liger,  # the loss alone
        "liger_kernel_config": dict.fromkeys(("rope", "rms_norm", "swiglu"), False) if asked.liger else None,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
    }


class Peaks(TrainerCallback):
    """What torch.cuda says: the most allocated in each step, the most reserved in all."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.steps: list[dict[str, int]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        self.steps.append(dict(zip(("allocated", "reserved"), found, strict=True)))

    def write(self) -> None:
        if self.asked.history:
            import pickle

            self.asked.history.write_bytes(pickle.dumps(torch.cuda.memory._snapshot()["device_traces"][0]))

        libraries = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "deepspeed")
        found = {
            "allocated": self.steps[-1]["allocated"],
            "reserved": max(step["reserved"] for step in self.steps),
            "steps": self.steps,
            "device": torch.cuda.get_device_name(),
            "libraries": {name: found for name in libraries if (found := _version(name))},
        }
        self.asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
