"""Questions as people type them, at 80 columns and 24 lines: the verdict is on the screen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

LINES, COLUMNS = 24, 80

# What is typed after `memplan`, and how the verdict reads: any of these words, on the first lines.
QUESTIONS = {
    "llama-70b --qlora": ("fits",),
    "fit llama-70b --qlora --rank 8 --gpu a6000": ("fits", "tight", "does not fit"),
    "fit llama-8b --lora --lora-r 16 --ctx 4k --gpu 4090": ("fits", "tight", "does not fit"),
    "fit mistral-7b --full-finetune --bf16 --gpu h100": ("fits", "tight", "does not fit"),
    "fit llama-8b --load_in_4bit True --per_device_train_batch_size 4 --max_seq_length 2048 --gpu t4": (
        "fits", "tight", "does not fit",
    ),
    "fit qwen2.5-7b --mode LoRA --bs 4 --grad-accum 8 --attn fa2 --gpu a6000 --gpu 4090": (
        "fits", "tight", "does not fit",
    ),
    "fit llama-8b --qlora --target-modules all --gpu 4090 --maximize seq-len": ("Up to",),
    "frontier llama-3.2-1b --gpu 4090 --modes qlora": ("longest sequence",),
    "compare llama-8b --max-length 1024": ("fits",),
    "fit llama-70b --fft --optim adamw_8bit --use-liger-kernel --gpu h100": ("does not fit",),
}  # fmt: skip

# Ten more in a first hour's own words, and how the first line begins.
FIRST_HOUR = {
    "llama3:8b --qlora --gpu 4090": "RTX 4090: fits",
    "qwen3 8b --qlora --gpu 3090": "RTX 3090: fits",
    "Llama-3-8B --lora-r 16 --bs 4 --gpu 24GB": "24 GB card: fits",
    "llama70b --mode QLoRA --gpu 48GB --ctx 4k": "48 GB card: depends on which",
    "mistral-7b --optim adamw_8bit --seq-len 4k --gpu a10": "A10: fits",
    "https://huggingface.co/meta-llama/Llama-3.1-8B --fft --gpu h100": "H100 80GB HBM3: does not fit",
    "fit gemma-3-27b --qlora --rank 64 --gpu 4090 --maximize seq-len": "Up to ",
    "fit llama3:8b --lora --gpu 3060 --gpu 3090": "RTX 3060: does not fit",
    "axolotl.yaml --gpu 4090": "RTX 4090: fits",
    "sft.json --gpu t4": "Tesla T4: fits",
}
AXOLOTL = """\
base_model: NousResearch/Meta-Llama-3-8B
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
datasets:
  - {path: tatsu-lab/alpaca, type: alpaca}
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
optimizer: paged_adamw_32bit
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
attn_implementation: flash_attention_2
"""
SFT = {
    "model_name_or_path": "Qwen/Qwen3-8B", "dtype": "float16", "use_peft": True, "load_in_4bit": True,
    "fp16": True, "bf16": False, "per_device_train_batch_size": 2, "dataset_name": "trl-lib/Capybara",
}  # fmt: skip


def rows(text: str) -> int:
    """Lines of a terminal that a text takes."""
    return sum(max(-(-len(line) // COLUMNS), 1) for line in text.splitlines())


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_verdict_stands_on_one_screen(question: str, memplan: Callable[..., Outcome]) -> None:
    outcome = memplan(*shlex.split(question))
    assert outcome.status in (0, 1), outcome.err
    assert rows(outcome.err) + rows(outcome.out) + 1 <= LINES  # and the prompt
    first = "\n".join(outcome.out.splitlines()[:3])
    assert any(word in first for word in QUESTIONS[question])


@pytest.mark.parametrize("question", FIRST_HOUR)
def test_the_first_line_answers_a_first_question(
    question: str, memplan: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("axolotl.yaml").write_text(AXOLOTL, encoding="utf-8")
    Path("sft.json").write_text(json.dumps(SFT), encoding="utf-8")
    outcome = memplan(*shlex.split(question))
    assert outcome.status in (0, 1), outcome.err
    assert outcome.out.startswith(FIRST_HOUR[question])
    assert all(len(line) <= COLUMNS for line in outcome.out.splitlines())
    assert rows(outcome.err) + rows(outcome.out) + 1 <= LINES


def test_several_cards_share_a_step(memplan: Callable[..., Outcome]) -> None:
    outcome = memplan("llama70b", "--mode", "QLoRA", "--gpu", "2x24GB", "--parallel", "fsdp2")
    assert outcome.status == 0
    assert outcome.out.startswith("Each of 2 24 GB cards: does not fit, ")


@pytest.mark.parametrize("question", [text for text in QUESTIONS if text.startswith("fit ")])
def test_what_was_asked_is_echoed(question: str, memplan: Callable[..., Outcome]) -> None:
    out = memplan(*shlex.split(question)).out
    told = " ".join(out.split())
    for typed, ours in {
        "--bf16": "autocast",
        "--attn fa2": "flash_attention_2",
        "--grad-accum 8": "accumulate 8",
        "--target-modules all": "targets all-linear",
        "--ctx 4k": "1 × 4096 tokens",
        "--use-liger-kernel": "liger loss",
    }.items():
        if typed in question:
            assert ours in told.split("defaults")[0]
