"""Writes docs/claims.md: popular claims about the memory of fine-tuning, held against plans.

Every number in the page is planned here, so that it can't drift from the code.
"""

from __future__ import annotations

from typing import Any

from memplan import Plan, plan
from memplan.asked.recipe import Recipe

GIB = 1 << 30
GB = 10**9

LLAMAS = ("llama-2-7b", "llama-3.1-8b", "llama-3.3-70b")


def planned(model: str, mode: str, **options: Any) -> Plan:
    """A plan with the defaults and ``options``."""
    return plan(model, Recipe(mode=mode, **options), gpus=["a6000", "h100"])


def gib(count: int) -> str:
    """Bytes as GiB."""
    return f"{count / GIB:.1f} GiB"


def gb(count: int) -> str:
    """Bytes as GB, the unit of the claims."""
    return f"{count / GB:.0f} GB"


def seventy() -> str:
    """The lesson's table for a 70B."""
    by_name: dict[str, Any] = {"dtype": "float32", "compute_dtype": "bfloat16"}
    upcasts: dict[str, Any] = {"trainer": "peft"}
    rows: list[tuple[str, str, str, dict[str, Any]]] = [
        ("full", "1.4 TB", "TRL: fp32 weights, AdamW, checkpointing", {}),
        ("full", "1.4 TB", "TRL with bf16 weights", {"dtype": "bfloat16"}),
        ("lora", "160 GB", 'TRL with `dtype="bfloat16"`', {}),
        ("lora", "160 GB", "the same without checkpointing", {"gradient_checkpointing": False}),
        ("lora", "160 GB", "TRL, no dtype said", {"dtype": "float32"}),
        ("qlora", "48 GB", 'TRL with `dtype="bfloat16"`', {}),
        ("qlora", "48 GB", "TRL, no dtype said", by_name),
        ("qlora", "48 GB", "PEFT's guide, HF Trainer: fp32 upcasts", upcasts),
        ("qlora", "48 GB", "the same without the upcasts", {**upcasts, "kbit_prep": False}),
        ("qlora", "48 GB", "LLaMA-Factory", {"trainer": "llama_factory"}),
    ]  # fmt: skip
    lines = [
        "| mode | claimed | recipe | planned peak | RTX A6000 (48 GB) | H100 80 GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for mode, claimed, words, options in rows:
        result = planned("llama-70b", mode, **options)
        verdicts = " | ".join(fit.verdict for fit in result.fits)
        peak = result.peak.allocated_bytes
        lines.append(f"| {mode} | {claimed} | {words} | {gb(peak)} ({gib(peak)}) | {verdicts} |")
    return "\n".join(lines)


def categories() -> str:
    """How much of the peak is none of the four categories' textbook meaning."""
    result = planned("llama-3.1-8b", "qlora")
    sizes = result.peak.by_category
    beyond = sizes.quantization_state + sizes.gradients + sizes.logits_and_loss + sizes.temporaries
    return (
        f"In the default QLoRA plan of Llama 3.1 8B, {gib(beyond)} of {gib(result.peak.allocated_bytes)}\n"
        "are quantisation state, gradients, logits and loss, and temporaries."
    )


def optimizer_states() -> str:
    """Optimizer state over trainable parameters."""
    rows = []
    for optimizer in (
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "adafactor",
        "sgd",
    ):
        result = planned("llama-3.1-8b", "lora", optimizer=optimizer)
        share = result.static_bytes.optimizer_state / result.static_bytes.adapters
        rows.append(f"| `{optimizer}` | {share:.2f}x |")
    return "\n".join(["| optimizer | state / LoRA parameters, in bytes |", "| --- | --- |", *rows])


def targets() -> str:
    """all-linear against q,v, and trainable shares."""
    lines = [
        "| model | q,v | all-linear | ratio | fewer trainable than all: q,v | all-linear |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model in (*LLAMAS, "mistral-7b-v0.1", "qwen2.5-7b"):
        every = planned(model, "lora", r=8).parameters
        query_value = planned(model, "lora", r=8, target_modules="q,v").parameters
        base = every.total - every.trainable
        lines.append(
            f"| {model} | {query_value.trainable:,} | {every.trainable:,} | "
            f"{every.trainable / query_value.trainable:.1f} | {base / query_value.trainable:,.0f}x | "
            f"{base / every.trainable:,.0f}x |"
        )
    return "\n".join(lines)


def weights() -> str:
    """How much smaller NF4 makes what rests on the card."""
    lines = [
        "| model | 16 bits | NF4 with upcasts | smaller | NF4 without | smaller |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model in (*LLAMAS, "llama-3.2-1b", "gemma-2-9b"):
        sixteen = planned(model, "lora").static_bytes.weights
        cells = []
        for kbit_prep in (True, False):
            static = planned(model, "qlora", kbit_prep=kbit_prep).static_bytes
            four = static.weights + static.quantization_state
            cells += [gib(four), f"{sixteen / four:.2f}x"]
        lines.append(f"| {model} | {gib(sixteen)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    return f"""\
# Popular claims, held against the plan

Made by `python docs/generate.py`; every number below is *predicted* by memplan for one sequence of 2,048
tokens unless stated, and none is measured. Where no trainer is named it is TRL's SFTTrainer, with adapters
on a base loaded with `dtype="bfloat16"`; what others do is in [trainers.md](trainers.md).

## "A 70B takes 1.4 TB in full, 160 GB with LoRA, 48 GB with QLoRA"

{seventy()}

- **Full: no.** 1.4 TB is 20 bytes a parameter. With fp32 weights and fused AdamW it is 16 (weights 4,
  gradients 4, two states of 4), in bf16 throughout 8. 20 need fp32 master weights beside bf16 ones and more,
  which the Trainer does not keep on one GPU.
- **LoRA: only with checkpointing**, which TRL turns on and the HF Trainer does not. Without it activations
  are {gib(planned("llama-70b", "lora", gradient_checkpointing=False).summary.activations)}, for one sequence.
- **QLoRA: if.** It fits 48 GB where embeddings, output layer and norms stay in 16 bits. They do not in TRL if
  nobody says `dtype="bfloat16"`, nor after PEFT's `prepare_model_for_kbit_training`, which doubles them,
  makes the residual stream fp32, and sends grouped-query attention to the kernel that writes its scores.

## "Memory is weights, LoRA parameters, optimizer state and activations"

**Holds as a sum, hides the peak.** memplan prints these four, and says what they contain.
{categories()}

## "The optimizer state is twice the trainable parameters"

**Holds for AdamW in the parameters' own dtype**, and for nothing else (Llama 3.1 8B, LoRA):

{optimizer_states()}

With LoRA the parameters are fp32 (PEFT's rule), so it is 8 bytes a parameter; in QLoRA TRL makes them bf16,
so it is 4, as in full bf16 fine-tuning.

## "all-linear has 4 to 7 times the parameters of q,v"

**Holds for most**, and depends on the shape: grouped queries make v small and wide MLPs make the rest large.

{targets()}

## "LoRA trains 100 to 1,000 times fewer parameters"

**Holds at rank 8 on all linear layers**; with q,v only it is more (last two columns above). Twice the rank,
half the factor.

## "NF4 makes weights 4 times smaller"

**Never quite.** Scales take 0.016 to 0.0625 bytes a weight, and embeddings, output layer and norms are not
quantised; PEFT's preparation (upcasts) even doubles them. The smaller the model and the larger its
vocabulary, the less is left of the factor.

{weights()}
"""
