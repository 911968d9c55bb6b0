"""Several GPUs: the plan of each rank, against what the real engines took on cards that are not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from programs import load
from small_specs import SPECS

from memplan import Recipe, plan
from memplan.asked.spec import ModelSpec
from memplan.errors import MemplanError
from memplan.planning import predicted
from memplan.planning.traced import trace_plan
from memplan.predict import step as steps
from memplan.predict.blueprint import named_shapes
from memplan.predict.loading import loading
from memplan.predict.parameters import resolve_recipe
from memplan.predict.ranks import alike
from memplan.predict.step import write_long_tape, write_tape
from memplan.shadow.tensor import playing
from memplan.strategies.fsdp2 import Fsdp2
from memplan.tape import Category, Tape, replay
from memplan.tape.curves import live_bytes

ROOT = Path(__file__).resolve().parents[1]
ROWS = json.loads((ROOT / "data" / "ranks.json").read_text(encoding="utf-8"))["rows"]
Run = Callable[..., Outcome]


RUNNER: Any = load("ranks_run", ROOT / "benchmarks" / "ranks" / "run.py")
CASES = {case.name: case for case in RUNNER.cases()}


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_a_rank_takes_what_the_real_engine_took(row: dict[str, Any]) -> None:
    case = CASES[row["name"]]
    assert (case.model, case.layers, case.recipe) == (row["model"], row["layers"], row["recipe"])
    planned = RUNNER.planned(case)
    assert planned == {kind: row[kind]["predicted"] for kind in planned}
    assert planned["tensors"] == row["tensors"]["emulated"]


def test_every_kind_of_case_is_among_the_rows() -> None:
    told = [row["recipe"] for row in ROWS]
    assert {one["parallel"] for one in told} == {
        "ddp", "fsdp", "fsdp2", "tp", "zero1", "zero2", "zero3",
    }  # fmt: skip
    flat = [one for one in told if one["parallel"] == "fsdp"]
    assert {one.get("backward_prefetch") for one in flat} == {None, "backward_pre", "backward_post"}
    assert {one["mode"] for one in flat} == {"full", "lora", "qlora"}
    assert {one.get("offload") for one in told} == {None, "optimizer", "both"}
    assert {one["mode"] for one in told} == {"full", "lora", "qlora"}
    assert {one["gpus"] for one in told} == {2, 3, 4, 8, 12, 16, 64}
    replicated = [one for one in told if "dp_replicate" in one]
    kept = [one for one in told if "reshard_after_forward" in one]
    assert {(one["parallel"], one["dp_replicate"]) for one in replicated} == {
        ("fsdp2", 2), ("fsdp2", 4), ("fsdp", 2),
    }  # fmt: skip
    assert {(one["parallel"], one["mode"]) for one in kept} == {
        ("fsdp2", "full"), ("fsdp2", "lora"), ("fsdp2", "qlora"), ("fsdp", "full"), ("fsdp", "lora"),
    }  # fmt: skip
    assert {one["trainer"] for one in told} == {"peft", "trl"}
    assert {one["gradient_accumulation_steps"] for one in told} == {1, 2}
    divided = [one for one in told if one["parallel"] == "tp"]
    assert {(one["mode"], one["trainer"]) for one in divided} == {
        (mode, trainer) for mode in ("full", "lora") for trainer in ("peft", "trl")
    }
    assert len(told) == len(CASES)


def test_reserved_bytes_are_mostly_those_of_the_real_engine() -> None:
    """Of the others docs/several.md says what is left."""
    apart = [abs(row["reserved"]["predicted"] / row["reserved"]["emulated"] - 1) for row in ROWS]
    assert apart.count(0.0) >= 175
    assert sum(one <= 0.01 for one in apart) >= 200


def test_of_flat_parameters_the_rank_with_the_most_pieces_is_played() -> None:
    recipe = Recipe(mode="full", parallel="fsdp", gpus=3)
    told = plan("qwen3-0.6b", recipe, gpus=[])
    spec, asked = told.study.asked.spec, told.recipe.resolved()
    tapes = [predicted.run(spec, asked, rank=rank).tape for rank in range(3)]
    peaks = [replay(tape).allocated_bytes for tape in tapes]
    assert len(set(peaks)) > 1
    assert told.peak.tensor_bytes == max(peaks)
    assert [rank.count for rank in told.ranks] == [3]


def test_units_as_pytorchs_tutorial_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3.1-8B, ``fully_shard`` on each layer and on the model, fp32 shards, bf16 compute, sums in fp32,
    one sequence of 4,096 tokens, world 8, second step: torch 2.13's CUDA build on an emulated A100 80GB."""
    from memplan.importers.resolve import resolve

    spec = resolve("llama-3.1-8b").spec
    recipe = Recipe(
        trainer="peft", mode="full", seq_len=4096, parallel="fsdp2", gpus=8, autocast=True,
        gradient_checkpointing=True, reduce_dtype="float32", loss="standard",
    )  # fmt: skip
    monkeypatch.setattr(steps, "_spread", lambda recipe, rank=0: Fsdp2(recipe, rank, by_itself=True))
    tape = write_tape(spec, resolve_recipe(spec, recipe))
    assert replay(tape).allocated_bytes == 22_114_403_840


