"""PEFT's guides with the Hugging Face Trainer (transformers 5.23, PEFT 0.21)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.stacks import Stack, always, only

if TYPE_CHECKING:
    from memplan.asked.recipe import Recipe


def _reentrant(recipe: Recipe) -> bool:
    """transformers checkpoints without reentrance when the Trainer is asked to; PEFT's preparation passes
    nothing on, and torch's own default is reentrant, with a warning (torch/utils/checkpoint.py, 2.13)."""
    return bool(recipe.kbit_prep) and recipe.gradient_checkpointing is None


STACK = Stack(
    title="PEFT with the HF Trainer",
    versions={"transformers": "5.23.0", "peft": "0.21.2"},
    settings={
        "dtype": always(
            "bfloat16",
            'transformers, `modeling_utils.py`, `from_pretrained(dtype="auto")` loads what the checkpoint '
            "has: bfloat16 for nearly every model listed (Llama 1 and 2 are float16, of the same size)",
        ),
        "kbit_prep": only(
            "PEFT's guide calls `prepare_model_for_kbit_training` (`peft/utils/other.py`) if in 4 bits",
            qlora=True,
        ),
        "adapter_dtype": only(
            "PEFT, `peft/mapping_func.py`, `get_peft_model(autocast_adapter_dtype=True)`: 16-bit adapters "
            "become fp32 (`peft/tuners/tuners_utils.py`, `cast_adapter_dtype`)",
            lora="float32",
            qlora="float32",
        ),
        "autocast": always(
            False, "transformers, `training_args.py`: `TrainingArguments.bf16` and `fp16` are False"
        ),
        "gradient_checkpointing": only(
            "in qlora `prepare_model_for_kbit_training(use_gradient_checkpointing=True)`, and it stays on "
            "with `--no-kbit-prep`, which drops the upcasts only; else "
            "`TrainingArguments.activation_checkpointing` (older name: `gradient_checkpointing`) is False",
            full=False,
            lora=False,
            qlora=True,
        ),
        "loss": always("standard", "transformers, `loss/loss_utils.py`, `ForCausalLMLoss`"),
        "optimizer": always(
            "adamw_torch_fused",
            "transformers, `training_args.py`, `TrainingArguments.optim`, torch 2.8 or newer",
        ),
    },
    reentrant=_reentrant,
    packed=(),  # transformers, `data/data_collator.py`, `DataCollatorWithFlattening`
    sizes={
        "r": only("PEFT, `peft/tuners/lora/config.py`, `LoraConfig.r`", lora=8, qlora=8),
        "lora_alpha": only("PEFT, `LoraConfig.lora_alpha`", lora=8, qlora=8),
        "target_modules": only(
            "PEFT, `peft/utils/constants.py`, of Llama-like models", lora="q,v", qlora="q,v"
        ),
        "batch_size": always(8, "`TrainingArguments.per_device_train_batch_size`"),
    },
)
