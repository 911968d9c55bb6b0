"""A plan made by hand, for tests of what is done with plans. Its numbers add up and mean nothing."""

from __future__ import annotations

from typing import Any, Literal

from memplan.asked.recipe import Recipe
from memplan.device.fit import Fit
from memplan.planning.plan import Plan
from memplan.planning.records import (
    Advice,
    AllocatorInfo,
    CategoryBytes,
    Change,
    Combination,
    ModelInfo,
    ParameterCounts,
    PeakInfo,
    StaticBytes,
    Summary,
)

GIB = 2**30

_NOTES = {
    "fits": None,
    "tight": "leaves less than 2 % of what it reserves",
    "does not fit": "out of memory in the first step's forward of layer 41, at mm: 448.0 MiB asked for with "
    "21.95 GiB reserved",
}


def example_plan(**options: Any) -> Plan:
    """A 70B plan in qlora unless the options say otherwise."""
    recipe = Recipe(trainer="peft", **options).resolved()
    full = recipe.mode.value == "full"
    categories = CategoryBytes(
        weights=132 * GIB if full else 35 * GIB,
        quantization_state=0 if full else GIB + 512,
        adapters=0 if full else 400 * 2**20,
        gradients=132 * GIB if full else 400 * 2**20,
        optimizer_state=264 * GIB if full else 800 * 2**20,
        activations=9 * GIB,
        logits_and_loss=512,
        temporaries=3 * GIB // 2,
    )
    total = sum(categories.model_dump().values())
    reserved, beside = total + 2 * GIB, GIB // 2
    needed = reserved + beside
    allocator = AllocatorInfo(
        settings=recipe.alloc_conf,
        allocated_bytes=total + 2**20,
        reserved_bytes=reserved,
        fragmentation_bytes=reserved - total - 2**20,
        loading="predicted",
    )
    return Plan(  # type: ignore[call-arg]  # what is simulated is no field
        memplan_version="0.0.0",
        model=ModelInfo(
            name="llama-70b",
            hub_id="meta-llama/Llama-3.3-70B-Instruct",
            architecture="LlamaForCausalLM",
            note="llama-70b is the current Llama 70B, version 3.3",
        ),
        parameters=ParameterCounts(total=70_657_261_568, trainable=70_553_706_496 if full else 103_555_072),
        recipe=recipe,
        static_bytes=StaticBytes(
            weights=categories.weights,
            quantization_state=categories.quantization_state,
            adapters=categories.adapters,
            optimizer_state=categories.optimizer_state,
        ),
        peak=PeakInfo(  # type: ignore[call-arg]
            tensor_bytes=total,
            allocated_bytes=total + 2**20,
            phase="backward",
            operation="mm",
            module="model.layers.79.mlp.down_proj",
            layer=79,
            by_category=categories,
        ),
        summary=Summary(
            weights=categories.weights + categories.quantization_state,
            lora_parameters=categories.adapters,
            optimizer_state=categories.gradients + categories.optimizer_state,
            activations=categories.activations + categories.logits_and_loss + categories.temporaries,
        ),
        allocator=allocator,
        ranks=(),
        fits=tuple(
            Fit(
                gpu=gpu,
                total_bytes=usable,
                reserved_bytes=reserved,
                context_bytes=beside,
                needed_bytes=needed,
                headroom_bytes=usable - needed,
                verdict=_verdict(usable - needed),
                note=_NOTES[_verdict(usable - needed)],
            )
            for gpu, usable in (
                ("NVIDIA GeForce RTX 4090", 23 * GIB),
                ("NVIDIA RTX A6000", 48537 * 2**20),
                ("NVIDIA A40", needed + GIB),
                ("NVIDIA H100 80GB HBM3", 79 * GIB),
            )
        ),
    )


def _verdict(headroom: int) -> Literal["fits", "tight", "does not fit"]:
    if headroom < 0:
        return "does not fit"
    return "tight" if headroom < 2 * GIB else "fits"


def example_advice(text: str = "") -> Advice:
    """Advice whose words hold ``text``."""
    return Advice(
        gpu="NVIDIA RTX A6000",
        changes=(
            Change(
                title=f"16-bit head {text}",
                cost=f"nothing {text}",
                command=f"--no-kbit-prep {text}",
                config="leave it out",
                tensor_bytes=40 * GIB,
                saves_bytes=4 * GIB,
                needed_bytes=45 * GIB,
                verdict="fits",
            ),
        ),
        combination=Combination(titles=("a",), command=f"--r 4 {text}", needed_bytes=GIB, verdict="tight"),
    )