HOW: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "full, two passes": {"mode": "full", "gradient_accumulation_steps": 2},
    "full, as the Trainer": {"mode": "full", "trainer": "peft", "autocast": True},
    "lora": {"mode": "lora"},
    "qlora": {"mode": "qlora"},
}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "fsdp2"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mixtral"])
def test_layers_may_be_folded(family: str, how: dict[str, Any], parallel: str) -> None:
    spec = SPECS[family](7)
    given = {"target_modules": "attention"} if family == "mixtral" and how["mode"] != "full" else {}
    recipe = resolve_recipe(spec, Recipe(**how, **given, parallel=parallel, gpus=3, seq_len=64))
    every = write_tape(spec, recipe, folded=False, looped=True)
    assert replay(write_tape(spec, recipe, looped=True)).allocated_bytes == replay(every).allocated_bytes
    long = write_long_tape(spec, recipe, looped=True)
    assert (live_bytes(long), _streams(long)) == (live_bytes(every), _streams(every))


APART: dict[str, dict[str, Any]] = {
    "fsdp2, replicas": {"parallel": "fsdp2", "gpus": 6, "dp_replicate": 2},
    "fsdp2, kept": {"parallel": "fsdp2", "gpus": 3, "reshard_after_forward": False},
    "fsdp, replicas": {"parallel": "fsdp", "gpus": 6, "dp_replicate": 2},
    "fsdp, kept": {"parallel": "fsdp", "gpus": 3, "reshard_after_forward": False},
}


@pytest.mark.parametrize("spread", APART.values(), ids=APART)
@pytest.mark.parametrize("how", [HOW["full, two passes"], HOW["lora"]], ids=["full", "lora"])
def test_layers_that_stay_or_are_there_twice_may_be_folded(
    how: dict[str, Any], spread: dict[str, Any]
) -> None:
    spec = SPECS["llama"](7)
    recipe = resolve_recipe(spec, Recipe(**how, **spread, seq_len=64))
    every = write_tape(spec, recipe, folded=False, looped=True)
    assert replay(write_tape(spec, recipe, looped=True)).allocated_bytes == replay(every).allocated_bytes
    long = write_long_tape(spec, recipe, looped=True)
    assert (live_bytes(long), _streams(long)) == (live_bytes(every), _streams(every))


def test_a_replica_is_divided_as_the_same_number_alone_is() -> None:
    one, two = (
        plan("qwen3-0.6b", Recipe(mode="full", parallel="fsdp2", gpus=gpus, dp_replicate=times), gpus=[])
        for gpus, times in ((3, None), (6, 2))
    )
    assert one.static_bytes == two.static_bytes
    assert [(rank.rank, rank.count) for rank in two.ranks] == [(0, 4), (2, 2)]
    sums = two.peak.tensor_bytes - one.peak.tensor_bytes  # in bf16, of all that is trained
    assert 0 < sums <= 2 * two.parameters.total / 3


def _streams(tape: Tape) -> list[int]:
    return [tape.streams.get(event, 0) for event in tape.events if event >= 0]


def test_what_rests_is_divided_and_what_is_gathered_has_a_category() -> None:
    one, eight = (
        plan("llama-3.1-8b", Recipe(mode="full", parallel=parallel, gpus=gpus), gpus=[])
        for parallel, gpus in ((None, 1), ("fsdp2", 8))
    )
    for part in ("weights", "optimizer_state"):
        share = getattr(one.static_bytes, part) / getattr(eight.static_bytes, part)
        assert share == pytest.approx(8, rel=1e-3)
    assert one.peak.by_category.communication == 0 < eight.peak.by_category.communication
    assert sum(eight.peak.by_category.model_dump().values()) == eight.peak.tensor_bytes
    ddp = plan("llama-3.2-1b", Recipe(mode="full", parallel="ddp", gpus=8), gpus=[])
    assert ddp.static_bytes.communication == ddp.static_bytes.weights - 1024  # but the rotary tables


