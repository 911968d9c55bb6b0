"""Verdicts: what they say and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import Outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from small_specs import SPECS, without_ligers_loss

from memplan import Recipe, plan
from memplan.asked.alloc_conf import AllocatorSettings
from memplan.asked.gpus import Gpu, find_gpu
from memplan.device.allocator import MIB
from memplan.device.fit import MARGIN_PER_CENT, Run, context_bytes, glance, judge, recast_bytes
from memplan.errors import MemplanError
from memplan.importers.hf import spec_from_config
from memplan.planning import predicted
from memplan.planning.plan import Plan
from memplan.predict.parameters import resolve_recipe
from memplan.tape import Category, Part, Phase, Tape, replay, static_bytes

A6000 = find_gpu("a6000")


def card(room: int) -> Gpu:
    """A card that leaves ``room`` bytes (a multiple of a MiB) beside the context."""
    visible = room + context_bytes(A6000, Run(Tape(), lambda _: None, AllocatorSettings()).card)
    return A6000.model_copy(update={"name": "test", "torch_visible_mib": visible // MIB})


def sawtooth() -> Run:
    """A step that caches 64 MiB it has no more use for, then needs 66: 130 reserved, 66 at the peak."""
    tape = Tape()
    tape.begin(Phase.SETUP, "weights", part=Part.LOADED)
    tape.begin(Phase.FORWARD, "forward")
    for size in (64, 66):
        tape.free(tape.alloc(size * MIB, "mm", Category.TEMPORARIES))
    tape.finish()
    return Run(tape, lambda _: None, AllocatorSettings())


@pytest.mark.parametrize(
    ("room", "verdict", "retries"),
    [
        (140, "fits", 0),
        (131, "tight", 0),  # less than 2 % to spare
        (130, "tight", 0),
        (129, "tight", 4),  # each step gives back what it cached, twice
        (66, "tight", 4),
        (65, "does not fit", 1),
    ],
)
def test_verdicts(room: int, verdict: str, retries: int) -> None:
    fit = judge(card(room * MIB), sawtooth())
    assert (fit.verdict, fit.needed_bytes - fit.context_bytes) == (verdict, 130 * MIB)
    assert fit.retries <= retries
    assert (fit.retries > 0) is (retries > 0)
    assert (fit.note is None) is (verdict == "fits")


def test_a_fraction_of_the_card_is_a_limit() -> None:
    run = sawtooth()
    half = Run(run.tape, run.loading, AllocatorSettings(memory_fraction=0.1))
    gpu = card(600 * MIB)
    assert judge(gpu, run).verdict == "fits"
    assert judge(gpu, half).verdict == "tight"  # a tenth of it and of the context is 124 MiB
    assert judge(gpu, half).headroom_bytes == int(0.1 * (600 + 640) * MIB) - 130 * MIB
    # 130 of 131.4 MiB are less than 2 % to spare, whatever the card has beside
    close = Run(run.tape, run.loading, AllocatorSettings(memory_fraction=0.106))
    assert judge(gpu, close).verdict == "tight"
    none = Run(run.tape, run.loading, AllocatorSettings(memory_fraction=1e-12))
    assert judge(gpu, none).verdict == "does not fit"


def test_a_glance_knows_nothing_of_settings() -> None:
    for conf in ("per_process_memory_fraction:0.05", "roundup_power2_divisions:1"):
        answer = plan(
            "llama-3.2-1b", Recipe(trainer="peft", mode="lora", alloc_conf=conf), gpus=["a6000", "4090"]
        )
        for (_, told), fit in zip(answer.glances(), answer.fits, strict=True):
            assert told == fit.verdict


def test_the_warm_up_is_bounded_by_the_card_not_by_what_is_free() -> None:
    # transformers 5.23, caching_allocator_warmup: total_device_memory - 1.2 GiB
    asked: list[int | None] = []
    run = sawtooth()
    gpu = card(65 * MIB)
    judge(gpu, Run(run.tape, lambda total: asked.append(total), AllocatorSettings()))  # type: ignore[func-returns-value]
    assert asked == [None, gpu.visible_bytes]


def test_the_70b_on_an_a6000() -> None:
    """The example that the project is about."""
    (with_upcasts,) = plan("llama-70b", Recipe(trainer="peft", mode="qlora", r=8), gpus=["a6000"]).fits
    assert with_upcasts.verdict == "does not fit"
    assert with_upcasts.note is not None
    assert with_upcasts.note.startswith("out of memory in the first step's forward")
    (without,) = plan(
        "llama-70b", Recipe(trainer="peft", mode="qlora", r=8, kbit_prep=False), gpus=["a6000"]
    ).fits
    assert without.verdict == "fits"
    assert 0.02 * without.reserved_bytes < without.headroom_bytes < 0.03 * without.reserved_bytes
    (large,) = plan("llama-70b", Recipe(trainer="peft", mode="qlora", r=8), gpus=["h100"]).fits
    assert large.verdict == "fits"


def test_settings_of_the_allocator_are_part_of_the_run() -> None:
    usual = plan("llama-3.2-1b", Recipe(trainer="peft", mode="full", optimizer="adamw_torch"), gpus=["a6000"])
    expandable = plan(
        "llama-3.2-1b",
        Recipe(trainer="peft", mode="full", optimizer="adamw_torch", alloc_conf="expandable_segments:True"),
        gpus=["a6000"],
    )
    assert usual.peak.by_category == expandable.peak.by_category
    assert expandable.peak.allocated_bytes == expandable.peak.tensor_bytes  # every rest is split off
    assert expandable.allocator.reserved_bytes < usual.allocator.reserved_bytes
    assert expandable.allocator.settings == "expandable_segments:True"
    with pytest.raises(MemplanError, match="allocator setting"):
        Recipe(trainer="peft", alloc_conf="expandable_segment:True")


def test_a_plan_from_json_knows_its_verdicts_and_no_more() -> None:
    answer = plan("llama-3.2-1b", Recipe(trainer="peft", mode="lora"), gpus=["a6000"])
    read = Plan.model_validate_json(answer.model_dump_json())
    assert (read.fits, read.allocator) == (answer.fits, answer.allocator)
    bare = Plan.model_validate(answer.model_dump(exclude={"fits", "allocator"}))
    with pytest.raises(MemplanError, match="call plan"):
        _ = bare.fits


OPTIONS = {
    "mode": ["full", "lora", "qlora"],
    "seq_len": [128, 2048, 8192],
    "batch_size": [1, 4],
    "optimizer": ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adafactor", "sgd"],
    "gradient_checkpointing": [True, False],
    "loss": ["standard", "liger"],
    "attn": [None, "eager"],
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SPECS)),
    st.integers(2, 12),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
)
def test_what_a_glance_tells_the_simulation_confirms(
    family: str, layers: int, options: dict[str, object]
) -> None:
    spec = SPECS[family](layers)
    without_ligers_loss(spec, options)
    recipe = resolve_recipe(spec, Recipe(trainer="peft", **options))
    run = predicted.run(spec, recipe)
    peak = replay(run.tape).allocated_bytes
    static = static_bytes(run.tape)
    loaded = sum(static.values()) - static[Category.OPTIMIZER_STATE]
    recast = recast_bytes(run.tape) if recipe.kbit_prep else 0
    # the smallest card that a glance calls large enough, and the largest that it calls too small
    most = peak + 11 * (peak - loaded) // 10 + recast // 2 + 500 * MIB
    enough = card(-(-most * (100 + MARGIN_PER_CENT) // 100 // MIB) * MIB + MIB)
    assert glance(enough, peak, loaded, recast) == "fits"
    assert judge(enough, run).verdict == "fits"
    small = card((peak - 1) // MIB * MIB)
    assert glance(small, peak, loaded) == "does not fit"
    assert judge(small, run).verdict == "does not fit"


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["llama-3.2-1b", "qwen2.5-7b", "gemma-2-9b", "mistral-7b-v0.1", "qwen3-0.6b"]),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
)
def test_of_true_sizes_as_well(model: str, options: dict[str, object]) -> None:
    if model == "gemma-2-9b":
        options["attn"] = "eager"
    answer = plan(model, Recipe(trainer="peft", **options))
    for (gpu, told), fit in zip(answer.glances(), answer.fits, strict=True):
        assert gpu.name == fit.gpu
        assert told == fit.verdict, gpu.name


@pytest.mark.parametrize(
    ("config", "options"),
    [
        # the head and the embedding are 2.9 GiB in 16 bits, which training so little has no use for
        ("qwen3-14b", {"seq_len": 1}),
        ("qwen3-30b-a3b", {"seq_len": 2048}),  # experts stay in 16 bits and are cast
        # one layer, and tensors of 4.4 GiB in Adafactor's step
        (
            {"model_type": "gemma2", "hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 1,
             "num_attention_heads": 32, "vocab_size": 256000},
            {"mode": "full", "optimizer": "adafactor", "seq_len": 4096},
        ),
    ],
)  # fmt: skip
def test_what_loading_leaves_is_not_overlooked_at_a_glance(
    config: str | dict[str, Any], options: dict[str, Any]
) -> None:
    model = config if isinstance(config, str) else spec_from_config(config, "one layer")
    answer = plan(model, Recipe(trainer="peft", **options), gpus=[])
    room = answer.allocator.reserved_bytes // MIB * MIB  # less than the margin is left
    static = answer.static_bytes
    loaded = static.weights + static.quantization_state + static.adapters
    recast = recast_bytes(answer.run().tape) if answer.recipe.kbit_prep else 0
    assert glance(card(room), answer.peak.tensor_bytes, loaded, recast) is None


def test_the_margin_is_what_is_promised() -> None:
    assert MARGIN_PER_CENT == 2


def test_a_share_of_the_card_is_told_beside_the_headroom(memplan: Callable[..., Outcome]) -> None:
    for command in (("fit",), ()):
        arguments = (*command, "llama-3.2-1b", "--mode", "lora", "--gpu", "a6000", "--alloc-conf")
        share = memplan(*arguments, "per_process_memory_fraction:0.1").out
        assert "PyTorch may reserve 4.74 GiB at most" in " ".join(share.split())
        assert "may reserve" not in memplan(*arguments, "expandable_segments:True").out
