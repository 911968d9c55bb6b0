"""LLaMA-Factory's YAML and JSON (0.9.5, `hparams/*.py`)."""

from __future__ import annotations

from typing import Any

from memplan.runfiles import RunFile, sizes
from memplan.runfiles._keys import Keys, words
from memplan.runfiles._trainer import (
    BY_A_FILE,
    IGNORED,
    REFUSED,
    SAYS,
    arguments,
    as_any_of,
    as_key,
    checkpointing,
    packed,
)

_OWN = "runs code of its own that memplan does not play"
_BASE = "is a base that memplan does not plan"
_IMAGES = "trains on images, film or sound, which memplan does not plan"
_REFUSED = {
    "use_unsloth": _OWN,
    "use_unsloth_gc": "keeps activations on the host, which memplan does not plan",
    "use_kt": _OWN,
    "use_mca": _OWN,
    "use_hyper_parallel": _OWN,
    "use_v1_kernels": _OWN,
    "shift_attn": "is another attention than memplan plans",
    "mixture_of_depths": "is another model than memplan plans",
    "use_llama_pro": "trains a part of the layers, which memplan does not plan",
    "use_galore": "is an optimizer that memplan does not plan",
    "use_apollo": "is an optimizer that memplan does not plan",
    "use_badam": "is an optimizer that memplan does not plan",
    "use_adam_mini": "is an optimizer that memplan does not plan",
    "use_muon": "is an optimizer that memplan does not plan",
    "use_dft_loss": "is another loss than memplan plans",
    "use_asft_loss": "is another loss than memplan plans",
    "use_eaft_loss": "is another loss than memplan plans",
    "fp8": "computes in 8 bits, which memplan does not plan",
    "image_max_pixels": _IMAGES,
    "image_min_pixels": _IMAGES,
    "video_max_pixels": _IMAGES,
    "video_min_pixels": _IMAGES,
    "video_maxlen": _IMAGES,
    "freeze_vision_tower": _IMAGES,
    "freeze_multi_modal_projector": _IMAGES,
    "freeze_language_model": _IMAGES,
}
_OF_ADAPTERS = (
    "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_dora", "use_rslora",
    "quantization_type", "double_quantization",
)  # fmt: skip
_STEPS = ("sft", "pt")  # the same step: a causal model's loss on rows of tokens
_ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def _read(keys: Keys) -> None:
    keys.sizes = sizes("llama_factory")
    keys.put("trainer", "llama_factory")
    keys.base("model_name_or_path")
    stage = keys.text("stage") or "sft"
    if stage not in _STEPS:
        keys.refuse("stage", "is another step than supervised fine-tuning, which is all that memplan plans")
    if keys.flag("do_predict") and not keys.flag("do_train"):
        keys.refuse("do_predict", "trains nothing", instead=False)
    for key, what in (("export_dir", "exports a model"), ("infer_backend", "is for inference")):
        if keys.text(key):
            keys.refuse(key, f"{what}: nothing is trained", instead=False)
    keys.several(
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
        "context_parallel_size",
    )  # fmt: skip
    for key in ("do_train", "do_predict"):
        keys.understood.pop(key, None)
    keys.put("seq_len", keys.whole("cutoff_len"))
    arguments(keys)
    checkpointing(keys)
    _checkpoints(keys)
    mode = _method(keys)
    _precision(keys, mode)
    keys.put("attn", keys.one_of("flash_attn", _ATTENTION))
    if keys.flag("enable_liger_kernel"):
        keys.put("loss", "liger")
        keys.left_out.append("enable_liger_kernel: Liger's other kernels are not played")
    _leave_out(keys, stage)


def _checkpoints(keys: Keys) -> None:
    if keys.given("disable_gradient_checkpointing"):
        keys.put("gradient_checkpointing", not keys.flag("disable_gradient_checkpointing"))
    if keys.given("use_reentrant_gc") and keys.options.get("gradient_checkpointing") is not False:
        keys.put_flag("use_reentrant", "use_reentrant_gc")
    if keys.options.get("gradient_checkpointing") is False:
        keys.options.pop("use_reentrant", None)


def _method(keys: Keys) -> str:
    method = keys.text("finetuning_type") or "lora"
    if method not in ("lora", "full"):
        keys.refuse("finetuning_type", "is not planned; planned are lora and full")
    bits = keys.whole("quantization_bit")
    if bits is not None and bits != 4:
        keys.refuse("quantization_bit", "is a base that memplan does not plan; 4 is")
    if (keys.text("quantization_method") or "bnb").lower() not in ("bnb", "bitsandbytes") and bits:
        keys.refuse("quantization_method", _BASE)
    if method == "full":
        if bits is not None:
            keys.refuse("quantization_bit", "can't be trained in full, as LLaMA-Factory itself says")
        keys.put("mode", "full")
        keys.unheard(*_OF_ADAPTERS)
        return "full"
    keys.put("mode", "qlora" if bits else "lora")
    keys.put("r", keys.whole("lora_rank"))
    keys.put("lora_alpha", keys.number("lora_alpha"))
    keys.put("lora_dropout", keys.number("lora_dropout"))
    targets = keys.names("lora_target")
    if targets:
        keys.put("target_modules", "all-linear" if targets == ("all",) else targets)
    keys.put("modules_to_save", keys.names("additional_target") or None)
    keys.put_flag("use_dora", "use_dora")
    keys.put_flag("use_rslora", "use_rslora")
    if bits:
        keys.put("quant_type", keys.one_of("quantization_type", {"nf4": "nf4", "fp4": "fp4"}))
        if keys.given("double_quantization"):
            keys.put_flag("double_quant", "double_quantization")
    return str(keys.options["mode"])