def test_ranks_that_have_less_are_told() -> None:
    told = plan("qwen3-0.6b", Recipe(mode="full", parallel="fsdp2", gpus=3), gpus=[])
    assert [(rank.rank, rank.count) for rank in told.ranks] == [(0, 2), (2, 1)]
    most, least = told.ranks
    assert most.peak_allocated_bytes == told.peak.allocated_bytes > least.peak_allocated_bytes
    assert most.reserved_bytes == told.allocator.reserved_bytes >= least.reserved_bytes
    assert plan("qwen3-0.6b", Recipe(mode="full"), gpus=[]).ranks == ()


@pytest.mark.parametrize("world", [2, 3, 8, 64, 300])
def test_alike_are_those_with_as_many_rows(world: int) -> None:
    spec = SPECS["llama"](2)
    recipe = resolve_recipe(spec, Recipe(mode="full", parallel="fsdp2", gpus=world))
    found = alike(spec, recipe)
    assert sum(count for _, count in found) == world
    assert found[0][0] == 0
    sizes = []
    for rank, _ in found:
        tape = write_tape(spec, recipe, rank=rank)
        resting = dict.fromkeys(Category, 0)
        for segment in tape.segments:
            if segment.phase.value == "setup":
                for event in tape.events[segment.start : segment.stop]:
                    resting[tape.categories[event]] += tape.sizes[event] * segment.repeat
        sizes.append(resting[Category.OPTIMIZER_STATE])
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1 or len(sizes) == 1


def test_gradients_are_whole_until_the_last_pass() -> None:
    spec = SPECS["llama"](4)
    peaks = []
    for passes in (1, 2):
        recipe = Recipe(mode="full", parallel="fsdp2", gpus=8, seq_len=64, gradient_accumulation_steps=passes)
        tape = write_tape(spec, resolve_recipe(spec, recipe))
        peaks.append(replay(tape).by_category[Category.GRADIENTS])
    assert peaks[1] > 3 * peaks[0]  # bf16 and whole, instead of fp32 and an eighth


def test_streams_have_pools_of_their_own() -> None:
    from memplan.device.playback import simulate

    spec = SPECS["llama"](4)
    recipe = resolve_recipe(spec, Recipe(mode="full", parallel="fsdp2", gpus=2, seq_len=64))
    tape = write_long_tape(spec, recipe)
    assert {tape.streams.get(event, 0) for event in tape.events if event >= 0} == {0, 1, 2}
    apart = simulate(tape).reserved
    tape.streams = {}
    assert simulate(tape).reserved < apart


def test_why_sharding_4_bit_weights_is_no_help_is_said(memplan: Run) -> None:
    counted = memplan("fit", "llama-70b", "--mode", "qlora", "--gpu", "4090", "--how-many", "--no-advise")
    assert "fsdp2: no number of them is enough: each loads all of the 4-bit weights first" in counted.out
    asked = ("fit", "llama-3.1-8b", "--gpu", "8x4090", "--parallel", "fsdp2", "--mode")
    told = "Each GPU loads all of the 4-bit weights before it keeps its part."
    assert told in memplan(*asked, "qlora").out
    assert told not in memplan(*asked, "lora").out


def test_a_card_may_say_how_many(memplan: Run) -> None:
    by_card = memplan("llama-3.2-1b", "--mode", "full", "--parallel", "fsdp2", "--gpu", "8xh100", "--json")
    by_count = memplan(
        "llama-3.2-1b", "--mode", "full", "--parallel", "fsdp2", "--gpus", "8", "--gpu", "h100", "--json"
    )
    assert by_card.status == 0
    assert by_card.out == by_count.out
    (rank,) = json.loads(by_card.out)["ranks"]
    sizes = {"peak_allocated_bytes", "reserved_bytes", "host_bytes", "host_pinned_bytes"}
    assert rank.keys() == {"rank", "count", *sizes}
    assert (rank["rank"], rank["count"]) == (0, 8)
    told = memplan("llama-3.2-1b", "--mode", "full", "--gpu", "8xh100")
    assert told.out.startswith("Each of 8 H100 80GB HBM3: fits, ")
    assert "ddp on 8 GPUs" in told.out


@pytest.mark.parametrize("command", ["fit", "compare", "frontier"])
def test_other_questions_hear_it_too(command: str, memplan: Run) -> None:
    asked = ["llama-3.2-1b", "--parallel", "fsdp2", "--gpu", "2x4090"]
    asked += ["--batch-sizes", "1", "--json"] if command == "frontier" else ["--json"]
    outcome = memplan(command, *asked)
    assert outcome.status == 0, outcome.err
    assert '"gpus": 2' in outcome.out
    assert '"parallel": "fsdp2"' in outcome.out
    outcome = memplan(command, *asked, "--gpus", "4")
    assert (outcome.status, outcome.out) == (2, "")
    assert "2 cards were named, and gpus says 4" in outcome.err


