"""What files of trainers that are built on the HF Trainer share: its arguments (transformers 5.23,
`training_args.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from memplan import rooms
from memplan.asked.recipe import OPTIMIZER_ALIASES
from memplan.runfiles._keys import Keys, words

IGNORED = words(
    """
    output_dir overwrite_output_dir num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon
    average_tokens_across_devices bf16_full_eval fp16_full_eval tf32 log_on_each_node
    include_num_input_tokens_seen include_tokens_per_second log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_steps
    eval_delay prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps include_for_metrics include_inputs_for_metrics batch_eval_metrics
    save_only_model save_strategy save_steps save_on_each_node save_total_limit save_safetensors
    enable_jit_checkpoint push_to_hub load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint seed data_seed jit_mode_eval use_ipex
    accelerator_config remove_unused_columns label_names group_by_length train_sampling_strategy
    length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint
    local_rank use_mps_device past_index push_to_hub_model_id push_to_hub_organization push_to_hub_token
    mp_parameters ray_scope dispatch_batches split_batches fp16_opt_level fp16_backend
    half_precision_backend torchdynamo tpu_num_cores tpu_metrics_debug optim_target_modules fsdp_config
    fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap env
    """
)
SEVERAL = "spreads the run over several cards in a way that memplan does not plan yet"
DEEPSPEED = "sets up DeepSpeed by a file of its own: ask about that one, with --config and --gpus"
BY_A_FILE: Mapping[str, str] = {"deepspeed": DEEPSPEED}  # of trainers that were not compared under ZeRO
ON_THE_FIRST_RANK = (
    "fsdp_cpu_ram_efficient_loading: the first rank alone loads, which moves what is reserved; played as if "
    "all did"
)
REFUSED: Mapping[str, str] = {
    "fsdp": SEVERAL,
    "parallelism_config": SEVERAL,
    **dict.fromkeys(("use_cpu", "no_cuda"), "trains on the processor, whose memory memplan does not plan"),
    "label_smoothing_factor": "is another loss than memplan plans",
}


def optimizer(keys: Keys, key: str) -> None:
    """Take the optimizer's name."""
    name = keys.text(key)
    if name is None:
        return
    name = name.rpartition(".")[2].lower() if name.startswith("OptimizerNames.") else name
    if OPTIMIZER_ALIASES.get(name, name) not in rooms.names("optimizers"):
        keys.refuse(key, f"is not planned; planned are {', '.join(rooms.names('optimizers'))}")
    keys.put("optimizer", name)


def arguments(keys: Keys) -> None:
    """Take the HF Trainer's arguments: sizes, the optimizer, and what no plan follows."""
    keys.put("batch_size", keys.whole("per_device_train_batch_size"))
    keys.put("gradient_accumulation_steps", keys.whole("gradient_accumulation_steps"))
    keys.put("max_grad_norm", keys.number("max_grad_norm"))
    keys.put_flag("use_cache", "use_cache")
    if keys.flag("bf16") and keys.flag("fp16"):  # TrainingArguments.__post_init__
        keys.wrong("fp16", "false where bf16 is true")
    optimizer(keys, "optim")
    _optimizer_arguments(keys)
    _evaluation(keys)
    keys.leave_out("what torch.compile keeps is another amount", "torch_compile", "torch_compile_backend")
    keys.leave_out("its noise is not counted", "neftune_noise_alpha")
    keys.leave_out("reserved memory may be less", "torch_empty_cache_steps")
    keys.leave_out("attention may run in another kernel", "full_determinism")
    keys.leave_out("this is the plan of its first try", "auto_find_batch_size")


def _evaluation(keys: Keys) -> None:
    strategy = keys.value("eval_strategy") or keys.value("evaluation_strategy") or "no"
    size = keys.whole("per_device_eval_batch_size") or 8
    keys.evaluates = 0 if strategy in ("no", False) else size  # YAML 1.1 reads `no` as false
    for key in ("eval_strategy", "evaluation_strategy", "per_device_eval_batch_size"):
        if not keys.evaluates:
            keys.understood.pop(key, None)


