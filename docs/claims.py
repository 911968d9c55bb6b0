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
    fp32: dict[str, Any] = {"dtype": "float32", "gradient_checkpointing": True}
    rows: list[tuple[str, str, str, dict[str, Any]]] = [
        ("full", "1.4 TB", "bf16 weights, AdamW (defaults)", {}),
        ("full", "1.4 TB", "fp32 weights, AdamW, checkpointing", fp32),
        ("lora", "160 GB", "defaults: no checkpointing", {}),
        ("lora", "160 GB", "with checkpointing", {"gradient_checkpointing": True}),
        ("qlora", "48 GB", "defaults: PEFT's preparation with its fp32 upcasts", {}),
        ("qlora", "48 GB", "without the upcasts", {"kbit_prep": False}),
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
tokens unless stated, and none is measured. Defaults are in [recipe.md](recipe.md).

## "A 70B takes 1.4 TB in full, 160 GB with LoRA, 48 GB with QLoRA"

{seventy()}

- **Full: no.** 1.4 TB is 20 bytes a parameter. Training in bf16 with fused AdamW takes 8 (weights 2,
  gradients 2, two states of 2), with fp32 weights 16. 20 need fp32 master weights beside bf16 ones and more,
  which the Trainer does not keep on one GPU.
- **LoRA: only with checkpointing**, and then it is less. Without it activations add
  {gib(planned("llama-70b", "lora").summary.activations)}, for one sequence.
- **QLoRA: if.** It fits 48 GB without the fp32 upcasts of `prepare_model_for_kbit_training`, and does not
  with them: they double embeddings and output layer, make the residual stream fp32, and send grouped-query
  attention to the kernel that writes its scores.

## "Memory is weights, LoRA parameters, optimizer state and activations"

**Holds as a sum, hides the peak.** memplan prints these four, and says what they contain.
{categories()}

## "The optimizer state is twice the trainable parameters"

**Holds for AdamW in the parameters' own dtype**, and for nothing else (Llama 3.1 8B, LoRA):

{optimizer_states()}

With LoRA the parameters are fp32 (PEFT's rule), so it is 8 bytes a parameter; in full bf16 fine-tuning it
is 4.

## "all-linear has 4 to 7 times the parameters of q,v"

**Holds for most**, and depends on the shape: grouped queries make v small and wide MLPs make the rest large.

{targets()}

## "LoRA trains 100 to 1,000 times fewer parameters"

**Holds at rank 8 on all linear layers**; with q,v only it is more (last two columns above). Twice the rank,
half the factor.

## "NF4 makes weights 4 times smaller"

**Never quite.** Scales take 0.016 to 0.0625 bytes a weight, and embeddings, output layer and norms are not
quantised; PEFT's preparation even doubles them. The smaller the model and the larger its vocabulary, the less
is left of the factor.

{weights()}
"""
