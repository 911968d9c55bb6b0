"""TRL's `trl sft --config FILE` (1.16): ModelConfig, SFTConfig and the script's arguments; and an SFTConfig
alone, as `to_json_string` writes it."""

from __future__ import annotations

from typing import Any

from memplan.asked.recipe import ZERO
from memplan.runfiles import RunFile, sizes
from memplan.runfiles._deepspeed import ALONE, FLOAT16, spread
from memplan.runfiles._keys import Keys, words
from memplan.runfiles._trainer import (
    IGNORED,
    ON_THE_FIRST_RANK,
    REFUSED,
    SAYS,
    SEVERAL,
    arguments,
    as_any_of,
    as_key,
    attention,
    checkpointing,
    packed,
    projections,
    quantised_in_8_bits,
)

_MODEL = (
    "model_name_or_path", "dtype", "torch_dtype", "use_peft", "lora_r", "lora_alpha", "lora_dropout",
    "lora_target_modules", "load_in_4bit", "load_in_8bit", "attn_implementation",
)  # fmt: skip
_OF_ADAPTERS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_rslora",
    "use_dora", "bnb_4bit_quant_type", "use_bnb_nested_quant",
)  # fmt: skip
_DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32", "auto": "bfloat16"}
_REFUSED = {
    "activation_offloading": "keeps activations on the host, which memplan does not plan",
    "lora_target_parameters": "names parameters, and memplan plans adapters on modules",
}

_LAUNCHED: dict[str | None, str | None] = {
    None: "ddp",
    "single_gpu": None,
    "multi_gpu": "ddp",
    "fsdp1": "fsdp",
    "fsdp2": "fsdp2",
    **{name: name for name in ZERO},
}
_PROCESSES = 8  # that all of TRL's own have


def _read(keys: Keys) -> None:
    keys.put("trainer", "trl")
    keys.base("model_name_or_path")
    # an SFTConfig says nothing of the model, and nor do its defaults
    model = any(map(keys.given, _MODEL))
    keys.sizes = sizes("trl", None if model else ("batch_size", "seq_len"))
    quantised_in_8_bits(keys)
    _launched(keys)
    loss = keys.text("loss_type")
    if loss not in (None, "nll", "chunked_nll"):
        keys.refuse("loss_type", "is another loss than memplan plans")
    keys.put("seq_len", keys.whole("max_length"))
    if not keys.given("max_length"):
        keys.put("seq_len", keys.whole("max_seq_length"))  # its name before TRL 0.20
    if "max_length" in keys.keys and "seq_len" not in keys.options:
        keys.leave_out("max_length: null cuts nothing: give by --seq-len how many tokens the longest has")
    arguments(keys)
    checkpointing(keys)
    _precision(keys)
    _model_arguments(keys)
    if model:
        _adapter(keys)
    _leave_out(keys)


def _launched(keys: Keys) -> None:
    """`trl/cli`: what accelerate is launched with stands in the same file; `trl/accelerate_configs`."""
    name = keys.text("accelerate_config")
    keys.launched_by("deepspeed")
    if name is not None and name.endswith((".yaml", ".yml", ".json")):
        keys.launched_by("accelerate_config")
        name = None
    if name not in _LAUNCHED:
        keys.refuse("accelerate_config", SEVERAL)
    count = keys.whole("num_processes")
    if count is None and name not in (None, "single_gpu"):
        count = _PROCESSES
    keys.nodes(count)
    if count is not None and count > 1:
        if name == "single_gpu":
            keys.refuse("num_processes", "contradicts accelerate_config: single_gpu", instead=False)
        keys.put("gpus", count)
        keys.put("parallel", _LAUNCHED[name])
        if name in ZERO:
            spread(keys, ZERO.index(name) + 1)
            if keys.flag("fp16"):
                keys.refuse("fp16", FLOAT16)
            if name == "zero1" and (keys.whole("gradient_accumulation_steps") or 1) != 1:
                words = "contradicts accelerate_config: zero1, which says 1"
                keys.refuse("gradient_accumulation_steps", words, instead=False)
        if name == "fsdp1":
            keys.put("backward_prefetch", "backward_pre")
            keys.put("forward_prefetch", True)
        if name in ("fsdp1", "fsdp2"):
            keys.leave_out(ON_THE_FIRST_RANK)
    elif name in ZERO:
        keys.refuse("num_processes", ALONE)


def _precision(keys: Keys) -> None:
    """`trl/trainer/base_config.py`: bf16 is on unless fp16 is."""
    fp16 = keys.flag("fp16")
    keys.put("autocast", keys.flag("bf16", default=not fp16) or fp16)
    if not (keys.given("bf16") or keys.given("fp16")):
        keys.options.pop("autocast")  # the trainer's, and told as such


