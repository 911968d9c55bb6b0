"""What is not modelled is refused in a sentence, and what was once forgotten is on the tape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome

import memplan.planning.plan
from memplan import MemplanError, ModelSpec, Recipe, plan


def test_adapters_on_a_tied_output_layer_are_allocated() -> None:
    # r=8: 8 x (2048 + 128256) fp32 of lm_head and 8 x (2048 + 2048) of each of 16 q_proj
    answer = plan("llama-3.2-1b", Recipe(trainer="peft", mode="lora", target_modules=("lm_head", "q_proj")))
    assert answer.parameters.trainable == 8 * (2048 + 128_256) + 16 * 8 * (2048 + 2048)
    assert answer.static_bytes.adapters == 4 * answer.parameters.trainable


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("llama-3.1-8b", {"target_modules": ("embed_tokens", "q_proj")}, "embed_tokens"),
        ("llama-3.1-8b", {"target_modules": ("lm_head", "q_proj"), "loss": "chunked"}, "leave lm_head out"),
        ("llama-3.1-8b", {"adapter_dtype": "float16"}, "float16 on a bfloat16 base"),
        ("qwen3-30b-a3b", {"target_modules": ("down_proj",)}, "fuses into experts"),
        ("llama-3.1-8b", {"r": 0}, "r: "),
        ("llama-3.1-8b", {"optimizer": "adamw_tosh"}, "adamw_torch"),
    ],
)
def test_one_sentence_in_python_too(model: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(MemplanError, match=words):
        plan(model, Recipe(trainer="peft", mode="lora", **options))


def test_dense_layers_among_experts_take_no_adapters_by_name() -> None:
    from memplan.importers.resolve import resolve

    spec = resolve("qwen3-30b-a3b").spec
    mixed = spec.model_copy(update={"sparse_layers": (False, *spec.sparse_layers[1:])})
    with pytest.raises(MemplanError, match="mix dense layers"):
        plan(mixed, Recipe(trainer="peft", mode="lora", target_modules=("mlp.up_proj",)))
    with pytest.raises(MemplanError, match="takes a pattern"):
        plan(mixed, Recipe(trainer="peft", mode="lora", target_modules=r".*\.up_proj"))
    for wanted in ("attention", "all-linear"):
        recipe = Recipe(trainer="peft", mode="lora", target_modules=wanted)
        assert plan(mixed, recipe).peak.allocated_bytes > 0


def test_a_shared_expert_is_adapted_by_name_where_peft_knows_no_experts() -> None:
    from small_specs import SPECS

    spec = SPECS["qwen2_moe"](2)
    plain = Recipe(trainer="peft", mode="lora", target_modules=("q_proj",))
    named = plain.model_copy(update={"target_modules": ("q_proj", "up_proj", "down_proj")})
    assert plan(spec, named).parameters.trainable > plan(spec, plain).parameters.trainable
    every = Recipe(trainer="peft", mode="lora", r=16)
    assert plan(spec, every).parameters.trainable > 0  # its gate has one row


def test_a_spec_of_an_unknown_family() -> None:
    from memplan.importers.resolve import resolve

    spec: ModelSpec = resolve("llama-3.2-1b").spec.model_copy(update={"model_type": "foo"})
    with pytest.raises(MemplanError, match="no predicted plan for the model type 'foo'"):
        plan(spec)


@pytest.mark.parametrize(
    ("config", "answers"),
    [
        ({"architectures": ["OlmoeForCausalLM"]}, "--trace` traces its own code;"),
        ({"architectures": ["QWenLMHeadModel"], "auto_map": {"AutoConfig": "x.Y"}}, "dry-run -- COMMAND`"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, ": `memplan dry-run -- COMMAND`"),
        ({"architectures": ["Foo"], "vision_config": {"depth": 2}}, ": `memplan dry-run -- COMMAND`"),
    ],
)
def test_of_an_architecture_without_a_plan_it_says_what_can_answer(
    config: dict[str, Any], answers: str
) -> None:
    """A trace is of causal language models alone, so one that sees is not sent there to be refused again."""
    from memplan.importers.hf import spec_from_config

    with pytest.raises(MemplanError) as refused:
        spec_from_config(config, "model")
    assert answers in str(refused.value)


def test_a_plan_from_json_has_no_timeline() -> None:
    answer = memplan.planning.plan.Plan.model_validate_json(plan("llama-3.2-1b").model_dump_json())
    with pytest.raises(MemplanError, match="call plan\\(\\) again"):
        next(answer.timeline())


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("mixtral-8x7b", {"mode": "qlora"}, "float32, as PEFT's preparation makes them"),
        ("mixtral-8x7b", {"mode": "qlora", "kbit_prep": False}, "in none: they are bfloat16"),
        ("llama-2-7b", {"mode": "lora", "seq_len": 4097}, "seq_len 4097 is beyond the 4096 positions"),
        ("llama-2-7b", {"target_modules": ("q_proj", "wq")}, "wq in target_modules matches nothing"),
        ("llama-2-7b", {"target_modules": ("wk", "wq", "v_proj")}, "wk, wq in target_modules match nothing"),
    ],
)
def test_what_surprises_is_noted(model: str, options: dict[str, Any], words: str) -> None:
    assert words in (plan(model, Recipe(trainer="peft", **options)).model.note or "")


def test_targets_that_are_all_there_need_no_note() -> None:
    assert plan("llama-2-7b", Recipe(target_modules=("q_proj", "self_attn.v_proj"))).model.note is None


def test_a_card_without_flash_attention_is_told_what_to_give(memplan: Callable[..., Outcome]) -> None:
    asked = ("llama-8b", "--trainer", "axolotl", "--gpu", "t4")
    outcome = memplan(*asked)
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "Tesla T4 is older: give --attn sdpa, and --dtype fp16, for it has no bf16 either" in outcome.err
    assert memplan(*asked, "--attn", "sdpa", "--dtype", "fp16").status == 0
    outcome = memplan(*asked, "--dtype", "fp16")
    assert outcome.err.endswith("is older: give --attn sdpa\n")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"a":', "is no valid JSON (line 1, column 6"),
        ('{"a": 1}', "is no file that a trainer is configured with: it has no key of one"),
        ('{"model_type": "llama"}', "configured with: it is the configuration of a model"),
    ],
)
def test_a_file_that_is_no_run_file_is_told_why(
    memplan: Callable[..., Outcome], tmp_path: Path, content: str, complaint: str
) -> None:
    (tmp_path / "run.json").write_text(content)
    outcome = memplan("llama-8b", "--config", tmp_path / "run.json")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert complaint in outcome.err


def test_aliases_of_optimizers_work_in_python() -> None:
    assert Recipe(trainer="peft", optimizer="adamw_8bit").optimizer == "adamw_bnb_8bit"


@pytest.mark.parametrize("option", ["--r 8", "--target-modules q_proj", "--adapter-dtype fp32"])
def test_adapters_options_are_not_dropped_in_full(memplan: Callable[..., Outcome], option: str) -> None:
    outcome = memplan("llama-3.2-1b", "--mode", "full", *option.split())
    assert outcome.status == 2
    assert "which mode full does not have" in outcome.err


def test_a_bug_is_not_a_verdict(memplan: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("tape")

    monkeypatch.setattr("memplan.planning.study.replay", broken)
    outcome = memplan("fit", "llama-3.2-1b", "--gpu", "a6000")
    assert outcome.status == 70
    assert outcome.err.startswith("memplan: a bug in memplan (KeyError: 'tape'); please report it")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [0] * 1000},
        {"optimizer": "A" * 10_000},
        {"optimizer": [[[["x"] * 300]]]},
        {"r": "9" * 5000},
        {"mode": {"a": ["b"] * 1000}},
    ],
)
def test_what_is_long_is_not_quoted_in_full(options: dict[str, Any]) -> None:
    from memplan.asked.recipe import Recipe

    with pytest.raises(MemplanError) as caught:
        Recipe(trainer="peft", **options)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("pattern", ["(.*)*!", r"(\w+\.?)+!", "(?:a|(?:b+)*)c", "((x{2,})y)*"])
def test_patterns_that_may_never_end_are_refused(pattern: str) -> None:
    with pytest.raises(MemplanError, match="may never end"):
        plan("llama-3.2-1b", Recipe(trainer="peft", target_modules=pattern))


@pytest.mark.parametrize("pattern", [r"(?:.*\.)?[qv]_proj", r"model\.layers\.\d+\.mlp\..*", "(a*)?.*_proj"])
def test_other_patterns_are_not(pattern: str) -> None:
    assert plan("llama-3.2-1b", Recipe(trainer="peft", target_modules=pattern)).parameters.trainable > 0


def test_a_question_is_about_ten_cards_at_most(memplan: Callable[..., Outcome]) -> None:
    from memplan.asked.gpus import load_gpus

    names = [gpu.aliases[0] for gpu in load_gpus()]
    asked = [word for name in (*names[:10], names[0]) for word in ("--gpu", name)]
    assert memplan("llama-3.2-1b", *asked).status == 0
    outcome = memplan("llama-3.2-1b", *asked, "--gpu", names[10])
    assert (outcome.status, outcome.out) == (2, "")
    assert "10 cards at most" in outcome.err


@pytest.mark.parametrize(
    ("mode", "option"),
    [
        ("full", {"r": 64}),
        ("full", {"use_dora": True}),
        ("full", {"quant_type": "fp4"}),
        ("lora", {"double_quant": False}),
    ],
)
def test_what_a_mode_does_not_have_is_refused(mode: str, option: dict[str, Any]) -> None:
    from memplan.asked.recipe import Recipe

    with pytest.raises(MemplanError, match="belongs to"):
        Recipe(trainer="peft", mode=mode, **option)
    # what a plan's JSON says of a recipe is one, of an older memplan with fewer options too
    older = {
        name: value
        for name, value in Recipe(trainer="peft", mode="full").resolved()
        if name not in ("use_cache", "kernels")
    }
    assert Recipe.model_validate(older) == Recipe(trainer="peft", mode="full").resolved()
    for recipe in (
        Recipe(trainer="peft", mode="full").resolved(),
        Recipe(trainer="peft", mode="lora", r=16).resolved(),
    ):
        assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
