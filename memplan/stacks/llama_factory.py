"""LLaMA-Factory's supervised fine-tuning, as its example files set it (LLaMA-Factory 0.9.5)."""

from __future__ import annotations

from memplan.stacks import Stack, always, only

STACK = Stack(
    title="LLaMA-Factory",
    versions={"llamafactory": "0.9.5", "transformers": "5.6.0", "peft": "0.18.1"},
    settings={
        "dtype": only(
            "loaded in the compute dtype, bfloat16 with `bf16: true` (`hparams/parser.py`); weights that are "
            "trained are cast to float32 (`model/adapter.py`, `_setup_full_tuning`)",
            full="float32",
            lora="bfloat16",
            qlora="bfloat16",
        ),
        "kbit_prep": only("never calls PEFT's preparation (`model/adapter.py`)", qlora=False),
        "adapter_dtype": only(
            "`model/adapter.py`, `init_adapter`: trainable parameters are cast to float32 unless `pure_bf16`",
            lora="float32",
            qlora="float32",
        ),
        "device_map": only('`hparams/parser.py`: `{"": get_current_device()}`', full="cuda", lora="cuda"),
        "autocast": always(True, "its example files have `bf16: true`; without it nothing is cast"),
        "gradient_checkpointing": always(
            True, "`hparams/model_args.py`: `disable_gradient_checkpointing` is False"
        ),
        "loss": always("standard", "the model's own (`train/sft/trainer.py`)"),
        "optimizer": always(
            "adamw_torch_fused", "transformers, `training_args.py`, `TrainingArguments.optim`"
        ),
    },
    # `hparams/model_args.py`, `use_reentrant_gc`
    reentrant=lambda recipe: True,
    sizes={
        "r": only("`hparams/finetuning_args.py`, `lora_rank`", lora=8, qlora=8),
        "target_modules": only("`lora_target`", lora="all-linear", qlora="all-linear"),
        "double_quant": only("`hparams/model_args.py`, `double_quantization`", qlora=True),
        "batch_size": always(8, "`TrainingArguments.per_device_train_batch_size`"),
        "seq_len": always(2048, "`hparams/data_args.py`, `cutoff_len`"),
    },
)