def _model_arguments(keys: Keys) -> None:
    """What the model is loaded with, which SFTConfig may say, too."""
    own = keys.mapping("model_init_kwargs")
    dtype = own.get("dtype", own.get("torch_dtype"))
    if dtype is not None:
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            keys.wrong("model_init_kwargs", "with a dtype of torch's")
        keys.put("dtype", _DTYPES[dtype])
    for key in ("dtype", "torch_dtype"):
        keys.put("dtype", keys.one_of(key, _DTYPES))
    name = own.get("attn_implementation")
    if name is not None and not isinstance(name, str):
        keys.wrong("model_init_kwargs", "with the name of an attention implementation")
    attention(keys, "model_init_kwargs", name)
    attention(keys, "attn_implementation", keys.text("attn_implementation"))
    if own.get("use_kernels"):
        keys.left_out.append("model_init_kwargs: kernels of the Hub are not played")
    strange = own.keys() - {
        "dtype", "torch_dtype", "attn_implementation", "revision", "trust_remote_code", "use_kernels",
        "use_cache",
    }  # fmt: skip
    if strange:
        keys.refuse("model_init_kwargs", "loads the model in a way that memplan does not plan")


def _adapter(keys: Keys) -> None:
    four = keys.flag("load_in_4bit")
    if not keys.flag("use_peft"):
        if four:
            keys.refuse("load_in_4bit", "needs use_peft: true, for 4-bit weights can't be trained")
        keys.put("mode", "full")
        keys.unheard(*_OF_ADAPTERS)
        return
    keys.put("mode", "qlora" if four else "lora")
    keys.put("r", keys.whole("lora_r"))
    keys.put("lora_alpha", keys.number("lora_alpha"))
    keys.put("lora_dropout", keys.number("lora_dropout"))
    targets = keys.value("lora_target_modules")
    names = (targets,) if isinstance(targets, str) else keys.names("lora_target_modules")
    if names:  # one name is a pattern to PEFT, and all-linear one of its words
        keys.put("target_modules", names[0] if len(names) == 1 else names)
    keys.put("modules_to_save", keys.names("lora_modules_to_save") or None)
    keys.put_flag("use_dora", "use_dora")
    keys.put_flag("use_rslora", "use_rslora")
    if four:
        keys.put("quant_type", keys.one_of("bnb_4bit_quant_type", {"nf4": "nf4", "fp4": "fp4"}))
        if keys.given("use_bnb_nested_quant"):
            keys.put_flag("double_quant", "use_bnb_nested_quant")


def _leave_out(keys: Keys) -> None:
    if keys.flag("packing") or keys.flag("padding_free"):
        key = "packing" if keys.given("packing") else "padding_free"
        packed(keys, key, "max_length tokens", own_mask=keys.value("packing_strategy") == "wrapped")
    keys.leave_out("Liger's kernels are not played, so activations may be fewer", "use_liger_kernel")
    keys.leave_out("is planned from the configuration", "router_aux_loss_coef")


_NO_MEMORY = words(
    """
    liger_kernel_config model_revision lora_task_type bnb_4bit_quant_storage trust_remote_code
    chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token truncation_mode
    shuffle_dataset packing_strategy pad_to_multiple_of eval_packing completion_only_loss
    assistant_only_loss pad_token dataset_name dataset_config dataset_train_split dataset_test_split
    dataset_streaming gradient_checkpointing_use_reentrant ignore_bias_buffers datasets streaming
    test_split_size dataset_batch_size num_of_sequences chars_per_token
    """
)


def _targeted(value: Any) -> dict[str, Any] | None:
    if value == "all-linear":
        return {"lora_target_modules": "all-linear"}
    modules = projections(value)
    return {"lora_target_modules": modules} if modules else None


def _quantised(mode: Any) -> dict[str, Any]:
    return {"use_peft": True} | ({"load_in_4bit": True} if getattr(mode, "value", mode) == "qlora" else {})


RUNFILE = RunFile(
    title="TRL",
    own=words(
        """
        accelerate_config use_peft use_bnb_nested_quant bnb_4bit_quant_type max_seq_length packing_strategy
        padding_free loss_type dataset_name dataset_train_split dataset_test_split completion_only_loss
        assistant_only_loss dataset_text_field model_init_kwargs chat_template_path
    """
    ),
    read=_read,
    refuses={**REFUSED, **_REFUSED},
    launch="trl sft --config FILE",
    ignored=IGNORED | _NO_MEMORY,
    says={
        **SAYS,
        "seq_len": as_key("max_length"),
        "attn": as_key("attn_implementation"),
        "dtype": as_key("dtype"),
        "r": as_key("lora_r"),
        "target_modules": _targeted,
        "loss": as_any_of({"chunked": {"loss_type": "nll"}}),
        "mode": _quantised,
    },
)
