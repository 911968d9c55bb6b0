"""Recipes: every field of :class:`memplan.asked.recipe.Recipe`, mostly with a value that it takes."""

from __future__ import annotations

from enum import Enum
from random import Random
from typing import Any, Literal, get_args, get_origin

from small_specs import SPECS

from memplan.asked.recipe import Recipe
from memplan.commands.arguments import applicable
from memplan.planning.plan import plan

from .mutate import odd
from .sense import sound_plan

SHARE = 0.2

VALUES: dict[str, tuple[Any, ...]] = {
    "r": (1, 8, 64, 128, 1000),
    "lora_alpha": (1, 16.0),
    "lora_dropout": (0, 0.05, 0.5),
    "target_modules": ("all-linear", "attention", "q,v", ("q_proj",), ("down_proj", "v_proj"),
                       ("lm_head", "o_proj"), r".*\.(q|k)_proj", r"model\.layers\.0\..*", "(a+)+$", "("),
    "modules_to_save": ((), ("lm_head",), ("embed_tokens",), ("norm", "lm_head")),
    "max_grad_norm": (0, 1, 0.3),
    "momentum": (0, 0.9),
    "gradient_accumulation_steps": (1, 2, 16, 1 << 40),
    "batch_size": (1, 2, 3, 8, 1 << 20),
    "seq_len": (1, 17, 64, 99, 128, 777, 2048, 5000, 1 << 24),
    "alloc_conf": ("", "expandable_segments:True", "max_split_size_mb:64", "roundup_power2_divisions:4",
                   "per_process_memory_fraction:0.5", "garbage_collection_threshold:0.8", "a:b", ",", ":"),
}  # fmt: skip


def make(random: Random) -> dict[str, Any]:
    """A recipe and the small model that it trains."""
    share = random.choice((0.1, 0.3, 0.8))
    recipe = {name: _value(random, name) for name in Recipe.model_fields if random.random() < share}
    if isinstance(recipe.get("mode"), str) and random.random() < 0.9:
        recipe = applicable(recipe, recipe["mode"])
    model = (random.choice(sorted(SPECS)), random.randint(1, 9))
    return {"model": model, "recipe": recipe, "cards": random.random() < 0.2}


def _value(random: Random, name: str) -> Any:
    if random.random() < 0.04:
        return odd(random)
    if name in VALUES:
        return random.choice(VALUES[name])
    return random.choice(_known(Recipe.model_fields[name].annotation))


def _known(annotation: Any) -> list[Any]:
    """The values of a switch, an enum, a Literal, or of what a union has of these."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [member.value for member in annotation]
    if get_origin(annotation) is Literal:
        return [*get_args(annotation)]
    if annotation is bool:
        return [True, False]
    return [value for part in get_args(annotation) for value in _known(part)] or [None]


def check(value: dict[str, Any]) -> None:
    """Plan it on cards with and without FlashAttention."""
    family, layers = value["model"]
    recipe = Recipe(**value["recipe"])
    sound_plan(plan(SPECS[family](layers), recipe, gpus=["t4", "4090", "mi300x"]), cards=value["cards"])
