"""Batches as they are: padded, packed, and of lengths that differ from step to step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan import MemplanError, Recipe
from memplan.asked.lengths import MOST, Lengths, lengths_of, read_lengths
from memplan.errors import RecipeError
from memplan.importers.hf import spec_from_config
from memplan.planning.plan import Plan
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_long_tape, write_tape
from memplan.tape import Tape, replay
from memplan.trace import trace
from tests.conftest import Outcome
from tests.small_specs import SPECS, config

SMALL: dict[str, Any] = {"mode": "lora", "r": 4, "batch_size": 3, "seq_len": 130}


def births(tape: Tape) -> list[int]:
    return [tape.sizes[event] for event in tape.events if event >= 0]


@pytest.mark.parametrize("trainer", ["peft", "trl"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("batches", ["padded", "packed"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_every_allocation_is_the_libraries_own(family: str, batches: str, attn: str, trainer: str) -> None:
    recipe = Recipe(**SMALL, batches=batches, attn=attn, trainer=trainer)
    spec = SPECS[family](2)
    planned = write_tape(spec, resolve_recipe(spec, recipe), folded=False)
    traced = trace(config(family, 2), recipe)
    assert births(planned)[-200:] == births(traced)[-200:]
    assert replay(planned).allocated_bytes == replay(traced).allocated_bytes


@pytest.mark.parametrize("trainer", ["peft", "trl"])
def test_gpt_oss_makes_its_masks_without_positions(trainer: str) -> None:
    """So they do not tell packed sequences apart (models/gpt_oss/modeling_gpt_oss.py, ``mask_kwargs``)."""
    recipe = Recipe(**SMALL, batches="packed", trainer=trainer)
    spec = SPECS["gpt_oss"](2)
    planned = write_tape(spec, resolve_recipe(spec, recipe), folded=False)
    assert births(planned) == births(trace(config("gpt_oss", 2), recipe))


def test_a_padded_batch_has_a_mask_that_every_layer_keeps() -> None:
    """bool [B, 1, S, S] once, and for every layer in the dtype of the queries, rows padded to 8; and keys and
    values repeated for every head (Ampere, 2 layers that keep what backward needs)."""
    spec, batch, length = SPECS["llama"](2), 2, 512
    options: dict[str, Any] = {**SMALL, "batch_size": batch, "seq_len": length, "trainer": "peft"}
    full, padded = (
        replay(write_tape(spec, resolve_recipe(spec, Recipe(**options, batches=kind)))).allocated_bytes
        for kind in ("full", "padded")
    )
    mask = batch * length * length
    repeated = 2 * batch * 8 * length * 32 * 2  # keys and values, in the place of those of two heads
    assert padded - full >= mask + 2 * 2 * mask
    assert padded - full <= mask + 2 * (2 * mask + repeated) + (1 << 20)


def test_packed_rows_are_one_row() -> None:
    recipe = Recipe(**SMALL, batches="packed")
    assert (recipe.as_fed().batch_size, recipe.as_fed().seq_len) == (1, 390)
    assert recipe.as_fed().as_fed() == recipe.as_fed()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batches": "padded", "attn": "flash_attention_2"}, "hangs on how long each sequence is"),
        ({"batches": "packed", "trainer": "llama_factory"}, "packs with masks of its own"),
        ({"batches": "packed", "trainer": "axolotl", "attn": "sdpa"}, "packs with masks of its own"),
        ({"batches": "packed", "use_cache": True}, "leave out use_cache"),
    ],
)
def test_what_is_not_played_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe(**options)


# -- lengths -----------------------------------------------------------------------------------------------


def of(lengths: Any, **options: Any) -> Plan:
    return memplan.plan("llama-3.2-1b", Recipe(mode="lora", **options), gpus=["a6000"], lengths=lengths)


def test_equal_lengths_are_a_run_of_whole_batches() -> None:
    """Byte for byte: what --lengths plays is the run that everything else plays."""
    alike = of([256] * 4, batch_size=2)
    whole = memplan.plan("llama-3.2-1b", Recipe(mode="lora", batch_size=2, seq_len=256), gpus=["a6000"])
    assert alike.allocator == whole.allocator
    assert alike.peak.tensor_bytes == whole.peak.tensor_bytes
    assert alike.played is not None
    assert (alike.played.steps, alike.played.tokens) == (2, 512)
    assert alike.played.alone_bytes == whole.allocator.reserved_bytes


def test_the_longest_step_is_the_plans_and_the_run_reserves_for_all() -> None:
    differing = of([100, 200, 700, 650, 300, 20, 690, 500], batch_size=2)
    assert differing.recipe.seq_len == 700
    longest = of([700, 650] * 2, batch_size=2)
    assert differing.peak.tensor_bytes == longest.peak.tensor_bytes
    assert differing.allocator.allocated_bytes >= differing.peak.tensor_bytes
    assert differing.allocator.reserved_bytes > longest.allocator.reserved_bytes
    assert differing.fits[0].reserved_bytes == differing.allocator.reserved_bytes


def test_labels_that_are_padding_do_not_count() -> None:
    """TRL's loss goes over the tokens that count: one of 4,096 rows' tiles becomes smaller with them."""
    spec = SPECS["llama"](2)
    recipe = resolve_recipe(spec, Recipe(mode="full", batch_size=2, seq_len=300))
    tapes = [write_long_tape(spec, recipe, lengths=[lengths]) for lengths in ((300, 299), (300, 10))]
    tiles = [
        max(tape.sizes[i] for i, name in enumerate(tape.operations) if name == "empty") for tape in tapes
    ]
    # a tile has so many words whatever the model's vocabulary, in bf16 under TRL's autocast
    assert tiles == [32_768 * 2 * (299 + 298), 32_768 * 2 * (299 + 9)]


def test_lengths_are_cut_where_the_sequence_ends() -> None:
    assert of([100, 5000], seq_len=512).recipe.seq_len == 512


def test_a_step_takes_a_batch_for_each_of_its_forward_passes() -> None:
    found = Lengths("some", given=(1, 2, 3, 4, 5, 6, 7, 8, 9)).steps(2, 2, None)
    assert found == [((1, 2), (3, 4)), ((5, 6), (7, 8))]


def test_of_many_steps_the_longest_is_played_all_the_same() -> None:
    lengths = [10] * (MOST + 40)
    lengths[-3] = 999
    found = Lengths("some", given=tuple(lengths)).steps(1, 1, None)
    assert len(found) == MOST
    assert found[-1] == ((999,),)


def test_drawn_lengths_are_the_same_whenever_they_are_drawn() -> None:
    drawn = read_lengths("lognormal:600,400,1024")
    steps = drawn.steps(4, 1, None)
    assert steps == read_lengths("lognormal:600,400,1024").steps(4, 1, None)
    every = [length for step in steps for rows in step for length in rows]
    assert max(every) <= 1024
    assert 400 < sum(every) / len(every) < 800


@pytest.mark.parametrize(
    "text", ["", "12\nx\n", "0\n", "[1, 2.5]", "[true]", "[]", '{"a": 1}', "-3", "[" * 100_000]
)
def test_a_file_of_something_else_is_told_what_it_should_hold(
    memplan: Callable[..., Outcome], tmp_path: Path, text: str
) -> None:
    file = tmp_path / "lengths"
    file.write_text(text, encoding="utf-8")
    outcome = memplan("llama-3.2-1b", "--lengths", str(file))
    assert outcome.status == 2
    assert "has to hold lengths in tokens" in outcome.err
    assert outcome.err.count("\n") <= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lengths", "lognormal:1,2"), "a mean, a standard deviation and a maximum"),
        (("--lengths", "lognormal:9000,1,4096"), "from 1 to the maximum"),
        (("--lengths", "nowhere.txt"), "there is no file"),
        (("--lengths", "."), "there is no file"),
        (("--lengths", "lognormal:600,400,4096", "--attn", "flash"), "FlashAttention"),
        (("--lengths", "lognormal:600,400,4096", "--trace"), "a trace plays one step"),
    ],
)
def test_a_wrong_question_of_lengths_is_one_sentence(
    memplan: Callable[..., Outcome], arguments: tuple[str, ...], words: str
) -> None:
    outcome = memplan("llama-3.2-1b", *arguments)
    assert outcome.status == 2
    assert words in " ".join(outcome.err.split())


def test_too_few_lengths_for_a_step_are_refused() -> None:
    with pytest.raises(MemplanError, match="a step takes 4"):
        of([100, 200], batch_size=4)
    with pytest.raises(MemplanError, match="whole numbers of tokens"):
        lengths_of([])


def test_fit_judges_all_steps(memplan: Callable[..., Outcome], tmp_path: Path) -> None:
    file = tmp_path / "lengths.json"
    file.write_text("[100, 200, 700, 650, 300, 20, 690, 500]", encoding="utf-8")
    asked = ("fit", "llama-3.2-1b", "--mode", "lora", "--batch-size", "2", "--gpu", "a6000", "--lengths")
    told = json.loads(memplan(*asked, str(file), "--json").out)
    assert told["played"]["steps"] == 4
    assert told["fits"][0]["reserved_bytes"] == told["allocator"]["reserved_bytes"]
    words = " ".join(memplan(*asked, str(file)).out.split())
    assert "4 steps of 20 to 700 tokens a sequence reserve" in words
    assert memplan(*asked, str(file), "--maximize", "seq-len").status == 2


def test_a_window_that_bites_in_some_steps_only() -> None:
    """Which layers are alike is found for the longest rows of the step: the others follow."""
    spec = spec_from_config(config("gemma3", 8), "gemma3")  # a window of 100
    recipe = resolve_recipe(spec, Recipe(mode="lora", batch_size=2, gradient_accumulation_steps=2))
    lengths = [(50, 50), (160, 40)]
    folded = write_long_tape(spec, recipe, lengths=lengths)
    assert replay(folded) == replay(write_tape(spec, recipe, lengths=lengths, folded=False))