REFUSED = [
    (("--parallel", "fsdp2"), "fsdp2 is for several GPUs: say how many, such as --gpus 8"),
    (
        ("--gpus", "8", "--parallel", "fsdp2", "--optimizer", "adamw_bnb_8bit"),
        "can't update sharded parameters",
    ),
    (
        ("--gpus", "8", "--parallel", "fsdp2", "--mode", "lora", "--use-dora"),
        "DoRA under FSDP2 is not planned",
    ),
    (("--gpus", "8", "--parallel", "fsdp2", "--use-reentrant"), "non-reentrant checkpointing"),
    (
        ("--gpus", "8", "--parallel", "fsdp", "--use-reentrant"),
        "FSDP1 with use_reentrant True is not planned",
    ),
    (
        ("--gpus", "8", "--parallel", "fsdp", "--mode", "lora", "--dtype", "fp16"),
        "FSDP1 with dtype float16 is not planned",
    ),
    (("--gpus", "8", "--parallel", "fsdp", "--trainer", "peft"), "use --no-kbit-prep, or --parallel fsdp2"),
    (("--gpus", "8", "--parallel", "fsdp", "--offload", "optimizer"), "together: use --offload both"),
    (("--gpus", "8", "--parallel", "fsdp2", "--forward-prefetch"), "forward_prefetch is FSDP1's"),
    (("--gpus", "8", "--parallel", "fsdp2", "--mode", "lora", "--no-autocast"), "use --autocast"),
    (("--gpus", "8", "--dp-replicate", "2"), "dp_replicate is FSDP's: use --parallel fsdp2"),
    (("--gpus", "8", "--parallel", "fsdp2", "--dp-replicate", "8"), "nothing to shard: use --parallel ddp"),
    (("--gpus", "8", "--parallel", "fsdp2", "--dp-replicate", "3"), "8 GPUs are not as many in each of 3"),
    (("--parallel", "fsdp2", "--dp-replicate", "3"), "fsdp2 is for several GPUs"),
    (("--gpus", "8", "--parallel", "fsdp2", "--dp-shard", "3"), "--dp-shard 3 does not make 8 GPUs"),
    (("--gpus", "8", "--parallel", "fsdp2", "--dp-shard", "many"), "takes a whole number of GPUs"),
    (("--gpus", "8", "--no-reshard-after-forward"), "reshard_after_forward is FSDP's"),
    (
        ("--gpus", "8", "--parallel", "fsdp", "--no-reshard-after-forward"),
        "stops in backward where 4-bit weights stay gathered",
    ),
    (("--gpus", "8", "--shard-dtype", "bf16"), "shard_dtype is of FSDP2's mixed precision"),
    (("--gpus", "2", "--gpu", "8xh100"), "8 cards were named, and gpus says 2"),
    (("--gpus", "2", "--gpu", "1xh100"), "one card was named, and gpus says 2"),
    (("--gpu", "2xa100", "--gpu", "8xh100"), "one number of GPUs"),
    (("--gpu", "0xh100"), "is no card"),
    (("--gpus", "0"), "gpus"),
    (("--gpus", "8", "--parallel", "fsdp3"), "fsdp3"),
]


