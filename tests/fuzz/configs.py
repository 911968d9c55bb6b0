"""Configurations of models: those of data/model_specs.json and of every family, changed."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from small_specs import CONFIGS, config

from memplan.asked.gpus import find_gpu
from memplan.asked.recipe import Recipe
from memplan.importers.registry import registry
from memplan.importers.resolve import resolve, resolve_config
from memplan.planning.advise import advise
from memplan.planning.frontier import LONGEST, Peaks, frontier, largest
from memplan.planning.plan import plan
from memplan.planning.study import Prediction, ask
from memplan.predict.parameters import resolve_recipe

from .mutate import encoded, flipped, nested, odd, often
from .sense import holds, sound_plan

SHARE = 0.3

CORPUS: list[dict[str, Any]] = [resolve_config(entry.alias).config for entry in registry()]
CORPUS += [config(family, 2) for family in CONFIGS]
RECIPES: tuple[dict[str, Any], ...] = (
    {},
    {"mode": "full"},
    {"mode": "lora", "gradient_checkpointing": True},
    {"mode": "lora", "loss": "chunked", "batch_size": 3},
    {"mode": "qlora", "r": 128, "optimizer": "paged_adamw_8bit", "use_dora": True},
    {"mode": "full", "optimizer": "adafactor", "attn": "eager"},
)


def add(folder: Path) -> None:
    """Start from the configurations of a folder, too."""
    for path in sorted(folder.rglob("*.json")):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            CORPUS.append(found)


def make(random: Random) -> dict[str, Any]:
    """A file and how it is trained. Most have few layers, for those are soon played."""
    found = dict(random.choice(CORPUS))
    if random.random() < 0.9 and "num_hidden_layers" in found:
        found["num_hidden_layers"] = random.randint(1, 8)
        found.pop("layer_types", None)
    if random.random() < 0.3:  # a field that another family has
        key, value = random.choice(list(random.choice(CORPUS).items()))
        found[key] = random.choice((value, odd(random)))
    if random.random() < 0.1:
        layers = random.choice((3, 300, 9_999))
        found |= {"num_hidden_layers": layers} | random.choice(_UNLIKE)(random, layers)
    content: Any = often(random, found)
    if random.random() < 0.08:
        content = flipped(random, encoded(content))
    elif random.random() < 0.02:
        content = random.choice(
            (odd(random), nested(150), b"[" * 200_000, b"", b"\x80\x04N.", b'{"a":' * 50_000)
        )
    recipe = {**random.choice(RECIPES), "seq_len": random.choice((1, 64, 777, 4096))}
    question = random.choices(("plan", "cards", "advise", "largest", "frontier"), (70, 15, 5, 5, 5))[0]
    return {"config": content, "recipe": recipe, "question": question}


_UNLIKE = (  # layers of two kinds, in no order
    lambda random, layers: {"layer_types": random.choices(("full_attention", "sliding_attention"), k=layers)},
    lambda random, layers: {"mlp_only_layers": [n for n in range(layers) if random.random() < 0.5]},
    lambda random, layers: {
        "sliding_window": 64,
        "max_window_layers": random.randrange(layers + 1),
        "use_sliding_window": True,
    },
)


def check(value: dict[str, Any]) -> None:
    """Plan it, or ask one of the questions that take many plans."""
    path = Path("config.json")
    path.write_bytes(encoded(value["config"]))
    recipe, card = Recipe(trainer="peft", **value["recipe"]), find_gpu("a6000")
    match value["question"]:
        case "plan" | "cards" as question:
            gpus = ["a6000"] if question == "plan" else ["t4", "a6000", "mi300x"]
            sound_plan(plan(path, recipe, gpus=gpus), cards=question == "cards")
        case "advise":
            advice = advise(Prediction(ask(path, recipe)), "a6000")
            holds(bool(advice.model_dump_json()), "no advice")
            for change in advice.changes:
                needed = change.needed_bytes or change.tensor_bytes  # none is said where nothing would fit
                holds(needed >= change.tensor_bytes > 0, "bytes that are not positive", change)
        case "largest":
            spec = resolve(path).spec
            peaks = Peaks(spec, resolve_recipe(spec, recipe), card)
            most = largest(peaks, "seq_len", recipe.batch_size)
            for seq_len, fits in ((most, True), (most + 1, False)):
                if 1 <= seq_len <= min(spec.max_position_embeddings or LONGEST, LONGEST):
                    asked = recipe.model_copy(update={"seq_len": seq_len})
                    verdict = plan(spec, asked, gpus=["a6000"]).fits[0].verdict
                    holds(
                        (verdict == "fits") == fits,
                        "the largest that fits is another",
                        f"{seq_len}: {verdict}",
                    )
        case "frontier":
            (row,) = frontier(resolve(path).spec, [recipe], card, [1, 4], simulated=False).rows
            one, four = (cell.seq_len or 0 for cell in row.cells)
            holds(one >= four, "more sequences are longer", row)
