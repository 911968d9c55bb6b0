"""What an evaluation between two steps takes, held against the Trainer's on the emulated card."""

from __future__ import annotations

import json
from functools import partial

import pytest

from memplan import Recipe, plan
from memplan.importers.resolve import resolve
from memplan.planning import predicted
from memplan.planning.plan import Plan, plan_of
from memplan.planning.study import Prediction, ask
from memplan.predict.evaluation import write_evaluation
from memplan.predict.parameters import resolve_recipe
from memplan.report.evaluation import evaluating, varying
from memplan.tape import Phase, replay

# torch.cuda.max_memory_allocated of an evaluation after the second step and max_memory_reserved then, of a
# plain script: Trainer(eval_strategy="steps", eval_steps=2) on the emulated A100 (benchmarks/dry_gpu), torch
# 2.13, transformers 5.23, peft 0.21, bitsandbytes 0.50; batches of 8.
EMULATED = [
    ("llama-3.2-1b", {"mode": "qlora"}, 18_583_517_696, 32_910_606_336),
    ("llama-3.2-1b", {"mode": "qlora", "autocast": True}, 22_797_482_496, 27_497_857_024),
    ("llama-3.2-1b", {"mode": "lora", "autocast": True, "seq_len": 1024}, 13_109_315_072, 16_913_530_880),
    (
        "llama-3.2-1b",
        {"mode": "full", "gradient_checkpointing": True, "seq_len": 1024},
        17_975_724_544,
        22_005_415_936,
    ),
    ("qwen2.5-0.5b", {"mode": "lora", "seq_len": 1024}, 13_527_891_456, 17_823_694_848),
    (
        "qwen2.5-0.5b",
        {"mode": "full", "dtype": "float32", "autocast": True, "seq_len": 512, "batch_size": 2},
        13_206_483_968,
        17_299_406_848,
    ),
    (
        "qwen2.5-0.5b",
        {
            "mode": "qlora",
            "kbit_prep": False,
            "gradient_checkpointing": False,
            "seq_len": 777,
            "lora_dropout": 0.05,
        },
        9_983_849_984,
        13_514_047_488,
    ),
    (
        "gemma-2-2b",
        {"mode": "lora", "autocast": True, "seq_len": 600, "attn": "eager"},
        17_704_879_616,
        26_197_622_784,
    ),
]


def judged(model, recipe=None, *, gpus):
    """The plan as `memplan fit` has it."""
    study = Prediction(ask(model, recipe or Recipe(trainer="peft"), gpus))
    return plan_of(study).telling(evaluation=study.judged_evaluation)


@pytest.mark.parametrize(("model", "options", "allocated", "reserved"), EMULATED)
def test_the_trainers_evaluations_on_the_emulated_card(model, options, allocated, reserved):
    spec = resolve(model).spec
    recipe = resolve_recipe(spec, Recipe(trainer="peft", **options))
    evaluation = partial(predicted.evaluation, spec, recipe, 8)
    found = predicted.run(spec, recipe).with_evaluation(partial(evaluation, folded=False)).free
    # the script's batches have no attention mask; a plan's have
    masks = 8 * (8 + recipe.batch_size) * recipe.seq_len
    assert 0 <= found.allocated - allocated <= masks
    assert abs(found.reserved - reserved) <= reserved // 1000
    # the sum of tensors, which is what the warning says, is below it by what blocks have more
    tensors = replay(evaluation()).allocated_bytes
    assert 0 <= found.allocated - tensors < 0.004 * allocated


def test_an_evaluation_leaves_what_it_found():
    spec = resolve("qwen2.5-0.5b").spec
    recipe = resolve_recipe(spec, Recipe(trainer="peft", mode="lora", seq_len=256))
    tape = write_evaluation(spec, recipe, 8)
    forward = sum(
        segment.repeat * sum(tape.deltas[segment.start : segment.stop])
        for segment in tape.segments
        if segment.phase is Phase.FORWARD
    )
    batch = 3 * 8 * 256 * 8  # its names are the caller's
    assert forward == batch
    assert not any(segment.phase in (Phase.BACKWARD, Phase.OPTIMIZER) for segment in tape.segments)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("gemma-2-2b", {"mode": "lora", "attn": "eager"}),
        ("gemma-3-4b", {"mode": "qlora", "seq_len": 2000}),
        ("phi-3-mini-4k", {"mode": "full", "autocast": True, "dtype": "float32"}),
        ("mixtral-8x7b", {"mode": "qlora", "loss": "chunked"}),
        ("qwen3-1.7b", {"mode": "qlora", "kernels": "memplan"}),
        ("olmo-2-7b", {"mode": "lora", "use_dora": True, "loss": "liger"}),
    ],
)
def test_all_layers_and_a_few_folded_ones_say_the_same(model, options):
    spec = resolve(model).spec
    recipe = resolve_recipe(spec, Recipe(trainer="peft", **options))
    folded = replay(write_evaluation(spec, recipe, 8))
    unfolded = replay(write_evaluation(spec, recipe, 8, folded=False))
    assert folded.allocated_bytes == unfolded.allocated_bytes


