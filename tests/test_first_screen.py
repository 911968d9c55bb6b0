"""Ten questions as people type them, at 80 columns and 24 lines: the verdict is on the screen."""

from __future__ import annotations

import shlex
from collections.abc import Callable

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
