"""The fused losses: the libraries' own code is traced, and what it allocates is what is predicted."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
    for package in ("torch", "transformers", "peft", "bitsandbytes", "trl", "liger_kernel"):
        pytest.importorskip(package)
    import torch

    from memplan.trace import losses, trace

from small_specs import config

from memplan import MemplanError
from memplan.asked.recipe import Recipe
from memplan.cuda.card import Card
from memplan.errors import TraceError
from memplan.importers.hf import spec_from_config
from memplan.losses.chunked import TOKEN_CHUNK, VOCABULARY_CHUNK
from memplan.losses.liger import LOSS, chunk_size
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_tape
from memplan.tape import Tape, replay, rounded

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' warnings are theirs

LLAMA = {**config("llama", 2), "vocab_size": 40_000}


def both(given: dict[str, Any], capability: tuple[int, int] = (8, 0), **options: Any) -> tuple[Tape, Tape]:
    """The plan's tape and the trace's."""
    spec = spec_from_config(given, "test")
    recipe = resolve_recipe(spec, Recipe(trainer="peft", **options))
    predicted = write_tape(spec, recipe, card=Card(capability), folded=False)
    return predicted, trace(dict(given), recipe, compute_capability=capability)


def births(tape: Tape) -> list[tuple[int, str]]:
    """Each allocation after setup: bytes and phase."""
    return [
        (tape.sizes[event], segment.phase.value)
        for segment in tape.segments
        if segment.phase.value != "setup"
        for event in tape.events[segment.start : segment.stop]
        if event >= 0
    ]


@pytest.mark.parametrize("loss", ["chunked", "liger", "shifted"])
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "full", "seq_len": 300},
        {"mode": "full", "seq_len": 300, "dtype": "float32", "gradient_accumulation_steps": 2},
        {"mode": "full", "seq_len": 300, "dtype": "float32", "autocast": True},
        {"mode": "lora", "seq_len": 65, "batch_size": 2, "modules_to_save": ("lm_head",)},
        {"mode": "lora", "seq_len": 2100, "batch_size": 2, "gradient_checkpointing": True},  # two chunks
        {"mode": "qlora", "seq_len": 7},
        {"mode": "lora", "seq_len": 1, "batch_size": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_each_allocation_is_predicted(loss: str, options: dict[str, Any]) -> None:
    predicted, traced = both(LLAMA, loss=loss, **options)
    assert births(predicted) == births(traced)
    one, two = replay(predicted), replay(traced)
    assert (one.allocated_bytes, one.operation) == (two.allocated_bytes, two.operation)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("loss", ["chunked", "liger"])
def test_older_cards_have_no_addmm_into_fp32(loss: str, autocast: bool) -> None:
    dtype = "float32" if autocast else "float16"
    options = {"mode": "full", "seq_len": 96, "dtype": dtype, "autocast": autocast, "attn": "eager"}
    predicted, traced = both(LLAMA, (7, 5), loss=loss, **options)
    assert births(predicted) == births(traced)


@pytest.mark.parametrize("checkpointing", [{}, {"gradient_checkpointing": True, "use_reentrant": True}])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_trl_adds_the_load_balancing_loss_of_experts(family: str, checkpointing: dict[str, bool]) -> None:
    options: dict[str, Any] = {"mode": "lora", "target_modules": "attention", "seq_len": 96, **checkpointing}
    predicted, traced = both(config(family, 3), loss="chunked", **options)
    assert births(predicted) == births(traced)
    without = {**config(family, 3), "router_aux_loss_coef": 0.0}
    predicted, traced = both(without, loss="chunked", **options)
    assert births(predicted) == births(traced)


def test_a_shifted_loss_copies_the_logits_of_several_sequences_and_of_one_views_them() -> None:
    row = 40_000 * 4  # of fp32 logits
    for sequences in (1, 2):
        options = {"mode": "lora", "seq_len": 300, "batch_size": sequences, "gradient_checkpointing": True}
        tapes = [both(LLAMA, loss=loss, **options)[1] for loss in ("standard", "shifted")]
        whole, shifted = (
            sum(
                size == rounded(sequences * rows * row) and phase == "forward" for size, phase in births(tape)
            )
            for tape, rows in zip(tapes, (300, 299), strict=True)
        )
        assert whole == 2  # upcast, log-softmax
        assert shifted == sequences  # the copy, if there is one, and the log-softmax


@pytest.mark.parametrize("loss", ["chunked", "liger"])
def test_no_tensor_holds_all_logits(loss: str) -> None:
    tokens, vocabulary = 4096, 40_000
    _, traced = both(LLAMA, loss=loss, mode="lora", seq_len=tokens)
    _, stock = both(LLAMA, loss="standard", mode="lora", seq_len=tokens)
    assert max(stock.sizes) == 4 * tokens * vocabulary  # fp32 logits
    assert max(traced.sizes) <= 2 * TOKEN_CHUNK * VOCABULARY_CHUNK
    assert replay(traced).allocated_bytes < replay(stock).allocated_bytes


def test_liger_rounds_its_chunks_up_to_a_power_of_two() -> None:
    # liger_kernel/ops/fused_linear_cross_entropy.py gives this example, 0.8.5
    assert chunk_size(4 * 4096, 4096, 32_000) == 2048
    assert chunk_size(1, 64, 40_000) == 1
    assert (chunk_size(105, 2880, 201_088), chunk_size(105, 2880, 201_088, 8)) == (2, 16)  # gpt-oss


def test_a_family_that_liger_does_not_know() -> None:
    falcon = {
        "model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "vocab_size": 500,
    }  # fmt: skip
    granite = {**LLAMA, "model_type": "granite"}  # of which it has kernels, but no loss
    for given in (falcon, granite):
        kind = given["model_type"]
        with pytest.raises(
            TraceError, match=f"Liger-Kernel has no fused loss for models of the type '{kind}'"
        ):
            trace(given, Recipe(trainer="peft", mode="full", loss="liger", seq_len=8))
    assert (
        replay(
            trace(falcon, Recipe(trainer="peft", mode="full", loss="chunked", seq_len=8).resolved())
        ).allocated_bytes
        > 0
    )


def test_questions_about_the_device_get_cudas_answer() -> None:
    from liger_kernel.ops import fused_linear_cross_entropy as module

    x = torch.zeros(2, 2)
    assert not module._can_use_mm_out(x, x)  # on a CPU
    with torch.no_grad(), losses.in_force(LOSS, Card()):
        assert module._can_use_mm_out(x, x)
    assert not module._can_use_mm_out(x, x)


def test_code_that_asks_nothing_about_the_device_is_not_the_code_that_we_know() -> None:
    with pytest.raises(MemplanError, match="asks nothing about the device any more"):
        losses.on_cuda(chunk_size)
