"""axolotl's YAML (0.21, `utils/schemas`)."""

from __future__ import annotations

import re
from typing import Any

from memplan.runfiles import RunFile, sizes
from memplan.runfiles._keys import Keys, words
from memplan.runfiles._trainer import (
    DEEPSPEED,
    IGNORED,
    SEVERAL,
    as_any_of,
    as_key,
    attention,
    optimizer,
    packed,
    projections,
    quantised_in_8_bits,
    reentrant,
)

_ATTENTION = {  # `utils/schemas/enums.py`, `LEGACY_ATTN_FLAG_TO_IMPL`
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
_OF_ADAPTERS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules", "lora_model_dir",
    "lora_modules_to_save", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel",
    "peft_use_dora", "peft_use_rslora", "peft_layers_to_transform", "peft_autocast_adapter_dtype",
    "bnb_config_kwargs", "nf4_backend",
)  # fmt: skip
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
_LIGER = (
    "liger_rope", "liger_rms_norm", "liger_rms_norm_gated", "liger_layer_norm", "liger_swiglu",
    "liger_glu_activation", "liger_cross_entropy",
)  # fmt: skip
_OTHER = "is another step than supervised fine-tuning, which is all that memplan plans"
_BASE = "is a base that memplan does not plan"
_OWN = "runs code of axolotl's own that memplan does not play"
_REFUSED = {
    "rl": _OTHER,
    "reward_model": _OTHER,
    "process_reward_model": _OTHER,
    "ebft": _OTHER,
    "diffusion": _OTHER,
    "diffusion_lm": _OTHER,
    "relora": _OTHER,
    "lisa_n_layers": "trains a few layers at a time, which memplan does not plan",
    "unfrozen_parameters": "trains a part of the weights, which memplan does not plan",
    "processor_type": "trains on images or sound, which memplan does not plan",
    "deepspeed": DEEPSPEED,
    "fsdp": SEVERAL,
    "fsdp_config": SEVERAL,
    "gptq": _BASE,
    "fp8": "computes in 8 bits, which memplan does not plan",
    "qat": _OWN,
    "model_quantization_config": _BASE,
    "quantize_moe_experts": _OWN,
    "llama4_linearized_experts": _OWN,
    "use_onebitllms": _BASE,
    "use_scattermoe": _OWN,
    "use_sonicmoe": _OWN,
    "use_dsv4_kernels": _OWN,
    "use_glm_dsa_kernels": _OWN,
    "use_mora": "are adapters that memplan does not plan",
    "dense_mixer": _OWN,
    "activation_offloading": "keeps activations on the host, which memplan does not plan",
    "layer_offloading": "keeps layers on the host, which memplan does not plan",
    "selective_checkpointing": "checkpoints a part of each layer, which memplan does not plan",
    "use_eaft": "is another loss than memplan plans",
    "use_dft": "is another loss than memplan plans",
    "kd_trainer": _OTHER,
    "gpu_memory_limit": "puts layers on the host, which memplan does not plan",
    "max_memory": "puts layers on the host, which memplan does not plan",
    "lora_target_parameters": "names parameters, and memplan plans adapters on modules",
    "lora_exclude_modules": "is not planned",
    "lora_rank_pattern": "gives modules ranks of their own, which memplan does not plan",
    "peft_layer_replication": "is not planned",
    "peft_trainable_token_indices": "is not planned",
}
_PLUGINS = {  # beside the losses: those that leave a step's memory as it is
    "axolotl.integrations.liger.LigerPlugin",
    "axolotl.integrations.liger.plugin.LigerPlugin",
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    "axolotl.integrations.lm_eval.LMEvalPlugin",
    "axolotl.integrations.swanlab.SwanLabPlugin",
}


def _read(keys: Keys) -> None:
    keys.sizes = sizes("axolotl")
    keys.put("trainer", "axolotl")
    keys.base("base_model")
    keys.several(
        "tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "dp_shard_size",
        "dp_replicate_size", "expert_parallel_size",
    )  # fmt: skip
    _step(keys)
    _evaluation(keys)
    _precision(keys)
    _attention(keys)
    mode = _adapter(keys)
    if mode == "full" and keys.options.get("attn") != "flash_attention_2":
        keys.refuse(
            "base_model",
            "is trained in full with embeddings, lm_head and norms in float32 where attention is not "
            "FlashAttention (axolotl's loaders/model.py), which memplan does not plan",
        )
    _loss(keys)
    if keys.flag("sample_packing"):
        packed(keys, "sample_packing", "sequence_len tokens")
    _leave_out(keys)


