"""Every family's plan is the trace of the library's own code, allocation by allocation: small models, a few
recipes each. All models of the registry and all options: benchmarks/reconcile.py."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from small_specs import CONFIGS, config

from memplan import libraries
from memplan.asked.recipe import Recipe
from memplan.errors import RecipeError
from memplan.families import find
from memplan.importers.hf import spec_from_config
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_tape
from memplan.tape import replay
from memplan.tape.diff import diff

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in libraries.TESTED:
        pytest.importorskip(package)
    from memplan.trace import trace_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' warnings are theirs

RECIPES: dict[str, dict[str, Any]] = {
    "full": {"trainer": "peft", "mode": "full", "gradient_checkpointing": False},
    "lora": {"trainer": "trl", "mode": "lora"},
    "qlora": {"trainer": "peft", "mode": "qlora", "attn": "eager", "batch_size": 2},
    "autocast": {
        "trainer": "peft", "mode": "lora", "dtype": "float32", "autocast": True, "batches": "padded",
        "batch_size": 2, "gradient_checkpointing": False, "target_modules": "attention",
    },
}  # fmt: skip
# up to one with full attention, or to those that reuse keys and values
LAYERS = {"qwen3_5": 4, "qwen3_5_moe": 4, "gemma4": 6, "gemma4_moe": 6, "gemma4_e4b": 6}
DROPOUTS = ("attention_dropout", "resid_pdrop", "residual_dropout", "hidden_dropout")


def equal(config: dict[str, Any], options: dict[str, Any]) -> bool:
    spec = spec_from_config(config, "it")
    if find(spec.model_type).attention is not find("llama").attention:  # which leave no choice
        options = {**options, "attn": "eager"}
    recipe = resolve_recipe(spec, Recipe(seq_len=133, **options))
    traced = trace_model(config, recipe).tape
    return diff(write_tape(spec, recipe, folded=False), traced).equal


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_plan_is_its_trace(family: str, options: dict[str, Any]) -> None:
    assert equal(config(family, LAYERS.get(family, 2)), options)


SEEN: dict[str, dict[str, Any]] = {
    "full": {"mode": "full", "batch_size": 2},
    "full, none recomputed": {
        "trainer": "peft", "mode": "full", "gradient_checkpointing": False, "attn": "eager",
    },
    "lora": {"mode": "lora", "images": 2, "seq_len": 257},
    "lora, tower frozen": {"mode": "lora", "target_modules": "attention", "batch_size": 3},
    "qlora": {"mode": "qlora", "gradient_checkpointing": False},
    "qlora, prepared": {"trainer": "peft", "mode": "qlora", "use_reentrant": False},
    "8 bits": {"mode": "full", "optimizer": "adamw_bnb_8bit"},
    "decayed apart": {"mode": "full", "optimizer": "adamw_torch"},
}  # fmt: skip


@pytest.mark.parametrize("options", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("family", [name for name, one in CONFIGS.items() if "vision_config" in one])
def test_a_plan_with_images_is_its_trace(family: str, options: dict[str, Any]) -> None:
    asked = {"seq_len": 133, "images": 1, "image_size": (320, 210), **options}
    spec = spec_from_config(config(family, 4), "it")
    recipe = resolve_recipe(spec, Recipe(**asked))
    traced = trace_model(config(family, 4), recipe, looped=True).tape
    found = diff(write_tape(spec, recipe, folded=False, looped=True), traced)
    assert found.equal
    assert found.first_live_difference is None
    folded = write_tape(spec, recipe, looped=True)
    assert replay(folded).allocated_bytes == found.a.allocated_bytes


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seq_len": 100}, "is 1024 tokens, so that a sequence with 1 has at least 1026"),
        ({"image_size": (4000, 10)}, "more than 200 times as long"),
        ({"mode": "lora", "use_reentrant": True}, "no gradient under reentrant checkpointing"),
        ({"mode": "lora", "images": 0, "target_modules": ("proj",)}, "patches and positions of a tower"),
        ({"gpus": 2, "mode": "lora"}, "on several GPUs is not planned"),
    ],
)
def test_what_is_not_planned_with_images(options: dict[str, Any], told: str) -> None:
    spec = spec_from_config(config("qwen3_vl", 2), "it")
    with pytest.raises(RecipeError, match=told):
        resolve_recipe(spec, Recipe(**{"images": 1, "seq_len": 2048, **options}))


@pytest.mark.parametrize("options", [{"attn": "flash_attention_2"}, {"batches": "packed"}, {"loss": "liger"}])
def test_recipes_without_images_alone(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"images with .* are not planned"):
        Recipe(images=1, **options)


def test_images_need_a_tower() -> None:
    with pytest.raises(RecipeError, match="without a vision tower"):
        resolve_recipe(spec_from_config(config("llama", 2), "it"), Recipe(images=1))


@pytest.mark.parametrize("attn", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("options", [RECIPES["full"], RECIPES["autocast"]], ids=["full", "autocast"])
@pytest.mark.parametrize("family", ["llama", "phi3", "seed_oss", "stablelm"])
def test_so_it_is_with_dropout(family: str, options: dict[str, Any], attn: str) -> None:
    if attn == "flash_attention_2":
        options = {**options, "batches": "full"}
    dropouts = {
        name: 0.1 for name in DROPOUTS if name in find(config(family, 2)["model_type"]).config.defaults
    }
    assert dropouts
    assert equal({**config(family, 2), **dropouts}, {**options, "attn": attn})


@pytest.mark.parametrize(
    "family", [name for name, one in CONFIGS.items() if not find(one["model_type"]).liger]
)
def test_without_a_fused_loss_of_ligers(family: str) -> None:
    with pytest.raises(RecipeError, match="Liger-Kernel has no fused loss for"):
        resolve_recipe(spec_from_config(config(family, 2), "it"), Recipe(loss="liger"))


def test_an_evaluation_with_images_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the model keeps from step to step goes in it, too."""
    from memplan.cli import main

    (tmp_path / "config.json").write_text(json.dumps(config("qwen3_vl", 3)))
    asked = ["--mode", "lora", "--images", "1", "--image-size", "320x210", "--seq-len", "900"]
    assert main(["fit", str(tmp_path), "--gpu", "4090", *asked]) == 0
    assert "Evaluating with the Trainer's default batch of 8 takes" in capsys.readouterr().out
