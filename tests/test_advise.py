"""Advice: priced by planning, and true."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
from conftest import Outcome
from rich.console import Console

from memplan import Recipe, plan
from memplan.commands.arguments import given_options, parse
from memplan.commands.fit import parser
from memplan.planning import advise as advising
from memplan.planning.advise import IDEAS, Cost
from memplan.planning.records import Advice
from memplan.planning.study import Prediction, ask
from memplan.report.fit import show_advice

Run = Callable[..., Outcome]


def advise(model: str, recipe: Recipe, gpu: str) -> Advice:
    return advising.advise(Prediction(ask(model, recipe)), gpu)


def with_options(recipe: dict[str, object], command: str) -> Recipe:
    """The recipe that a suggestion's options make of the one asked about."""
    arguments = ["m", "--gpu", "a6000", *command.split()]
    return Recipe(trainer="peft", **{**recipe, **given_options(parse(parser(), arguments))})


@pytest.mark.parametrize(
    ("model", "gpu", "options"),
    [
        ("llama-3.1-8b", "4090", {"mode": "full", "seq_len": 512}),
        ("llama-3.1-8b", "4090", {"mode": "lora", "batch_size": 4, "gradient_checkpointing": True}),
        ("qwen2.5-7b", "4090", {"mode": "qlora", "seq_len": 8192, "r": 64}),
        ("llama-3.2-1b", "t4", {"mode": "full", "optimizer": "adamw_torch", "attn": "eager"}),
        ("llama-3.1-8b", "4090", {"mode": "lora", "dtype": "float32", "autocast": True, "kbit_prep": False}),
        ("llama-3.1-8b", "t4", {"mode": "qlora", "seq_len": 8192}),
        ("qwen2.5-7b", "4090", {"batch_size": 2, "seq_len": 3000, "alloc_conf": "large_segment_size_mb:32"}),
    ],
)
def test_prices_are_those_of_plans_with_the_options_told(
    model: str, gpu: str, options: dict[str, object]
) -> None:
    told = advise(model, Recipe(trainer="peft", **options), gpu)
    before = plan(model, Recipe(trainer="peft", **options), gpus=[gpu])
    assert before.fits[0].verdict == "does not fit"
    assert told.changes
    for change in told.changes:
        asked = {
            name: value for name, value in options.items() if name != "mode" or "--mode" not in change.command
        }
        after = plan(model, with_options(asked, change.command), gpus=[gpu])
        if gpu != "t4":  # whose peak is of other kernels than the plan's
            assert after.peak.tensor_bytes == change.tensor_bytes, change.command
            assert change.saves_bytes == before.peak.tensor_bytes - after.peak.tensor_bytes
        assert after.fits[0].verdict == change.verdict, change.command
        assert change.needed_bytes in (None, after.fits[0].needed_bytes)


def test_the_70b_on_an_a6000_needs_one_change() -> None:
    told = advise("llama-70b", Recipe(trainer="peft", mode="qlora", r=8), "a6000")
    enough = [change for change in told.changes if change.verdict in ("fits", "tight")]
    assert [change.command for change in enough] == ["--no-kbit-prep", "--seq-len 1024"]
    assert told.changes[0] is enough[0]
    assert [change.verdict for change in enough] == ["fits", "tight"]
    assert enough[0].saves_bytes == 55_123_635_200 - 46_683_040_768
    assert any("H100" in card or "A100" in card for card in told.cards)


def test_a_combination_fits_and_none_of_it_can_be_left_out() -> None:
    options: dict[str, object] = {"mode": "full", "seq_len": 8192, "batch_size": 4}
    told = advise("llama-3.1-8b", Recipe(trainer="peft", **options), "4090")
    assert all(change.verdict == "does not fit" for change in told.changes)
    together = told.combination
    assert together is not None
    asked = {name: value for name, value in options.items() if name != "mode"}
    answer = plan("llama-3.1-8b", with_options(asked, together.command), gpus=["4090"])
    assert answer.fits[0].verdict == together.verdict != "does not fit"
    assert answer.fits[0].needed_bytes == together.needed_bytes


def test_settings_that_were_there_are_kept() -> None:
    recipe = Recipe(trainer="peft", batch_size=2, seq_len=3000, alloc_conf="large_segment_size_mb:32")
    told = advise("qwen2.5-7b", recipe, "4090")
    (change,) = (change for change in told.changes if change.title == "expandable segments")
    assert change.command == "--alloc-conf large_segment_size_mb:32,expandable_segments:True"


def test_cards_that_can_not_run_the_recipe_are_passed_over() -> None:
    told = advise("llama-3.1-8b", Recipe(trainer="peft", mode="full", attn="flash_attention_2"), "4090")
    assert told.changes
    assert not any("TITAN RTX" in card for card in told.cards)


def test_advice_runs_on_the_card() -> None:
    told = advise("llama-3.1-8b", Recipe(trainer="peft", mode="qlora", seq_len=8192), "t4")
    assert not any("kernels" in change.command for change in told.changes)


