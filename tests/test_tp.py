"""Tensor parallel: what its ranks have, and what is refused. The real engine is in test_ranks.py."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
from conftest import Outcome
from small_specs import SPECS

from memplan import Recipe, plan
from memplan.asked.spec import ModelSpec
from memplan.predict.blueprint import named_shapes
from memplan.predict.loading import loading
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_long_tape, write_tape
from memplan.strategies.tp import COLWISE, part_of
from memplan.tape import Category, replay
from memplan.tape.curves import live_bytes

Run = Callable[..., Outcome]
HOW: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "full, two passes": {"mode": "full", "gradient_accumulation_steps": 2},
    "full, as the Trainer, in lists": {"mode": "full", "trainer": "peft", "optimizer": "adamw_torch"},
    "lora": {"mode": "lora", "target_modules": COLWISE},
}


def _spec(family: str, layers: int) -> ModelSpec:
    """One that two ranks divide."""
    return SPECS[family](layers).model_copy(update={"vocab_size": 1024})


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe"])
def test_layers_may_be_folded(family: str, how: dict[str, Any]) -> None:
    spec = _spec(family, 7)
    if spec.num_experts and "target_modules" in how:
        how = how | {"target_modules": COLWISE[:3]}
    recipe = resolve_recipe(spec, Recipe(**how, parallel="tp", gpus=2, seq_len=64))
    every = write_tape(spec, recipe, folded=False, looped=True)
    assert replay(write_tape(spec, recipe, looped=True)).allocated_bytes == replay(every).allocated_bytes
    assert live_bytes(write_long_tape(spec, recipe, looped=True)) == live_bytes(every)


def test_matrices_are_divided_and_norms_are_not() -> None:
    one, four = (
        plan("llama-3.1-8b", Recipe(mode="full", parallel=parallel, gpus=gpus), gpus=[])
        for parallel, gpus in ((None, 1), ("tp", 4))
    )
    shapes = named_shapes(four.study.asked.spec)
    itemsize = 4  # as TRL loads it
    whole = sum(prod(shape) for shape in shapes.values() if len(shape) == 1)
    divided = sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
    assert whole and divided
    rotary = 2 * 512
    assert one.static_bytes.weights - rotary == itemsize * (whole + divided)
    assert four.static_bytes.weights - rotary == itemsize * (whole + divided // 4)
    (ranks,) = four.ranks
    assert (ranks.rank, ranks.count, ranks.peak_allocated_bytes) == (0, 4, four.peak.allocated_bytes)


def test_the_gradient_of_the_embedding_is_whole_unless_the_output_layer_has_its_weight() -> None:
    gradients = {}
    for tied in (False, True):
        spec = _spec("llama", 2).model_copy(update={"tie_word_embeddings": tied, "vocab_size": 4096})
        recipe = resolve_recipe(spec, Recipe(mode="full", parallel="tp", gpus=2, seq_len=8))
        tape = write_tape(spec, recipe, folded=False)
        left = [
            tape.sizes[~event]
            for segment in tape.segments
            if segment.name == "zero_grad" and segment.layer is None
            for event in tape.events[segment.start : segment.stop]
            if tape.categories[~event] is Category.GRADIENTS
        ]
        gradients[tied] = max(left)
        assert tape.categories.count(Category.GRADIENTS) > 2
        width = spec.hidden_size
    assert gradients == {False: 4096 * width * 4, True: 4096 * width * 4 // 2}


def test_a_part_comes_straight_onto_the_card() -> None:
    spec = _spec("qwen2", 2)
    recipe = resolve_recipe(spec, Recipe(mode="full", parallel="tp", gpus=2, seq_len=64, dtype="bfloat16"))
    step = write_long_tape(spec, recipe)
    loaded = loading(spec, recipe, step)
    local = [part_of(name, shape, 2) for name, shape in named_shapes(spec).items()]
    block, *_ = loaded.sizes[len(step.sizes) :]  # caching_allocator_warmup
    assert block == -(-2 * sum(map(prod, local)) // 512) * 512
    assert part_of("model.layers.0.self_attn.o_proj.weight", (6, 4), 2) == (6, 2)
    assert part_of("model.layers.0.self_attn.q_proj.bias", (6,), 2) == (3,)
    assert part_of("model.norm.weight", (6,), 2) == (6,)


REFUSED = [
    (("llama-3.1-8b", "--mode", "full", "--parallel", "tp"), "tp is for several GPUs"),
    (
        ("llama-3.1-8b", "--mode", "full", "--gpus", "3"),
        "14336 of the MLP and 128256 of the vocabulary",
    ),
    (("llama-3.1-8b", "--mode", "full", "--gpus", "16"), "2 or 4 or 8 do"),
    (("llama-3.1-8b", "--gpus", "4"), "use --mode full or lora, or --parallel fsdp2"),
    (("llama-3.1-8b", "--mode", "lora", "--gpus", "4"), "PEFT's adapters on down_proj and o_proj fail"),
    (
        ("llama-3.1-8b", "--mode", "full", "--gpus", "4", "--optimizer", "adafactor"),
        "adafactor can't update parameters that tensor parallel divides",
    ),
    (("llama-3.1-8b", "--mode", "full", "--gpus", "4", "--loss", "liger"), "with loss liger is not planned"),
    (("gemma-3-1b", "--mode", "full", "--gpus", "4"), "dry-run --gpu 4xh100 -- torchrun"),
]


@pytest.mark.parametrize(("options", "told"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_what_cannot_be_is_refused_in_a_sentence(options: tuple[str, ...], told: str, memplan: Run) -> None:
    outcome = memplan(*options, *(() if "--parallel" in options else ("--parallel", "tp")))
    assert outcome.status == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == 1


def test_how_many_are_those_that_divide_it(memplan: Run) -> None:
    asked = ("--mode", "full", "--how-many", "--no-advise", "--parallel", "tp", "--gpu")
    assert memplan("fit", "llama-3.1-8b", *asked, "h100").out.startswith("tp: 2 × H100 80GB HBM3")
    assert memplan("fit", "llama-3.1-8b", *asked, "4090").out.startswith("tp: 8 × RTX 4090")
    most = memplan("fit", "llama-3.3-70b", *asked, "h100")
    assert "tp: no number that divides its heads is enough (141.97 GiB needed on each)" in most.out


def test_it_is_compared_with_others(memplan: Run) -> None:
    asked = ("llama-3.1-8b", "--mode", "full", "--gpu", "8xh100", "--sweep", "parallel=ddp,tp,fsdp2")
    outcome = memplan("compare", *asked)
    assert outcome.status == 0, outcome.err
    assert [line.split()[0] for line in outcome.out.splitlines() if " GiB" not in line and "█" in line] == [
        "ddp", "tp", "fsdp2",
    ]  # fmt: skip
