"""A recipe in words: one short phrase for each setting that counts in its mode."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memplan.asked.recipe import Recipe

_SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

# The fields that one phrase speaks of, where it is more than the field it is filed under.
_TOLD_TOGETHER = {
    "use_rslora": ("use_dora", "modules_to_save"),
    "quant_type": ("double_quant",),
    "optimizer": ("momentum",),
    "gradient_checkpointing": ("use_reentrant",),
    "batch_size": ("seq_len",),
}


def short_card(gpu: str) -> str:
    """A card's name without the vendor's, which most of them share."""
    return gpu.removeprefix("NVIDIA ").removeprefix("GeForce ")


def phrases(recipe: Recipe) -> dict[str, str]:
    """Phrases by field, for a resolved recipe."""
    result = {"mode": recipe.mode.value}
    if recipe.mode.value != "full":
        result |= _adapter_phrases(recipe)
    if recipe.mode.value == "qlora":
        result["quant_type"] = recipe.quant_type.value + (" double-quantised" if recipe.double_quant else "")
        result["kbit_prep"] = "kbit prep" if recipe.kbit_prep else "no kbit prep"
        if recipe.kernels.value != "stock":
            result["kernels"] = f"{recipe.kernels.value} kernels"
    result["dtype"] = _SHORT_DTYPES[recipe.dtype.value]
    result["autocast"] = "autocast" if recipe.autocast else "no autocast"
    momentum = f" with momentum {recipe.momentum:g}" if recipe.momentum else ""
    result["optimizer"] = recipe.optimizer + momentum
    result["max_grad_norm"] = f"clip {recipe.max_grad_norm:g}" if recipe.max_grad_norm else "no clipping"
    result["gradient_accumulation_steps"] = f"accumulate {recipe.gradient_accumulation_steps}"
    result["gradient_checkpointing"] = _checkpointing(recipe)
    if recipe.use_cache:
        result["use_cache"] = "key-value cache"
    result["attn"] = recipe.attn or "sdpa"
    result["loss"] = f"{recipe.loss} loss"
    result["batch_size"] = f"{recipe.batch_size} × {recipe.seq_len} tokens"
    if recipe.device_map:
        result["device_map"] = f"device map {recipe.device_map}"
    if recipe.alloc_conf:
        result["alloc_conf"] = recipe.alloc_conf
    return result


def asked_and_default(recipe: Recipe, given: Collection[str]) -> tuple[list[str], list[str]]:
    """The phrases of what was asked, mode first, and of what was left to the defaults."""
    asked: list[str] = []
    default: list[str] = []
    for field, phrase in phrases(recipe).items():
        told = field == "mode" or any(name in given for name in (field, *_TOLD_TOGETHER.get(field, ())))
        (asked if told else default).append(phrase)
    return asked, default


def common_and_own(recipes: list[Recipe]) -> tuple[list[str], list[list[str]]]:
    """The phrases that all the recipes share, and those that each has to itself; modes left out."""
    told = [phrases(recipe) for recipe in recipes]
    for one in told:
        del one["mode"]
    shared = {
        field: phrase for field, phrase in told[0].items() if all(one.get(field) == phrase for one in told)
    }
    own = [[phrase for field, phrase in one.items() if field not in shared] for one in told]
    return list(shared.values()), own


def micro_steps(recipe: Recipe, provenance: str) -> str:
    """What a predicted tape leaves out of a step that accumulates gradients (``predict/step.py``)."""
    number = recipe.gradient_accumulation_steps
    if provenance != "predicted" or number <= 2:
        return ""
    return f"Two of {number} micro-steps are shown: the others are like the second."


def _adapter_phrases(recipe: Recipe) -> dict[str, str]:
    alpha = 2.0 * recipe.r if recipe.lora_alpha is None else recipe.lora_alpha
    targets = recipe.target_modules
    kinds = [name for name, used in (("rsLoRA", recipe.use_rslora), ("DoRA", recipe.use_dora)) if used]
    saving = f" saving {','.join(recipe.modules_to_save)}" if recipe.modules_to_save else ""
    return {
        "r": f"r {recipe.r}",
        "lora_alpha": f"alpha {alpha:g}",
        "lora_dropout": f"dropout {recipe.lora_dropout:g}",
        "target_modules": f"targets {targets if isinstance(targets, str) else ','.join(targets)}",
        "use_rslora": (" and ".join(kinds) or ("LoRA" if saving else "plain LoRA")) + saving,
        "adapter_dtype": f"{_SHORT_DTYPES[recipe.adapter_dtype.value]} adapters",
    }


def _checkpointing(recipe: Recipe) -> str:
    if not recipe.gradient_checkpointing:
        return "no checkpointing"
    return "reentrant checkpointing" if recipe.use_reentrant else "non-reentrant checkpointing"