def _precision(keys: Keys, mode: str) -> None:
    """`hparams/parser.py`: bf16 and pure_bf16 choose the compute dtype before fp16; what is trained in full
    is cast to float32 unless it is pure (`model/adapter.py`)."""
    bf16, fp16, pure = keys.flag("bf16"), keys.flag("fp16"), keys.flag("pure_bf16")
    keys.put("autocast", bf16 or fp16)
    if mode == "full":
        keys.put("dtype", "bfloat16" if pure else "float32")
    else:
        keys.put("dtype", "float16" if fp16 and not (bf16 or pure) else "bfloat16")


def _leave_out(keys: Keys, stage: str) -> None:
    if keys.flag("packing", default=stage == "pt") or keys.flag("neat_packing"):
        packed(keys, "packing", "cutoff_len tokens")
    keys.leave_out("norms in float32 are not counted", "upcast_layernorm")
    keys.leave_out("logits in float32 are not counted", "upcast_lmhead_output")
    keys.leave_out("new rows of the embedding are not counted", "resize_vocab", "add_tokens")
    keys.leave_out("that adapter's own rank and targets count, not the file's", "adapter_name_or_path")
    keys.leave_out("how the adapter is initialised is not counted", "pissa_init")
    keys.leave_out("the router's loss is the configuration's", "moe_aux_loss_coef")


_NO_MEMORY = words(
    """
    liger_kernel_config adapter_folder cache_dir use_fast_tokenizer split_special_tokens add_special_tokens
    new_special_tokens_config init_special_tokens model_revision low_cpu_mem_usage rope_scaling
    train_from_scratch offload_folder use_kv_cache infer_dtype hf_hub_token ms_hub_token om_hub_token
    print_param_status trust_remote_code quantization_device_map image_do_pan_and_scan crop_to_patches
    video_fps use_audio_in_video audio_sampling_rate export_size export_device export_quantization_bit
    export_quantization_dataset export_legacy_format vllm_maxlen vllm_gpu_util vllm_enforce_eager
    vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction freeze_trainable_layers
    freeze_trainable_modules freeze_extra_modules loraplus_lr_ratio loraplus_lr_embedding pissa_iter
    pissa_convert create_new_adapter pref_beta pref_ftx pref_loss dpo_label_smoothing kto_chosen_weight
    kto_rejected_weight simpo_gamma ref_model ref_model_adapters reward_model reward_model_adapters
    galore_target galore_rank galore_layerwise galore_scale apollo_target apollo_rank badam_mode
    badam_switch_mode badam_switch_interval use_swanlab swanlab_project swanlab_workspace swanlab_run_name
    swanlab_mode swanlab_api_key swanlab_logdir asft_alpha eaft_alpha compute_accuracy disable_shuffling
    early_stopping_steps plot_loss include_effective_tokens_per_second include_num_input_tokens_seen
    template dataset eval_dataset dataset_dir media_dir train_on_prompt mask_history streaming buffer_size
    mix_strategy interleave_probs overwrite_cache preprocessing_batch_size preprocessing_num_workers
    max_samples eval_num_beams ignore_pad_token_for_loss val_size eval_on_each_dataset tool_format
    default_system enable_thinking preserve_thinking tokenized_path data_shared_file_system ray_num_workers
    ray_init_kwargs ray_storage_path ray_run_name resources_per_worker placement_strategy master_addr
    master_port enable_torch_profiler predict_with_generate generation_max_length generation_num_beams
    do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty
    fp8_backend fp8_enable_fsdp_float8_all_gather flash_attn_backend
    """
)


def _method_lines(value: Any) -> dict[str, Any]:
    mode = getattr(value, "value", value)
    return {"finetuning_type": "lora"} | ({"quantization_bit": 4} if mode == "qlora" else {})


RUNFILE = RunFile(
    title="LLaMA-Factory",
    own=words(
        """
        stage finetuning_type cutoff_len template lora_rank lora_target quantization_bit
        disable_gradient_checkpointing pure_bf16 flash_attn enable_liger_kernel use_unsloth dataset_dir
        double_quantization neat_packing infer_backend
    """
    ),
    read=_read,
    refuses={**REFUSED, **BY_A_FILE, **_REFUSED},
    launch="llamafactory-cli train FILE",
    ignored=IGNORED | _NO_MEMORY,
    says={
        **SAYS,
        "seq_len": as_key("cutoff_len"),
        "gradient_checkpointing": lambda value: {"disable_gradient_checkpointing": not value},
        "attn": as_any_of({"flash_attention_2": {"flash_attn": "fa2"}, "sdpa": {"flash_attn": "sdpa"}}),
        "r": as_key("lora_rank"),
        "target_modules": as_any_of(
            {"q,v": {"lora_target": "q_proj,v_proj"}, "all-linear": {"lora_target": "all"}}
        ),
        "loss": as_any_of({"liger": {"enable_liger_kernel": True}}),
        "mode": _method_lines,
    },
)