def test_a_plan_warns_where_evaluating_takes_more_than_training():
    found = plan("llama-3.2-1b", Recipe(trainer="peft", autocast=True))
    assert found.peak.tensor_bytes < 5.7e9
    assert found.evaluation.tensor_bytes == 22_797_612_544
    assert evaluating(found) == (
        "Evaluating with the Trainer's default batch of 8 takes at least 21.23 GiB, more than a training "
        "step: set per_device_eval_batch_size=1 (4.00 GiB)."
    )


def test_no_warning_where_training_takes_more():
    assert (
        evaluating(plan("llama-3.2-1b", Recipe(trainer="peft", batch_size=16, mode="lora", seq_len=512)))
        is None
    )


def test_fit_judges_the_run_with_an_evaluation():
    found = judged("llama-3.2-1b", gpus=["3080", "a100-80"])
    assert [fit.verdict for fit in found.fits] == ["fits", "fits"]
    small, large = found.evaluation.fits
    assert (small.verdict, large.verdict) == ("does not fit", "fits")
    assert "in the evaluation's forward" in small.note
    assert large.reserved_bytes == 32_910_606_336
    assert "RTX 3080: 30.65 reserved, does not fit" in evaluating(found)


def test_a_plan_read_from_json_says_the_same():
    found = judged("llama-3.2-1b", gpus=["a100-80"])
    assert evaluating(Plan.model_validate_json(found.model_dump_json())) == evaluating(found)
    assert json.loads(found.model_dump_json())["evaluation"]["batch_size"] == 8


def test_lengths_that_vary_are_warned_of_unless_the_setting_is_there():
    def told(alloc_conf: str = "", lengths=None):
        recipe = Recipe(trainer="peft", seq_len=64, alloc_conf=alloc_conf)
        return varying(plan("smollm2-135m", recipe, gpus=["a100"], lengths=lengths))

    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in told()
    assert told("expandable_segments:True") is None
    assert told("expandable_segments:False") is not None
    assert told(lengths=[10, 20, 30]) is None


def test_cards_with_other_kernels_are_warned_of_for_themselves() -> None:
    """On an A100 an evaluation takes less than this step; without FlashAttention it takes more."""
    from memplan.report.evaluation import evaluating

    recipe = Recipe(trainer="peft", mode="lora", batch_size=4, gradient_checkpointing=True)
    assert evaluating(judged("mistral-7b-v0.1", recipe, gpus=["a100"])) is None
    answer = judged("mistral-7b-v0.1", recipe, gpus=["a100", "v100-32"])
    assert answer.evaluation is not None
    assert [fit.gpu for fit in answer.evaluation.fits] == ["Tesla V100-SXM2-32GB"]
    assert answer.evaluation.fits[0].reserved_bytes > answer.fits[1].reserved_bytes
    assert "V100" in (evaluating(answer) or "")
    assert "FlashAttention" in (answer.fits[1].note or "")
    assert answer.fits[0].note is None


def test_eval_gives_the_verdict_of_the_run_with_an_evaluation_in_it(memplan) -> None:
    """The exit status, too: a step of 6.8 GiB fits where the logits of eight sequences do not."""
    asked = ("fit", "llama-3.2-1b", "--trainer", "peft", "--gpu", "12GB", "--no-advise")
    without, with_one = memplan(*asked, "--json"), memplan(*asked, "--eval", "--json")
    assert (without.status, with_one.status) == (0, 1)
    told = json.loads(with_one.out)
    assert told["fits"][0]["reserved_bytes"] == told["evaluation"]["fits"][0]["reserved_bytes"]
    assert told["fits"][0]["note"].startswith("with an evaluation of 8 sequences; out of memory")
    assert json.loads(without.out)["fits"][0]["verdict"] == "fits"
