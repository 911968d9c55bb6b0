"""Folding changes nothing: a tape of three played layers replays like one of all of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_specs import SPECS, without_ligers_loss

from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.predict import step, unlike
from memplan.predict.fed import whole
from memplan.predict.fold import Played, layers_to_play
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_long_tape, write_tape
from memplan.predict.unlike import standing
from memplan.shadow.tensor import playing
from memplan.tape import Tape, replay, static_bytes

OPTIONS = {
    "mode": ["full", "lora", "qlora"],
    "gradient_checkpointing": [True, False, None],
    "seq_len": [1, 7, 130],
    "batch_size": [1, 2],
    "optimizer": ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adafactor", "sgd"],
    "attn": [None, "eager"],
    "loss": ["standard", "chunked", "liger"],
    "dtype": ["bfloat16", "float32"],
    "autocast": [True, False],
    "gradient_accumulation_steps": [1, 2],
    "max_grad_norm": [0.0, 1.0],
}


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(SPECS)),
    st.integers(1, 23),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
    st.booleans(),
)
def test_folded_and_unfolded_agree_to_the_byte(
    family: str, layers: int, options: dict[str, object], reentrant: bool
) -> None:
    spec = SPECS[family](layers)
    without_ligers_loss(spec, options)
    if options["gradient_checkpointing"]:
        options["use_reentrant"] = reentrant
    recipe = resolve_recipe(spec, Recipe(trainer="peft", **options))
    folded, unfolded = write_tape(spec, recipe), write_tape(spec, recipe, folded=False)
    assert replay(folded) == replay(unfolded)
    assert static_bytes(folded) == static_bytes(unfolded)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(SPECS)),
    st.integers(3, 23),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
)
def test_a_tape_written_out_is_the_tape_played(family: str, layers: int, options: dict[str, object]) -> None:
    spec = SPECS[family](layers)
    without_ligers_loss(spec, options)
    recipe = resolve_recipe(spec, Recipe(trainer="peft", **options))
    assert told(write_long_tape(spec, recipe)) == told(write_tape(spec, recipe, folded=False))


@pytest.mark.parametrize(
    "asked",
    [
        {"mode": "qlora", "use_dora": True},  # layer 0 casts what it is given
        {"mode": "lora", "parallel": "fsdp2", "gpus": 4},  # the last layer has nothing to prefetch
        {"mode": "full", "parallel": "fsdp2", "gpus": 4, "gradient_checkpointing": True},
    ],
)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma2"])
def test_where_three_units_do_not_tell_more_do(
    family: str, asked: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[family](24)
    recipe = resolve_recipe(spec, Recipe(**asked))
    whole_tape = write_tape(spec, recipe, folded=False, looped=True)
    played: list[Played] = []
    play = step._play

    def noted(*asked: Any, **how: Any) -> Tape:
        played.append(asked[4])
        return play(*asked, **how)

    monkeypatch.setattr(step, "_play", noted)
    assert told(write_long_tape(spec, recipe, looped=True)) == told(whole_tape)
    assert not any(one.complete for one in played)


def told(tape: Tape) -> list[object]:
    """A tape without its numbering: births with all that is known of them, and which births have died since
    the last one (what dies together does so in no order that counts)."""
    story: list[object] = []
    numbers: dict[int, int] = {}
    for segment in tape.segments:
        story.append((segment.phase, segment.name, segment.layer))
        dead: set[int] = set()
        for event in tape.events[segment.start : segment.stop]:
            if event < 0:
                dead.add(numbers[~event])
                continue
            story.append(dead)
            dead = set()
            numbers[event] = len(numbers)
            story.append(
                (tape.sizes[event], tape.categories[event], tape.operations[event], tape.modules[event])
            )
        story.append(dead)
    return story


def test_most_tapes_need_not_be_played() -> None:
    # the ones that PEFT's preparation makes, and the Trainer's checkpointing: an eighth of the time
    from memplan.predict import fold, step

    for options in ({}, {"kbit_prep": False}, {"mode": "lora"}, {"mode": "full"}):
        spec = SPECS["llama"](36)
        recipe = resolve_recipe(spec, Recipe(trainer="peft", seq_len=130, **options))
        played = layers_to_play(step.kinds(spec, recipe), first_is_like_others=recipe.mode.value == "full")
        with playing():
            tape = step._play(spec, recipe, [whole(recipe)], None, played, looped=True)
            assert fold.fold(tape, played)
            assert fold.unfold(tape, played) is not None, options


@pytest.mark.parametrize("family", sorted(SPECS))
def test_long_models_are_folded_at_all(family: str) -> None:
    spec = SPECS[family](36)
    recipe = resolve_recipe(spec, Recipe(trainer="peft", seq_len=130))
    assert len(write_tape(spec, recipe).events) < 0.7 * len(write_tape(spec, recipe, folded=False).events)


def test_a_period_is_played_as_one_unit() -> None:
    played = layers_to_play(["local"] * 5 + ["global"] + ["local"] * 5 + ["global"] + ["local"] * 5)
    assert (played.layers, played.period) == (17, 6)
    assert played.complete  # two units and a rest: nothing to fold


@given(st.integers(1, 200), st.integers(1, 8), st.integers(3, 6))
def test_every_layer_is_played_or_stood_for_once(layers: int, period: int, units: int) -> None:
    played = Played(layers, period, units)
    assert sum(repeat for _, repeat in played.repeats) == layers
    assert played.indices == sorted(set(played.indices))


def test_layers_that_differ_are_all_played() -> None:
    kinds = [index * index for index in range(11)]
    assert layers_to_play(kinds).indices == list(range(11))


@pytest.mark.parametrize(
    "targets",
    [r".*layers\.[0-3]\..*q_proj", r".*layers\.\d*[13579]\..*(q|v)_proj", ("layers.7.mlp.up_proj",)],
)
def test_targets_may_tell_layers_apart(targets: str | tuple[str, ...]) -> None:
    spec = SPECS["llama"](24)
    recipe = resolve_recipe(spec, Recipe(trainer="peft", mode="qlora", target_modules=targets))
    folded, unfolded = write_tape(spec, recipe), write_tape(spec, recipe, folded=False)
    assert replay(folded) == replay(unfolded)
    assert static_bytes(folded) == static_bytes(unfolded)


# Families whose layers differ, as far as a configuration can make them.
_DIFFERING = ("gemma2", "gemma3", "qwen2", "qwen3_moe")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(_DIFFERING),
    st.lists(st.booleans(), min_size=3, max_size=24),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
    st.booleans(),
)
def test_layers_that_differ_in_no_order_agree_to_the_byte(
    family: str, differs: list[bool], options: dict[str, object], reentrant: bool
) -> None:
    spec = differing(family, differs)
    if options["gradient_checkpointing"]:
        options["use_reentrant"] = reentrant
    if options["mode"] != "full":
        options["target_modules"] = "attention"
    recipe = resolve_recipe(spec, Recipe(trainer="peft", **options))
    folded, unfolded = write_tape(spec, recipe), write_tape(spec, recipe, folded=False)
    assert replay(folded) == replay(unfolded)
    assert static_bytes(folded) == static_bytes(unfolded)
    assert told(write_long_tape(spec, recipe)) == told(unfolded)


@pytest.mark.parametrize("family", _DIFFERING)
def test_the_first_layer_may_release_what_the_last_one_left(family: str) -> None:
    """Adafactor's loop holds the last parameter's copies until it comes to the first of the next group."""
    spec = differing(family, [False, True, *(False,) * 6])
    recipe = resolve_recipe(
        spec, Recipe(trainer="peft", mode="full", optimizer="adafactor", seq_len=2, max_grad_norm=0.0)
    )
    assert told(write_long_tape(spec, recipe)) == told(write_tape(spec, recipe, folded=False))


def differing(family: str, differs: list[bool]) -> ModelSpec:
    spec = SPECS[family](len(differs))
    if family == "qwen3_moe":
        return spec.model_copy(update={"sparse_layers": tuple(differs)})
    kinds = tuple("sliding_attention" if one else "full_attention" for one in differs)
    return spec.model_copy(update={"layer_types": kinds, "sliding_window": 64})


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.integers(0, 19), min_size=1),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
)
def test_targets_may_be_any_layers(chosen: set[int], options: dict[str, object]) -> None:
    spec = SPECS["llama"](20)
    options |= {"mode": "lora", "target_modules": tuple(f"layers.{index}.mlp.up_proj" for index in chosen)}
    recipe = resolve_recipe(spec, Recipe(trainer="peft", **options))
    folded, unfolded = write_tape(spec, recipe), write_tape(spec, recipe, folded=False)
    assert replay(folded) == replay(unfolded)
    assert static_bytes(folded) == static_bytes(unfolded)
    assert told(write_long_tape(spec, recipe)) == told(unfolded)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(0, 60))
def test_whoever_stands_for_a_layer_has_its_surroundings(kinds: list[str], begins: int) -> None:
    chosen = standing(kinds, [index >= begins for index in range(len(kinds))])
    for _ in range(3):
        assert sum(times for _, times in chosen.repeats) == len(kinds)
        assert list(chosen.indices) == sorted(set(chosen.indices))
        place = {index: number for number, index in enumerate(chosen.indices)}
        for layer, stand in enumerate(chosen.stands):
            at = place[stand]
            assert [kinds[index] for index in chosen.indices[max(at - 1, 0) : at + 2]] == kinds[
                max(layer - 1, 0) : layer + 2
            ]
        chosen = chosen.longer()
    assert chosen.complete


@pytest.mark.parametrize("options", [{}, {"mode": "full"}, {"mode": "lora", "gradient_checkpointing": False}])
def test_of_layers_that_differ_in_no_order_few_are_played(options: dict[str, object]) -> None:
    order = random.Random(1)
    spec = differing("qwen2", [order.random() < 0.5 for _ in range(320)])
    recipe = resolve_recipe(spec, Recipe(trainer="peft", seq_len=130, **options))
    chosen = step.standing(step.kinds(spec, recipe), step._trained(spec, recipe))
    assert len(chosen.indices) < 40
    with playing():
        assert (
            unlike.unfold(step._play(spec, recipe, [whole(recipe)], None, chosen, looped=True), chosen)
            is not None
        )
    tape = write_tape(spec, recipe)
    assert len({(segment.start, segment.stop) for segment in tape.segments}) < 1000
    assert max(segment.layer or 0 for segment in tape.segments) == 319


def test_the_number_of_layers_is_charged() -> None:
    spec = SPECS["llama"](40)
    recipe = resolve_recipe(spec, Recipe(trainer="peft", mode="lora"))
    shorter = spec.model_copy(update={"num_hidden_layers": 39, "layer_types": ()})
    assert (
        replay(write_tape(spec, recipe)).allocated_bytes > replay(write_tape(shorter, recipe)).allocated_bytes
    )
