"""Verdicts for cards on which other kernels run than on the reference card."""

from __future__ import annotations

import warnings

import pytest
from small_specs import config

from memplan import MemplanError, Recipe, plan
from memplan.asked.gpus import find_gpu
from memplan.cuda.card import Card
from memplan.device.fit import context_bytes
from memplan.importers.hf import spec_from_config
from memplan.planning import cards
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_tape
from memplan.tape import replay


def needed(model: str, gpu: str, **options: object) -> int:
    return plan(model, Recipe(trainer="peft", **options), gpus=[gpu]).fits[0].needed_bytes


def test_a_card_without_flash_attention_is_not_promised_a_fit_that_needs_it() -> None:
    # one attention matrix a layer, in fp32, of 32 heads x 2048 x 2048: 512 MiB, 16 layers
    assert (
        plan("llama-3.2-1b", Recipe(trainer="peft", mode="lora"), gpus="t4").fits[0].verdict == "does not fit"
    )
    assert needed("llama-3.2-1b", "t4", mode="lora") - needed("llama-3.2-1b", "a10", mode="lora") > 8 << 30


def test_where_no_flash_attention_runs_all_cards_are_judged_by_one_step() -> None:
    t4, a10 = (needed("llama-3.2-1b", gpu, mode="lora", attn="eager") for gpu in ("t4", "a10"))
    assert t4 == a10


def test_the_package_can_not_be_asked_of_an_older_card() -> None:
    recipe = Recipe(trainer="peft", mode="lora", attn="flash_attention_2")
    with pytest.raises(MemplanError, match=r"the Tesla T4 is older: give --attn sdpa"):
        plan("llama-3.2-1b", recipe, gpus=["t4"])
    assert "Tesla T4" not in [fit.gpu for fit in plan("llama-3.2-1b", recipe).fits]


@pytest.mark.parametrize(
    ("gpu", "extra"), [("a100-80", 0), ("h100", 2 * 25_034_752), ("b200", 2 * 25_034_752)]
)
def test_workspaces_are_as_large_as_the_card_makes_them(gpu: str, extra: int) -> None:
    assert context_bytes(find_gpu(gpu), Card()) == (832 << 20) + extra


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.filterwarnings("default")  # the libraries' warnings are theirs
def test_before_ampere_predicted_is_traced(dtype: str, grouped: bool) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
        from memplan.trace import trace
    shape = config("llama", 2) | ({} if grouped else {"num_key_value_heads": 8})
    spec = spec_from_config(shape, "small")
    recipe = resolve_recipe(spec, Recipe(trainer="peft", mode="lora", dtype=dtype, seq_len=256))
    predicted = replay(write_tape(spec, recipe, card=Card((7, 5))))
    traced = replay(trace(shape, recipe, compute_capability=(7, 5)))
    assert predicted.allocated_bytes == traced.allocated_bytes
    assert (predicted.phase, predicted.operation) == (traced.phase, traced.operation)


@pytest.mark.parametrize(
    ("model", "seq_len", "gpu"), [("phi-3-mini-4k", 4096, "t4"), ("mistral-7b-v0.1", 6144, "v100-32")]
)
def test_before_ampere_no_window_is_efficient_in_bfloat16(model: str, seq_len: int, gpu: str) -> None:
    recipe = Recipe(trainer="peft", mode="lora", gradient_checkpointing=True, seq_len=seq_len)
    assert plan(model, recipe, gpus=[gpu]).fits[0].verdict == "does not fit"


def test_what_is_played_in_the_place_of_cudnn_s_attention_is_said_of_a_card_that_was_named() -> None:
    recipe = Recipe().resolved()
    for name, told in (("h100", True), ("b200", True), ("a100", False), ("5090", False)):
        gpu = find_gpu(name)
        assert ("where it takes cuDNN's" in (cards.remark(gpu, recipe) or "")) is told
        assert "cuDNN" not in (cards.remark(gpu, recipe, named=False) or "")
    eager = Recipe(attn="eager").resolved()
    assert cards.remark(find_gpu("h100"), eager) is None
