"""``kernels="memplan"`` in the plan: what it saves, and that the trace of the patched model agrees."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from small_specs import SPECS

from memplan.asked.recipe import Recipe
from memplan.errors import MemplanError, RecipeError
from memplan.kernels.strips import FEW_ROWS
from memplan.planning.plan import plan
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_tape
from memplan.tape import Tape

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
    for package in ("torch", "transformers", "peft", "bitsandbytes", "accelerate"):
        pytest.importorskip(package)
    from test_reconcile import script

ALIKE: dict[str, Any] = {"mode": "qlora", "kernels": "memplan", "layers": 2}
CASES: list[dict[str, Any]] = [
    {"model": "llama-3.1-8b", "seq_len": 512},
    {"model": "llama-3.1-8b", "seq_len": 300, "use_reentrant": False, "lora_dropout": 0.05},
    {"model": "llama-3.2-1b", "seq_len": 300, "gradient_checkpointing": False, "kbit_prep": False},
    {"model": "llama-3.2-1b", "seq_len": FEW_ROWS},
    {"model": "llama-3.2-1b", "seq_len": FEW_ROWS + 1, "target_modules": "q,v"},
    {"model": "qwen2.5-7b", "seq_len": 300, "kbit_prep": False, "lora_dropout": 0.05},  # biases
    {"model": "gemma-3-1b", "seq_len": 300, "layers": 7, "autocast": True},
    {"model": "phi-3-mini-4k", "seq_len": 700, "dtype": "float32", "use_reentrant": False},
    {"model": "olmo-2-1b", "seq_len": 127, "adapter_dtype": "bfloat16"},
    {"model": "qwen3-8b", "seq_len": 128, "dtype": "float16", "kbit_prep": False, "adapter_dtype": "float16"},
    {"model": "llama-3.3-70b", "layers": 3, "kbit_prep": False},
    {"model": "mixtral-8x7b", "seq_len": 127, "target_modules": "attention"},
    {"model": "smollm2-135m", "seq_len": 200, "attn": "eager", "double_quant": False},
    {"model": "mistral-7b-v0.1", "seq_len": 100, "batch_size": 2, "gradient_accumulation_steps": 2},
]


@pytest.mark.filterwarnings("default")  # the libraries' warnings are theirs
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_predicted_is_traced(case: dict[str, Any]) -> None:
    result = script().compare({**ALIKE, **case})
    assert result["agrees"] and result["step_agrees"] and result["static_agrees"], result


def tape(name: str = "llama", **options: Any) -> Tape:
    spec = SPECS[name](3)
    return write_tape(
        spec,
        resolve_recipe(spec, Recipe(trainer="peft", mode="qlora", target_modules="all-linear", **options)),
    )


def largest(tape: Tape, operation: str) -> int:
    return max(
        (size for size, name in zip(tape.sizes, tape.operations, strict=True) if name == operation), default=0
    )


@pytest.mark.parametrize("loss", ["standard", "chunked"])
@pytest.mark.parametrize("seq_len", [2048, 8192])
def test_no_listed_size_needs_more(seq_len: int, loss: str) -> None:
    """Weights are larger than a strip; in a tiny model the scratch for a conversion can be more."""
    for model in ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b", "gemma-3-4b", "llama-3.3-70b"):
        for kbit_prep in (True, False):
            for checkpointing in (True, False):
                recipe = {
                    "seq_len": seq_len,
                    "kbit_prep": kbit_prep,
                    "loss": loss,
                    "gradient_checkpointing": checkpointing,
                }
                stock, ours = (peak(model, kernels=kernels, **recipe) for kernels in ("stock", "memplan"))
                assert ours <= stock, (model, recipe)


def peak(model: str, **recipe: Any) -> int:
    return plan(model, Recipe(trainer="peft", **recipe), gpus=[]).peak.tensor_bytes


def test_no_dequantised_weight_and_no_mask_is_on_the_tape() -> None:
    stock = tape(seq_len=200, lora_dropout=0.1)
    ours = tape(seq_len=200, lora_dropout=0.1, kernels="memplan")
    for operation in ("gemm_4bit", "native_dropout", "dequantize_4bit", "dequantize_blockwise"):
        assert largest(stock, operation) and not largest(ours, operation)


def test_a_70b_in_8192_tokens() -> None:
    """Where neither logits nor attention in fp32 make the peak, it falls by gibibytes."""
    recipe = {"seq_len": 8192, "kbit_prep": False, "loss": "chunked"}
    stock, ours = (peak("llama-3.3-70b", kernels=kernels, **recipe) for kernels in ("stock", "memplan"))
    assert stock - ours > 2 << 30


def test_without_checkpointing_it_is_the_casts_that_go() -> None:
    """PEFT casts x to fp32 for each adapter and keeps it: an 8B in 4096 tokens."""
    recipe = {"seq_len": 4096, "kbit_prep": False, "gradient_checkpointing": False}
    stock, ours = (peak("llama-3.1-8b", kernels=kernels, **recipe) for kernels in ("stock", "memplan"))
    assert stock - ours > 10 << 30


def test_the_plan_says_what_is_saved() -> None:
    """And where nothing is, what makes the peak: a 70B with PEFT's preparation."""
    assert plan("llama-3.3-70b", Recipe(trainer="peft"), gpus=[]).model.note is None
    note = plan("llama-3.3-70b", Recipe(trainer="peft", kernels="memplan"), gpus=[]).model.note
    assert note is not None and "save nothing of this peak, 51.34 GiB with stock kernels too" in note
    assert "_softmax_backward_data" in note
    recipe: dict[str, Any] = {"seq_len": 8192, "kbit_prep": False, "loss": "chunked"}
    stock, ours = (peak("llama-3.3-70b", kernels=kernels, **recipe) for kernels in ("stock", "memplan"))
    note = plan("llama-3.3-70b", Recipe(trainer="peft", kernels="memplan", **recipe), gpus=[]).model.note
    assert note == (
        f"memplan's kernels save {(stock - ours) / 2**30:.2f} GiB: with stock kernels the peak is "
        f"{stock / 2**30:.2f} GiB"
    )
    few = plan(
        "smollm2-135m", Recipe(trainer="peft", kernels="memplan", seq_len=FEW_ROWS), gpus=[]
    ).model.note
    assert few is not None and "save nothing" in few


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "lora"}, "which mode lora does not have"),
        ({"mode": "full"}, "which mode full does not have"),
        ({"quant_type": "fp4"}, "decode nf4, not fp4"),
        ({"use_dora": True}, "not DoRA"),
    ],
)
def test_what_the_kernels_dont_compute_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        Recipe(trainer="peft", kernels="memplan", **options)


def test_cards_on_which_they_dont_run() -> None:
    recipe = Recipe(trainer="peft", kernels="memplan")
    names = [fit.gpu for fit in plan("llama-3.2-1b", recipe).fits]
    assert "NVIDIA H100 80GB HBM3" in names and not {"Tesla T4", "AMD Instinct MI300X"} & set(names)
    for card in ("t4", "mi300x"):
        with pytest.raises(MemplanError, match="from Ampere on"):
            plan("llama-3.2-1b", recipe, gpus=[card])


def test_the_command_line(memplan: Callable[..., Any]) -> None:
    outcome = memplan("llama-3.1-8b", "--kernels", "memplan", "--gpu", "a6000")
    assert outcome.status == 0 and "memplan kernels" in outcome.out
    outcome = memplan("llama-3.1-8b", "--mode", "lora", "--kernels", "memplan")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "--kernels stock" in outcome.err
    assert memplan("compare", "llama-3.2-1b", "--kernels", "memplan").status == 0
