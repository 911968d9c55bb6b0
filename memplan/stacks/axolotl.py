"""axolotl's supervised fine-tuning (axolotl 0.21), as its example files set it.

Read in `loaders/model.py`, `loaders/adapter.py`, `core/builders/base.py`,
`core/builders/causal.py`, `utils/config/__init__.py`, `utils/schemas/*.py`. Its example files were dry-run
with SDPA and without packing (benchmarks/files, docs/files.md): LoRA and QLoRA have the plan's tensors at the
peak, which is in the loss, where LoRA kernels make no difference. What memplan has no option for:

- Unless told otherwise, LoRA's products run in axolotl's own fused kernels (`utils/schemas/validation.py`,
  `lora_kernels_auto_enable`); the plan has PEFT's layers. Files say `lora_mlp_kernel: false` and its like.
- kbit preparation makes the biases of 4-bit layers (Qwen2's q, k, v) float32, and only norms and embeddings
  are cast back: 2 bytes a bias more than the plan has. A mixture's experts stay float32, too, which is
  refused where a file asks for it (`memplan.runfiles.axolotl`).
- Full fine-tuning without FlashAttention keeps embeddings, lm_head and norms in float32 beside a bfloat16
  rest (`should_convert_embedding_dtypes`), which is no plan of memplan's.
"""

from __future__ import annotations

from memplan.stacks import Stack, always, only

STACK = Stack(
    title="axolotl",
    versions={"axolotl": "0.21.0", "transformers": "5.20.1", "peft": "0.21.2"},
    settings={
        "dtype": always(
            "bfloat16",
            "`utils/config/__init__.py`, `resolve_dtype`: bfloat16 with `bf16: auto`, the default, in full "
            "fine-tuning, too; `loaders/model.py`, `_set_device_map_config`, loads the model in it",
        ),
        "kbit_prep": only(
            "called, but what it upcasts is cast back: `loaders/model.py`, `_configure_embedding_dtypes`, "
            "does so for adapters whatever the attention, so norms, embeddings and lm_head train in bfloat16",
            qlora=False,
        ),
        "adapter_dtype": only(
            "as PEFT makes them: `loaders/adapter.py`, `load_lora`, passes `autocast_adapter_dtype` on only "
            "if the file has `peft_autocast_adapter_dtype`",
            lora="float32",
            qlora="float32",
        ),
        "device_map": always(
            None,
            "`utils/config/__init__.py`, `choose_device`: none under `accelerate launch`, which `axolotl "
            "train` runs",
        ),
        "autocast": always(
            True,
            "`bf16: auto` is True on a card that has it (`resolve_dtype`), and `TrainingArguments.bf16` with "
            "it (`core/builders/base.py`, `_configure_precision_settings`)",
        ),
        "gradient_checkpointing": always(
            False, "`utils/schemas/config.py`, `gradient_checkpointing`; its example files turn it on"
        ),
        "attn": always(
            "flash_attention_2",
            "its example files have `attn_implementation: flash_attention_2`; without it, transformers' sdpa",
        ),
        "loss": always("standard", "the model's own; Liger's and cut cross entropy are plugins"),
        "optimizer": always("adamw_torch_fused", "`utils/schemas/training.py`, `optimizer`"),
        "alloc_conf": always(
            "expandable_segments:True",
            "`cli/main.py`, `cli`, by `utils/__init__.py`, `set_pytorch_cuda_alloc_conf`, unless the "
            "environment has `PYTORCH_ALLOC_CONF`",
        ),
    },
    # `utils/schemas/validation.py` makes `gradient_checkpointing_kwargs.use_reentrant` False where nothing is
    # said, and the Trainer turns checkpointing on with it, after PEFT's preparation did
    reentrant=lambda recipe: False,
    sizes={
        "lora_dropout": only("`utils/schemas/peft.py`, `lora_dropout`", lora=0.0, qlora=0.0),
        "double_quant": only(
            "`loaders/model.py`, `_set_quantization_config`: `bnb_4bit_use_double_quant`", qlora=True
        ),
        "attn": always("sdpa", "`utils/schemas/config.py`: `attn_implementation` is None"),
        "batch_size": always(1, "`utils/schemas/training.py`, `micro_batch_size`"),
        "seq_len": always(512, "`utils/schemas/config.py`, `sequence_len`"),
    },
    keeps={
        "_tkps_trainable_acc": "`core/trainers/base.py`, `_accumulate_token_counts`: the tokens that were "
        "trained on, with `include_tkps`, the default",
    },
)
