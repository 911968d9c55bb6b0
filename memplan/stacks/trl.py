"""TRL's SFTTrainer, as TRL's own guides write it (TRL 1.16, PEFT 0.21)."""

from __future__ import annotations

from memplan.stacks import Slip, Stack, always, only

STACK = Stack(
    title="TRL's SFTTrainer",
    versions={"trl": "1.16.0", "transformers": "5.23.0", "peft": "0.21.2"},
    settings={
        "dtype": only(
            "full: TRL, `trl/trainer/utils.py`, `create_model_from_path`, and `ModelConfig.dtype`: float32 "
            'where nothing is said; adapters: as with `dtype="bfloat16"`, without which it is float32, too',
            full="float32",
            lora="bfloat16",
            qlora="bfloat16",
        ),
        "device_map": always(
            "auto",
            "TRL, `trl/trainer/utils.py`, `create_model_from_path`, of a model that is given by name; one "
            "that a script loads itself has `from_pretrained`'s, which is none",
        ),
        "kbit_prep": only("TRL never calls PEFT's preparation (`trl/trainer/sft_trainer.py`)", qlora=False),
        "adapter_dtype": only(
            "TRL, `trl/trainer/sft_trainer.py`: adapters on a quantised base are cast to bfloat16; others "
            "stay as PEFT makes them",
            lora="float32",
            qlora="bfloat16",
        ),
        "autocast": always(True, "TRL, `trl/trainer/base_config.py`: `bf16` is on unless `fp16` is"),
        "gradient_checkpointing": always(True, "TRL, `trl/trainer/base_config.py`, `gradient_checkpointing`"),
        "loss": always(
            "chunked",
            "TRL, `trl/trainer/sft_config.py`, `loss_type`: logits are never whole "
            "(`trl/trainer/utils.py`, `add_fused_lm_head`)",
        ),
        "optimizer": always(
            "adamw_torch_fused", "transformers, `training_args.py`, `TrainingArguments.optim`"
        ),
    },
    # transformers' `modeling_utils.py`, `_activation_checkpointing_enable`
    reentrant=lambda recipe: False,
    sizes={
        "r": only("TRL, `trl/trainer/model_config.py`, `ModelConfig.lora_r`", lora=16, qlora=16),
        "lora_alpha": only("`ModelConfig.lora_alpha`", lora=32, qlora=32),
        "lora_dropout": only("`ModelConfig.lora_dropout`", lora=0.05, qlora=0.05),
        "target_modules": only(
            "`ModelConfig.lora_target_modules` is None, so PEFT's, of Llama-like models",
            lora="q,v",
            qlora="q,v",
        ),
        "double_quant": only("`ModelConfig.use_bnb_nested_quant`", qlora=False),
        "dtype": always("float32", "`ModelConfig.dtype`"),
        "batch_size": always(8, "`TrainingArguments.per_device_train_batch_size`"),
        "seq_len": always(1024, "TRL, `trl/trainer/sft_config.py`, `max_length`"),
    },
    casts_adapters_back=True,
    # `trl/trainer/sft_trainer.py`, `DataCollatorForLanguageModeling.torch_call`
    packed=("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"),
    slip=Slip(
        told='without dtype="bfloat16" TRL loads the base in float32',
        changes={"dtype": "float32"},
        modes=("lora", "qlora"),
    ),
)