def _step(keys: Keys) -> None:
    whole = keys.whole("batch_size")  # of an update, which older files say instead of the accumulation
    micro, steps = keys.whole("micro_batch_size"), keys.whole("gradient_accumulation_steps")
    if whole is not None and steps is None:
        steps = max(whole // (micro or 1), 1)
    keys.put("batch_size", micro)
    keys.put("gradient_accumulation_steps", steps)
    keys.put("seq_len", keys.whole("sequence_len"))
    keys.put("max_grad_norm", keys.number("max_grad_norm"))
    optimizer(keys, "optimizer")
    if keys.value("gradient_checkpointing") in ("offload", "offload_disk", "unsloth"):
        keys.refuse("gradient_checkpointing", "keeps activations on the host, which memplan does not plan")
    keys.put_flag("gradient_checkpointing", "gradient_checkpointing")
    reentrant(keys, "gradient_checkpointing_kwargs")
    if not keys.options.get("gradient_checkpointing"):
        keys.options.pop("use_reentrant", None)


def _evaluation(keys: Keys) -> None:
    """`utils/config/__init__.py`, `normalize_config`: in batches as training's."""
    held_out = keys.number("val_set_size")
    batch = keys.whole("eval_batch_size") or keys.options.get("batch_size") or 1
    keys.evaluates = batch if held_out or keys.value("test_datasets") else 0
    for key in ("val_set_size", "test_datasets", "eval_batch_size"):
        if not keys.evaluates or key == "test_datasets":
            keys.understood.pop(key, None)


def _precision(keys: Keys) -> None:
    """`utils/config/__init__.py`, `resolve_dtype`, on a card that has bfloat16."""
    fp16, float16 = keys.flag("fp16"), keys.flag("float16")
    bf16 = keys.value("bf16")
    if isinstance(bf16, str) and bf16.lower() in ("true", "false"):
        bf16 = bf16.lower() == "true"
    if bf16 not in (None, True, False, "auto", "full"):
        keys.wrong("bf16", "true, false, auto or full")
    if bf16 is None or bf16 == "auto":
        bf16 = not fp16
    half = bf16 or keys.flag("bfloat16")
    keys.put("dtype", "bfloat16" if half else "float16" if fp16 or float16 else "float32")
    keys.put("autocast", bool(half or fp16) and bf16 != "full")


def _attention(keys: Keys) -> None:
    key, name = "attn_implementation", keys.text("attn_implementation")
    for flag, meant in _ATTENTION.items():
        if keys.flag(flag) and name is None:
            key, name = flag, meant
    attention(keys, key, name or "sdpa")


def _adapter(keys: Keys) -> str:
    adapter = keys.text("adapter")
    four = keys.flag("load_in_4bit")
    if adapter is not None and adapter not in ("lora", "qlora"):
        keys.refuse("adapter", "is none of the adapters that memplan plans, lora and qlora")
    quantised_in_8_bits(keys)
    if adapter is None:
        if four:
            keys.refuse("load_in_4bit", "needs an adapter, as axolotl itself says")
        keys.put("mode", "full")
        keys.unheard(*_OF_ADAPTERS)
        return "full"
    if adapter == "qlora" and not four:
        keys.refuse("adapter", "needs load_in_4bit: true, as axolotl itself says")
    if adapter == "lora" and four:
        keys.refuse(
            "load_in_4bit",
            "is not heard with adapter: lora, where axolotl loads the base in 16 bits and its kbit "
            "preparation makes all of it float32; write adapter: qlora",
        )
    keys.put("mode", adapter)
    _lora(keys)
    if adapter == "qlora":
        _four_bits(keys)
    return adapter


def _lora(keys: Keys) -> None:
    rank = keys.whole("lora_r")
    if rank is None and not keys.given("lora_model_dir"):
        keys.refuse("adapter", "needs lora_r, which axolotl has no default for")
    keys.put("r", rank)
    keys.put("lora_alpha", keys.number("lora_alpha"))
    keys.put("lora_dropout", keys.number("lora_dropout"))
    keys.put("modules_to_save", keys.names("lora_modules_to_save") or None)
    keys.put_flag("use_dora", "peft_use_dora")
    keys.put_flag("use_rslora", "peft_use_rslora")
    if keys.value("peft_autocast_adapter_dtype") is False:
        keys.put("adapter_dtype", keys.options["dtype"])
    keys.put("target_modules", _targets(keys))
    keys.leave_out("that adapter's own rank and targets count, not the file's", "lora_model_dir")
    remote = keys.flag("trust_remote_code")  # whose models axolotl's kernels are not put into
    keys.understood.pop("trust_remote_code", None)
    if not any(map(keys.given, _KERNELS)) and not remote:
        keys.left_out.append(
            "lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel: not set, so axolotl runs LoRA kernels of its "
            "own, where the plan has PEFT's layers"
        )
    elif any(map(keys.given, _KERNELS)):
        keys.leave_out("the plan has PEFT's layers", *_KERNELS)


def _targets(keys: Keys) -> str | tuple[str, ...]:
    linear = keys.flag("lora_target_linear")
    pattern = keys.value("lora_target_modules")
    names = pattern if isinstance(pattern, str) else keys.names("lora_target_modules")
    layers = keys.value("peft_layers_to_transform")
    if linear:
        names = "all-linear"
    if not names:
        keys.refuse("adapter", "names no modules: give lora_target_linear: true or lora_target_modules")
    if not layers:
        return names
    if not isinstance(layers, list) or not all(type(one) is int and 0 <= one < 10_000 for one in layers):
        keys.wrong("peft_layers_to_transform", "a list of layers")
    if isinstance(names, str):
        keys.refuse("peft_layers_to_transform", "is planned of named modules only")
    numbers, modules = "|".join(map(str, layers)), "|".join(map(re.escape, names))
    return rf"model\.layers\.({numbers})\..*({modules})"


def _four_bits(keys: Keys) -> None:
    """`loaders/model.py`, `_set_quantization_config`."""
    own = keys.mapping("bnb_config_kwargs")
    for name, value in own.items():
        if name == "bnb_4bit_use_double_quant" and isinstance(value, bool):
            keys.put("double_quant", value)
        elif name == "bnb_4bit_quant_type" and value in ("nf4", "fp4"):
            keys.put("quant_type", value)
        elif name == "bnb_4bit_compute_dtype" and value in ("bfloat16", "float16", "float32"):
            keys.put("compute_dtype", value)
        elif name not in ("llm_int8_has_fp16_weight", "llm_int8_threshold", "bnb_4bit_quant_storage"):
            keys.wrong("bnb_config_kwargs", "of bitsandbytes' arguments for 4 bits")
    if keys.text("nf4_backend") == "torchao":
        keys.refuse("nf4_backend", _BASE)


def _loss(keys: Keys) -> None:
    plugins = keys.names("plugins")
    liger = any("liger" in name.lower() for name in plugins)
    if any("cut_cross_entropy" in name for name in plugins) and keys.flag("cut_cross_entropy", default=True):
        keys.put("loss", "chunked")
        keys.left_out.append("cut cross entropy: planned with TRL's chunked loss, which takes a little more")
    if keys.flag("liger_fused_linear_cross_entropy") and liger:
        keys.put("loss", "liger")
    if liger:
        keys.leave_out("Liger's kernels are not played, so activations may be fewer", *_LIGER)
    strange = [name for name in plugins if name not in _PLUGINS]
    if strange:
        keys.left_out.append(f"plugins: {', '.join(strange)}: unknown, so not counted")
    keys.leave_out(
        "logits are planned in one piece, which takes more",
        "chunked_cross_entropy",
        "flash_attn_cross_entropy",
    )


def _leave_out(keys: Keys) -> None:
    keys.leave_out("what torch.compile keeps is another amount", "torch_compile")
    keys.leave_out("the MLP is planned whole, which takes more", "tiled_mlp")
    keys.leave_out(
        "kernels that memplan does not play",
        "use_kernels", "flash_attn_fuse_mlp", "flash_attn_rms_norm", "fused_attn_kernel", "flash_optimum",
        "s2_attention", "experts_implementation", "gemma4_hybrid_attn_impl",
    )  # fmt: skip
    keys.leave_out("its noise is not counted", "neftune_noise_alpha", "noisy_embedding_alpha")
    keys.leave_out("new rows of the embedding are not counted", "tokens", "resize_token_embeddings_to_32x")
    keys.leave_out("is not counted", "overrides_of_model_config", "overrides_of_model_kwargs", "fp32_norms")
    keys.leave_out("how the adapter is initialised is not counted", "peft", "peft_init_lora_weights")
    keys.leave_out("this is the plan of its first try", "auto_find_batch_size")
    keys.leave_out("a trainer of one's own", "trainer_cls")


_NO_MEMORY = words(
    """
    pretraining_dataset strict resume_from_checkpoint auto_resume_from_checkpoints mean_resizing_embeddings
    shrink_embeddings embeddings_skip_upcast reinit_weights trl vllm quantization export num_labels datasets
    shuffle_merged_datasets shuffle_before_merging_datasets dataset_prepared_path dataset_shard_num
    dataset_shard_idx skip_prepare_dataset num_dataset_shards_to_save dataset_processes dataset_num_proc
    dataset_exact_deduplication dataset_keep_in_memory push_dataset_to_hub hf_use_auth_token device
    device_map world_size ddp do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset
    bench_split loss_watchdog_threshold loss_watchdog_patience gc_steps gc_collect_steps float32
    freeze_mm_modules excess_length_strategy eval_sequence_len min_sample_len max_prompt_len balance_labels
    label_balance_window_optim_steps sample_packing_group_size sample_packing_bin_size
    sample_packing_sequentially sample_packing_mp_start_method eval_sample_packing
    fa_varlen_kwargs_in_collator pad_to_sequence_len pad_to_multiple_of curriculum_sampling
    multipack_real_batches batch_flattening pretrain_multipack_buffer_size pretrain_multipack_attn
    pretraining_sample_concatenation streaming streaming_multipack_buffer_size flex_attn_compile_kwargs
    deepcompile fsdp_version fsdp_final_state_dict_type heads_k_stride ring_attn_func special_tokens
    added_tokens_overrides torch_compile_backend torch_compile_mode evals_per_epoch saves_per_epoch
    save_first_step early_stopping_patience use_tensorboard use_wandb use_mlflow use_comet use_trackio
    use_swanlab use_otel_metrics sync_profiler_steps profiler_steps include_tkps orpo_alpha simpo_gamma
    cpo_alpha rl_beta low_cpu_mem_usage chat_template chat_template_jinja chat_template_kwargs eot_tokens
    default_system_message fix_untrained_tokens is_preprocess total_num_tokens total_supervised_tokens
    sample_packing_eff_est sample_packing_seq_len_multiplier is_falcon_derived_model is_llama_derived_model
    is_mistral_derived_model is_qwen_derived_model generate_samples base_model_config cls_model_config
    tokenizer_config tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common tokenizer_type
    processor_kwargs tokenizer_save_jinja_files trust_remote_code experimental_skip_move_to_device
    model_quantization_config_kwargs type_of_model model_type revision_of_model max_packed_sequence_len
    train_on_inputs embedding_lr embedding_lr_scale optim_args torchdistx_path lr_scheduler
    lr_quadratic_warmup cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor lr_groups adam_epsilon2
    adam_beta3 adam_eps eta_min num_epochs lora_fan_in_fan_out lora_alpha_pattern peft_layers_pattern
    lora_fp32_gradients qlora_sharded_model_loading lora_on_cpu loraplus_lr_ratio loraplus_lr_embedding
    merge_lora merge_method gptq_groupsize gptq_model_v1 gptq_disable_exllama use_ray ray_num_workers
    ray_run_name resources_per_worker eval_table_size eval_max_new_tokens seed local_rank role_boundaries
    image_size cut_cross_entropy_accum_c_fp32 model_config axolotl_config_path lm_eval_tasks
    peft_ensure_weight_tying liger_use_token_scaling base_model_ignore_patterns
    """
)


def _targeted(value: Any) -> dict[str, Any] | None:
    if value == "all-linear":
        return {"lora_target_linear": True}
    modules = projections(value)
    return {"lora_target_linear": False, "lora_target_modules": modules} if modules else None


def _quantised(mode: Any) -> dict[str, Any]:
    return {"adapter": mode, "load_in_4bit": mode == "qlora"}


RUNFILE = RunFile(
    title="axolotl",
    own=words(
        """
        base_model micro_batch_size sequence_len adapter sample_packing lora_target_linear lora_model_dir
        flash_attention sdp_attention xformers_attention val_set_size base_model_config
    """
    ),
    read=_read,
    refuses=_REFUSED,
    launch="axolotl train FILE",
    ignored=(IGNORED | _NO_MEMORY) - _REFUSED.keys(),
    says={
        "batch_size": as_key("micro_batch_size"),
        "seq_len": as_key("sequence_len"),
        "gradient_accumulation_steps": as_key("gradient_accumulation_steps"),
        "optimizer": as_key("optimizer"),
        "gradient_checkpointing": as_key("gradient_checkpointing"),
        "attn": as_key("attn_implementation"),
        "r": as_key("lora_r"),
        "target_modules": _targeted,
        "loss": as_any_of(
            {
                "liger": {
                    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
                    "liger_fused_linear_cross_entropy": True,
                }
            }
        ),
        "autocast": as_any_of({True: {"bf16": True}}),
        "mode": as_any_of({mode: _quantised(mode) for mode in ("lora", "qlora")}),
    },
)