@pytest.mark.parametrize(("options", "told"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_what_cannot_be_is_refused_in_a_sentence(options: tuple[str, ...], told: str, memplan: Run) -> None:
    outcome = memplan("llama-3.2-1b", *options)
    assert outcome.status == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == 1


def test_adapters_on_the_host_need_an_embedding_that_puts_out(memplan: Run) -> None:
    for mode in ("lora", "qlora"):
        asked = ("--mode", mode, "--parallel", "fsdp2", "--gpus", "8", "--offload", "both")
        refused = memplan("llama-3.1-8b", *asked)
        assert refused.status == 2
        assert "gathers what NCCL can't send; use --trainer peft" in refused.err
        assert memplan("llama-3.2-1b", *asked).status == 0
        assert memplan("llama-3.1-8b", *asked, "--trainer", "peft", "--autocast").status == 0


def test_a_trace_is_of_one_gpu_and_a_verification_of_several_needs_a_trainer(memplan: Run) -> None:
    for command, said in (("trace", "one GPU"), ("verify", "use --loop trainer")):
        outcome = memplan(command, "llama-3.2-1b", "--gpus", "2")
        assert outcome.status == 2
        assert said in outcome.err
    with pytest.raises(MemplanError, match="a trace is of one GPU"):
        trace_plan("llama-3.2-1b", gpus=["8xh100"])


def test_of_flat_parameters_no_evaluation_is_planned(memplan: Run) -> None:
    asked = ("fit", "llama-3.2-1b", "--mode", "full", "--parallel", "fsdp", "--gpu", "3x24GB")
    outcome = memplan(*asked, "--seq-len", "32768", "--json")
    assert outcome.status in (0, 1), outcome.err
    counted = memplan("fit", "llama-3.2-1b", "--mode", "full", "--how-many", "--gpu", "t4")
    assert "fsdp: " in counted.out, counted.err


def test_flat_parameters_have_no_adapted_experts(memplan: Run) -> None:
    outcome = memplan("qwen3-30b-a3b", "--mode", "lora", "--parallel", "fsdp", "--gpus", "8")
    assert outcome.status == 2
    assert "adapters on experts under FSDP1 are not planned" in outcome.err


def test_one_gpu_is_as_before() -> None:
    spec: ModelSpec = SPECS["llama"](3)
    with pytest.raises(MemplanError):
        resolve_recipe(spec, Recipe(parallel="ddp"))
    recipe = resolve_recipe(spec, Recipe(gpus=1))
    assert recipe.parallel is None
    with playing():
        assert steps._spread(recipe) is None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapted_experts_in_four_bits_come_onto_the_card_once(family: str) -> None:
    """Their adapters are called alike."""
    spec = SPECS[family](2)
    recipe = resolve_recipe(spec, Recipe(mode="qlora", parallel="fsdp2", gpus=8, seq_len=64))
    loaded = loading(spec, recipe, write_long_tape(spec, recipe))
    dropped = [~event for event in loaded.events if event < 0]
    assert len(dropped) == len(set(dropped)) > 0


def test_a_bias_is_not_taken_for_its_weight_where_it_is_loaded() -> None:
    spec = SPECS["qwen2"](2)
    recipe = resolve_recipe(spec, Recipe(mode="full", parallel="fsdp2", gpus=2, seq_len=64))
    step = write_long_tape(spec, recipe)
    loaded = loading(spec, recipe, step)
    whole = sorted(size for size in loaded.sizes[len(step.sizes) :] if size > 4096)
    assert whole == sorted(4 * prod(shape) for name, shape in named_shapes(spec).items() if len(shape) > 1)


def test_a_peak_is_that_of_the_first_ranks(memplan: Run) -> None:
    for parallel in ("ddp", "fsdp2"):
        told = plan("llama-3.2-1b", Recipe(mode="lora", parallel=parallel, gpus=3), gpus=[])
        assert told.ranks[0].peak_allocated_bytes == told.peak.allocated_bytes


def test_a_card_of_a_file_may_say_how_many(tmp_path: Path) -> None:
    path = tmp_path / "axolotl.yaml"
    path.write_text(
        "base_model: meta-llama/Llama-3.2-1B\nadapter: lora\nlora_r: 8\nlora_alpha: 16\n"
        "lora_target_linear: true\nsequence_len: 512\nmicro_batch_size: 1\n"
        "optimizer: adamw_torch\nbf16: true\n",
        encoding="utf-8",
    )
    assert plan(path, gpus=["8xh100"]).recipe.gpus == 8
    assert plan(path, Recipe(parallel="fsdp2"), gpus=["8xh100"]).recipe.parallel == "fsdp2"


def test_a_number_of_cards_may_be_of_what_is_here(memplan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from memplan.device import driver
    from memplan.device.driver import Installed

    here = {"NVIDIA GeForce RTX 4090": Installed(25_000 << 20, (8, 9))}
    monkeypatch.setattr(driver, "installed", lambda: here)
    outcome = memplan("fit", "llama-3.2-1b", "--gpu", "2xauto")
    assert outcome.out.startswith("Each of 2 RTX 4090: fits, ")
    outcome = memplan("fit", "llama-3.2-1b", "--gpu", "1024xh100")
    assert outcome.out.startswith("Each of 1024 H100")


HOW_MANY = [
    (
        ("--optimizer", "adamw_bnb_8bit"),
        1,
        "fsdp2: FSDP2 is planned with adamw_torch and adamw_torch_fused, not",
    ),
    (("--parallel", "fsdp2"), 0, "fsdp2: 9 × RTX 4090 "),
    (("--parallel", "fsdp2", "--shard-dtype", "bf16"), 0, "fsdp2: 5 × RTX 4090 "),
    (("--parallel", "ddp"), 1, "ddp: no number of them is enough "),
]


@pytest.mark.parametrize(("options", "status", "told"), HOW_MANY, ids=[" ".join(one[0]) for one in HOW_MANY])
def test_how_many_are_of_the_strategies_that_can_be_had(
    options: tuple[str, ...], status: int, told: str, memplan: Run
) -> None:
    asked = ("llama-3.1-8b", "--mode", "full", "--gpu", "4090", "--how-many", "--no-advise")
    outcome = memplan("fit", *asked, *options)
    assert outcome.status == status, outcome.err
    assert told in " ".join(outcome.out.split())
    if "--parallel" in options:
        answer = json.loads(memplan("fit", *asked, *options, "--json").out)
        assert [one["parallel"] for one in answer["how_many"]] == [options[1]]
        assert answer["recipe"]["gpus"] == (answer["how_many"][0]["gpus"] or 1)


def test_how_many_is_no_question_about_a_number(memplan: Run) -> None:
    for options in (
        ("--gpu", "8xh100"),
        ("--gpu", "h100", "--gpus", "8"),
        ("--gpu", "h100", "--maximize", "seq-len"),
    ):
        outcome = memplan("fit", "llama-3.2-1b", "--how-many", *options)
        assert outcome.status == 2
        assert "look" in outcome.err
        assert outcome.err.count("\n") == 1


def test_the_largest_that_fits_each_is_the_largest(memplan: Run) -> None:
    for parallel in ("ddp", "fsdp2"):
        options = ("llama-3.2-1b", "--mode", "lora", "--parallel", parallel, "--gpu", "2x4090")
        told = memplan("fit", *options, "--maximize", "batch-size")
        assert told.status == 0, told.err
        most = int(told.out.split()[2])
        assert (
            "sequences at once fit each of 2 RTX 4090 (2,048 tokens each)\nEach of 2 RTX 4090: fits, "
            in told.out
        )
        assert memplan("fit", *options, "--batch-size", str(most + 1)).out.startswith(
            "Each of 2 RTX 4090: tight"
        )


def test_fsdp2_is_advised_where_ddp_is_too_large(memplan: Run) -> None:
    told = memplan("fit", "llama-3.1-8b", "--mode", "full", "--gpu", "8xh100").out
    assert "\nIt fits with --parallel fsdp2 (" in told
    told = memplan(
        "fit", "llama-3.1-8b", "--mode", "full", "--parallel", "fsdp2", "--gpu", "2x24GB", "--verbose"
    ).out
    assert "\nIt fits with --offload both (" in told
    assert "\n  --mode qlora\n" in told  # with mixed precision, which adapters need there


def test_several_are_told_as_several(memplan: Run) -> None:
    told = memplan("llama-3.2-1b", "--mode", "lora", "--gpus", "4").out
    assert " reserved on each of 4 GPUs: fits all of 9 cards" in told
    assert "--gpu 4xNAME" in " ".join(told.split())
    told = memplan("compare", "llama-3.2-1b", "--gpu", "4xh100").out
    assert told.startswith("full  fits on each of 4 H100 80GB HBM3 (")
    told = memplan("compare", "llama-3.2-1b", "--mode", "lora", "--sweep", "gpus=1,2").out
    assert "device-map" not in told


def test_adapters_of_experts_are_divided_too() -> None:
    spec = SPECS["qwen3_moe"](2)
    recipe = resolve_recipe(spec, Recipe(mode="lora", parallel="fsdp2", gpus=3))
    assert len(alike(spec, recipe)) > 1


def test_a_frontier_is_of_each_card(memplan: Run) -> None:
    for parallel in ("ddp", "fsdp2"):
        told = memplan(
            "frontier", "llama-3.2-1b", "--modes", "lora", "--parallel", parallel, "--gpu", "2x4090",
            "--batch-sizes", "4", "--no-exact",
        )  # fmt: skip
        assert "on each of 2 RTX 4090, 23.52 GiB usable" in told.out


def test_advice_is_no_matter_of_a_launchers_file(tmp_path: Path, memplan: Run) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(
        "distributed_type: MULTI_GPU\nnum_processes: 8\nmixed_precision: bf16\n", encoding="utf-8"
    )
    outcome = memplan("fit", "llama-3.1-8b", "--mode", "full", "--config", str(path), "--gpu", "h100")
    assert outcome.status == 1
    told = " ".join(outcome.out.split())
    assert "It fits with accelerate launch --use_fsdp --fsdp_version 2 " in told
    asked = ("fit", "llama-3.1-8b", "--config", str(path), "--gpu", "h100", "--how-many")
    assert memplan(*asked).out.startswith("One H100 80GB HBM3 is enough")  # whatever number the file says


def test_the_fewest_that_are_tight_are_told_beside_those_that_fit(memplan: Run) -> None:
    asked = ("llama-3.1-8b", "--mode", "full", "--gpu", "4090", "--parallel", "fsdp2")
    told = memplan("fit", *asked, "--how-many", "--no-advise", "--json")
    (found,) = json.loads(told.out)["how_many"]
    assert found["tight_gpus"] < found["gpus"]
    for count, verdict in (
        (found["gpus"], "fits"),
        (found["tight_gpus"], "tight"),
        (found["tight_gpus"] - 1, "does not fit"),
    ):
        fits = json.loads(memplan("fit", *asked, "--gpus", str(count), "--no-advise", "--json").out)["fits"]
        assert [fit["verdict"] for fit in fits] == [verdict], count
    assert f" on each); tight on {found['tight_gpus']}\n" in memplan(
        "fit", *asked, "--how-many", "--no-advise"
    ).out.replace("\ntight", " tight")


def test_several_whose_card_is_not_named_are_judged_on_some(memplan: Run) -> None:
    outcome = memplan("fit", "llama-3.1-8b", "--mode", "full", "--parallel", "zero3", "--gpus", "8")
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("On each of 8 GPUs: fits the RTX 5090 (31.36) and larger, not the RTX 4090")
    assert memplan("fit", "llama-3.1-405b", "--mode", "full", "--gpus", "2").status == 1
    for options in ((), ("--gpus", "1"), ("--how-many", "--parallel", "ddp")):
        outcome = memplan("fit", "llama-3.1-8b", *options)
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err.startswith("memplan: the following arguments are required: --gpu")


REPLICAS = [
    ("--gpus 16 --dp-replicate 2", 16, 2),
    ("--nodes 2 --gpus 8 --replicate 2", 16, 2),
    ("--gpus 16 --dp-shard 8", 16, 2),
    ("--gpu 8xh100 --nodes 2 --dp_shard_size 8", 16, 2),
    ("--dp_shard_size 8 --dp_replicate_size 2", 16, 2),
    ("--nodes 2 --dp-shard 8 --dp-replicate 2", 16, 2),
    ("--gpus 8 --dp-shard 8", 8, None),
    ("--dp-shard 8", 8, None),
]


@pytest.mark.parametrize(("options", "gpus", "replicas"), REPLICAS, ids=[one[0] for one in REPLICAS])
def test_replicas_and_shards_make_all_gpus(
    options: str, gpus: int, replicas: int | None, memplan: Run
) -> None:
    asked = ("llama-3.2-1b", "--mode", "full", "--parallel", "fsdp2", *options.split())
    answer = json.loads(memplan(*asked, "--json").out)
    assert (answer["recipe"]["gpus"], answer["recipe"]["dp_replicate"]) == (gpus, replicas)
    told = f", {replicas} replicas × 8 shards" if replicas else f"fsdp2 on {gpus} GPUs"
    assert told in " ".join(memplan(*asked).out.split())


def test_how_many_of_replicas_are_as_many_of_each(memplan: Run) -> None:
    asked = ("fit", "llama-3.1-8b", "--mode", "full", "--gpu", "4090", "--parallel", "fsdp2", "--how-many")
    asked += ("--no-advise", "--dp-replicate", "3", "--json")
    (found,) = json.loads(memplan(*asked).out)["how_many"]
    assert found["gpus"] % 3 == found["tight_gpus"] % 3 == 0
    alone = ("fit", "llama-3.1-8b", "--mode", "full", "--parallel", "fsdp2", "--dp-replicate", "3")
    for count, verdict in ((found["gpus"], "fits"), (found["gpus"] - 3, "tight")):
        outcome = memplan(*alone, "--gpu", f"{count}x4090", "--no-advise", "--json")
        assert [fit["verdict"] for fit in json.loads(outcome.out)["fits"]] == [verdict]


NODES = [
    ("--nodes 2 --gpus 8", 16, 2, ""),
    ("--num-nodes 2 --gpus-per-node 8", 16, 2, "--num-nodes 2 is --nodes 2, --gpus-per-node 8 is --gpus 8"),
    ("--nnodes=2 --nproc_per_node=8", 16, 2, "--nnodes 2 is --nodes 2, --nproc_per_node 8 is --gpus 8"),
    ("--num_machines 2 --num_processes 16", 16, 2, "--num_processes 16 is --gpus 8 on each of 2 nodes"),
    ("--num_processes 16", 16, None, "--num_processes 16 is --gpus 16"),
    ("--gpu 8xh100 --nodes 2", 16, 2, ""),
    ("--nodes 1 --gpus 8", 8, 1, ""),
]


@pytest.mark.parametrize(("options", "gpus", "nodes", "echoed"), NODES, ids=[one[0] for one in NODES])
def test_nodes_have_so_many_gpus_each(
    options: str, gpus: int, nodes: int | None, echoed: str, memplan: Run
) -> None:
    asked = ("llama-3.1-8b", "--mode", "full", "--parallel", "zero3", *options.split())
    outcome = memplan(*asked, "--json")
    assert outcome.status == 0, outcome.err
    answer = json.loads(outcome.out)
    assert (answer["recipe"]["gpus"], answer["recipe"]["nodes"]) == (gpus, nodes)
    assert echoed in outcome.err
    told = "zero3 on 16 GPUs (2 nodes × 8)" if nodes == 2 else f"zero3 on {gpus} GPUs"
    assert told in " ".join(memplan(*asked).out.split())
    alone = json.loads(memplan(*asked[:5], "--gpus", str(gpus), "--json").out)
    assert answer["peak"] == alone["peak"]  # which nodes do not change


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--nodes 2", "say how many GPUs each has"),
        ("--num-processes 15 --nodes 2", "which 2 nodes can't divide evenly"),
        ("--nodes 0 --gpus 2", "nodes"),
        ("--nodes 4096 --gpus 8", "gpus"),
        ("--gpu 8xh100 --gpus 4 --nodes 2", "8 cards were named, and gpus says 4"),
    ],
)
def test_nodes_that_can_not_be(options: str, told: str, memplan: Run) -> None:
    outcome = memplan("llama-3.2-1b", *options.split())
    assert outcome.status == 2
    assert told in outcome.err


@pytest.mark.parametrize(("fixed", "swept"), [("--nodes=2", "gpus=4,8"), ("--gpus=4", "nodes=2,4")])
def test_a_sweep_goes_through_nodes_and_their_gpus(fixed: str, swept: str, memplan: Run) -> None:
    asked = (
        "compare",
        "llama-3.2-1b",
        "--mode",
        "full",
        "--parallel",
        "fsdp2",
        fixed,
        "--sweep",
        swept,
        "--json",
    )
    outcome = memplan(*asked)
    assert outcome.status == 0, outcome.err
    plans = json.loads(outcome.out)["plans"]
    assert [one["recipe"]["gpus"] for one in plans] == [8, 16]


def test_a_host_s_memory_that_nothing_is_held_against_is_said(memplan: Run) -> None:
    asked = ("llama-3.1-8b", "--mode", "full", "--parallel", "zero3", "--host-memory", "60GB")
    assert "nothing of this run is offloaded" in memplan(*asked, "--gpus", "8").err
    counted = memplan("fit", *asked, "--offload", "both", "--gpu", "4090", "--how-many")
    assert counted.status == 2
    assert "of the fewest GPUs that are enough, 2 processes keep" in counted.err


def test_the_hosts_memory_is_of_each_node(memplan: Run) -> None:
    asked = ("llama-3.1-8b", "--mode", "full", "--parallel", "zero3", "--offload", "both")
    one = memplan(*asked, "--gpus", "8")
    assert "170.25 GiB for 8;" in " ".join(one.out.split())
    two = memplan(*asked, "--nodes", "2", "--gpus", "4", "--host-memory", "100GB")
    assert two.status == 0, two.err
    assert "85.12 GiB for 4 of a node;" in " ".join(two.out.split())
    refused = memplan(*asked, "--nodes", "2", "--gpus", "4", "--host-memory", "80GB")
    assert refused.status == 2
    assert "4 processes of a node keep 21.28 GiB each on the host" in refused.err


def test_a_comparison_leaves_out_what_the_host_has_no_room_for(memplan: Run) -> None:
    asked = ("compare", "llama-3.1-8b", "--gpus", "8", "--parallel", "zero2", "--offload", "optimizer")
    outcome = memplan(*asked, "--modes", "full,lora", "--host-memory", "60GB", "--json")
    assert outcome.status == 0, outcome.err
    assert [one["recipe"]["mode"] for one in json.loads(outcome.out)["plans"]] == ["lora"]
    assert "one plan (full) is left out, for the host has no room: 8 processes keep" in outcome.err
    outcome = memplan(*asked, "--modes", "full", "--host-memory", "60GB")
    assert (outcome.status, outcome.out) == (2, "")


def test_what_fsdp2_offloads_is_of_all_layers() -> None:
    for layers in (3, 5, 14):
        spec = SPECS["llama"](layers)
        asked = Recipe(mode="full", parallel="fsdp2", gpus=4, offload="both", gradient_checkpointing=True)
        recipe = resolve_recipe(spec, asked)
        assert write_tape(spec, recipe).host == write_tape(spec, recipe, folded=False).host
