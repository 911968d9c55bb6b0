"""What must hold of every plan."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from small_specs import SPECS

from memplan import Plan, plan
from memplan.asked.recipe import Recipe

families = st.sampled_from(sorted(SPECS))
modes = st.sampled_from(["full", "lora", "qlora"])
fast = settings(max_examples=40, deadline=None)


def small(family: str, layers: int = 5, **options: Any) -> Plan:
    return plan(
        SPECS[family](layers), Recipe(trainer="peft", **{"seq_len": 64, **options}), gpus=["a6000", "h100"]
    )


@fast
@given(families, modes, st.booleans())
def test_the_sums_add_up(family: str, mode: str, checkpointing: bool) -> None:
    result = small(family, mode=mode, gradient_checkpointing=checkpointing)
    peak = result.peak.tensor_bytes
    assert sum(result.peak.by_category.model_dump().values()) == peak
    assert sum(result.summary.model_dump().values()) == peak
    assert sum(result.static_bytes.model_dump().values()) <= peak
    assert max(point.allocated_bytes for point in result.timeline()) == peak


@fast
@given(families, modes, st.integers(1, 300), st.integers(1, 64))
def test_more_tokens_never_need_less(family: str, mode: str, tokens: int, more: int) -> None:
    # Short batches are exempt: bitsandbytes' fused kernel and attention's split keys come and go with the
    # number of rows, and with them their scratch.
    base = 1600
    one = small(family, mode=mode, seq_len=base + tokens)
    two = small(family, mode=mode, seq_len=base + tokens + more)
    assert one.peak.tensor_bytes <= two.peak.tensor_bytes


@fast
@given(families, st.sampled_from(["lora", "qlora"]), st.integers(1, 63))
def test_more_rank_never_needs_less(family: str, mode: str, r: int) -> None:
    assert (
        small(family, mode=mode, r=r).peak.tensor_bytes <= small(family, mode=mode, r=r + 1).peak.tensor_bytes
    )


@fast
@given(families, modes, st.booleans())
def test_checkpointing_never_raises_activations(family: str, mode: str, reentrant: bool) -> None:
    def activations(**options: Any) -> int:
        result = small(family, layers=8, mode=mode, seq_len=256, attn="eager", **options)
        return result.summary.activations

    assert activations(gradient_checkpointing=True, use_reentrant=reentrant) <= activations(
        gradient_checkpointing=False
    )


@fast
@given(families)
def test_modes_are_ordered_in_what_rests_on_the_card(family: str) -> None:
    def static(mode: str, **options: Any) -> int:
        return sum(small(family, mode=mode, **options).static_bytes.model_dump().values())

    assert static("qlora", kbit_prep=False) < static("lora") < static("full")


def test_accumulated_gradients_stay_between_micro_steps() -> None:
    one = small("llama", mode="full", gradient_accumulation_steps=1, optimizer="sgd")
    many = small("llama", mode="full", gradient_accumulation_steps=8, optimizer="sgd")
    assert many.peak.tensor_bytes > one.peak.tensor_bytes