def test_what_neither_saves_nor_fits_is_not_advised() -> None:
    told = advise("llama-3.1-8b", Recipe(trainer="peft", mode="qlora", seq_len=8192), "t4")
    assert all(change.saves_bytes > 0 or change.verdict != "does not fit" for change in told.changes)


def test_what_ddp_leaves_whole_fsdp2_shares_out() -> None:
    told = advise("llama-3.2-1b", Recipe(mode="full", gpus=4), "3060")
    first = told.changes[0]
    assert (first.command, first.verdict) == ("--parallel fsdp2", "fits")
    after = plan("llama-3.2-1b", Recipe(mode="full", gpus=4, parallel="fsdp2"), gpus=["3060"])
    assert (first.tensor_bytes, first.needed_bytes) == (after.peak.tensor_bytes, after.fits[0].needed_bytes)
    for alone in (Recipe(mode="full"), Recipe(mode="full", gpus=2, parallel="fsdp2")):
        changes = advise("llama-3.1-8b", alone, "3060").changes
        assert all("fsdp2" not in change.command for change in changes)


def test_checkpointing_is_told_where_there_is_some() -> None:
    for on in (True, False):
        told = advise("llama-3.1-70b", Recipe(trainer="peft", gradient_checkpointing=on), "4090")
        (config,) = (change.config for change in told.changes if change.command == "--no-kbit-prep")
        assert ("gradient_checkpointing=True" in config) is on


def test_what_can_not_fit_gets_no_combination() -> None:
    told = advise("llama-3.1-405b", Recipe(trainer="peft", mode="qlora"), "t4")
    assert told.combination is None


def test_a_run_that_fits_is_told_what_else_there_is_room_for() -> None:
    told = advise("llama-3.2-1b", Recipe(trainer="peft", mode="qlora"), "a6000")
    assert not told.changes
    assert any("no checkpointing" in line for line in told.room)
    assert any("--seq-len" in line for line in told.room)
    assert any("--batch-size" in line for line in told.room)


def test_checkpointing_is_not_advised_against_where_the_options_would_contradict() -> None:
    told = advise(
        "llama-3.2-1b", Recipe(trainer="peft", gradient_checkpointing=True, use_reentrant=True), "a6000"
    )
    assert told.room
    assert not any("checkpointing" in line for line in told.room)


def test_cheap_changes_come_first() -> None:
    told = advise(
        "llama-3.1-8b", Recipe(trainer="peft", mode="lora", gradient_checkpointing=True, seq_len=4500), "4090"
    )
    ranks = {idea.cost: idea.rank for idea in IDEAS}
    fitting = [ranks[change.cost] for change in told.changes if change.verdict != "does not fit"]
    assert fitting == sorted(fitting)
    assert fitting[0] is Cost.NOTHING


def test_fit_advises_where_it_does_not_fit(memplan: Run) -> None:
    result = memplan("fit", "llama-3.1-8b", "--mode", "lora", "--batch-size", "32", "--gpu", "4090")
    assert result.status == 1
    assert "To fit the RTX 4090" in result.out
    assert max(map(len, result.out.splitlines())) <= 80
    quiet = memplan(
        "fit", "llama-3.1-8b", "--mode", "lora", "--batch-size", "32", "--gpu", "4090", "--no-advise"
    )
    assert "To fit" not in quiet.out
    as_json = memplan("fit", "llama-3.2-1b", "--gpu", "a6000", "--advise", "--json")
    assert json.loads(as_json.out)["advice"][0]["room"]


def test_advice_on_the_terminal(golden: Callable[[str, str], None]) -> None:
    told = advise("llama-3.1-8b", Recipe(trainer="peft", mode="full", seq_len=8192, batch_size=4), "4090")
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    show_advice(told, console)
    golden("advice.txt", console.file.getvalue())  # type: ignore[attr-defined]


def test_what_fits_comes_before_what_is_tight() -> None:
    changes = advise("llama-3.2-1b", Recipe(trainer="peft", mode="full"), "12GB").changes
    verdicts = [change.verdict for change in changes]
    assert {"fits", "tight"} <= {*verdicts}
    assert verdicts == sorted(verdicts, key=["fits", "tight", "does not fit"].index)
    cheaper = next(change for change in changes if change.verdict == "tight")
    assert cheaper.title == "fused linear cross entropy"  # which was told first once


def test_advice_for_a_run_that_evaluates_is_what_fit_says_of_it(memplan: Run) -> None:
    asked = ["fit", "llama-70b", "--mode", "qlora", "--gpu", "48GB", "--eval", "--json"]
    first = json.loads(memplan(*asked, "--seq-len", "3500").out)
    (advice,) = first["advice"]
    assert advice["changes"]
    for change in advice["changes"]:
        if change["verdict"] == "does not fit":
            continue
        again = json.loads(memplan(*asked, "--seq-len", "3500", *change["command"].split()).out)
        assert again["fits"][0]["verdict"] == change["verdict"]
        assert again["fits"][0]["needed_bytes"] == change["needed_bytes"]