def _optimizer_arguments(keys: Keys) -> None:
    """`optim_args`, of which only SGD's momentum makes states."""
    text = keys.text("optim_args")
    for pair in (text or "").replace(" ", "").split(","):
        name, _, value = pair.partition("=")
        if name == "momentum":
            try:
                keys.put("momentum", float(value))
            except ValueError:
                keys.wrong("optim_args", "name=number, with commas between them")


def checkpointing(keys: Keys) -> None:
    """Whether the Trainer checkpoints, and how; its older name counts, too."""
    for flag in ("gradient_checkpointing", "activation_checkpointing"):
        if keys.given(flag):
            keys.put("gradient_checkpointing", keys.flag(flag))
        reentrant(keys, f"{flag}_kwargs")
    if keys.options.get("gradient_checkpointing") is False:
        keys.options.pop("use_reentrant", None)


def reentrant(keys: Keys, key: str) -> None:
    """`use_reentrant` of these arguments, if they say it."""
    said = keys.mapping(key).get("use_reentrant")
    if said is not None:
        if not isinstance(said, bool):
            keys.wrong(key, "use_reentrant: true or false")
        keys.put("use_reentrant", said)


def attention(keys: Keys, key: str, name: str | None) -> None:
    """An attention implementation by transformers' name."""
    if name is None:
        return
    plain = name.partition("@")[0].partition(":")[0]
    if plain in rooms.names("attention"):
        keys.put("attn", plain)
    elif plain in _LIKE_FLASH:
        keys.put("attn", "flash_attention_2")
        keys.left_out.append(f"{key}: {plain}: planned as FlashAttention 2")
    else:
        keys.refuse(key, f"is not planned; planned are {', '.join(rooms.names('attention'))}")


_LIKE_FLASH = (
    "flash_attention_3",
    "flash_attention_4",
    "kernels-community/flash-attn2",
    "kernels-community/flash-attn3",
    "kernels-community/vllm-flash-attn3",
    "kernels-community/flash-attn",
)


def quantised_in_8_bits(keys: Keys, key: str = "load_in_8bit") -> None:
    """Refuse an 8-bit base."""
    keys.refuse_any({key: "is an 8-bit base, which memplan does not plan"})


def packed(keys: Keys, key: str, length: str, *, own_mask: bool = True) -> None:
    """Say how packed rows are planned: with the mask that transformers makes, unless FlashAttention needs
    none or the trainer has its own."""
    if not own_mask and keys.options.get("attn") != "flash_attention_2":
        keys.options["batches"] = "packed"
        return
    if keys.options.get("attn") == "flash_attention_2":
        keys.left_out.append(f"{key}: planned as full rows of {length}")
    else:
        keys.left_out.append(
            f"{key}: planned as full rows of {length}; the mask that keeps its sequences apart without "
            "FlashAttention is not counted"
        )


# -- how a file says a change -----------------------------------------------------------------------------

Said = Callable[[Any], Mapping[str, Any] | None]


def as_key(key: str) -> Said:
    """The value itself."""
    return lambda value: {key: getattr(value, "value", value)}


def as_any_of(known: Mapping[Any, Mapping[str, Any]]) -> Said:
    """What stands for each of these values; nothing else can be said."""
    return lambda value: known.get(getattr(value, "value", value))


def projections(target: Any) -> list[str] | None:
    """The modules that a preset names; None of other targets."""
    return {"q,v": ["q_proj", "v_proj"], "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}.get(target)


SAYS: Mapping[str, Said] = {
    "batch_size": as_key("per_device_train_batch_size"),
    "gradient_accumulation_steps": as_key("gradient_accumulation_steps"),
    "optimizer": as_key("optim"),
    "max_grad_norm": as_key("max_grad_norm"),
    "gradient_checkpointing": as_key("gradient_checkpointing"),
    "autocast": as_key("bf16"),
}
