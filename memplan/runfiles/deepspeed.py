"""DeepSpeed's JSON (0.19.8, `runtime/config.py`), which transformers' Trainer takes with `--deepspeed`: how a
step is spread over cards. It holds no model, and the number of cards only by its batch sizes."""

from __future__ import annotations

from memplan.runfiles import RunFile
from memplan.runfiles._deepspeed import FLOAT16, unless_auto, zero
from memplan.runfiles._keys import Keys, words


def _read(keys: Keys) -> None:
    zero(keys, "zero_optimization", keys.mapping("zero_optimization"))
    _precision(keys)
    _sizes(keys)
    _optimizer(keys)
    keys.leave_out("what torch.compile keeps is another amount", "compile")


def _precision(keys: Keys) -> None:
    told = keys.mapping("bf16")
    enabled = {name: keys.mapping(name).get("enabled", "auto") for name in ("fp16", "bf16")}
    for name, value in enabled.items():
        if value not in (True, False, "auto") or not isinstance(value, bool | str):
            keys.wrong(name, "with enabled: true, false or auto")
    if enabled["fp16"] is True:
        keys.refuse("fp16", FLOAT16)
    if enabled["bf16"] is False:
        keys.refuse("bf16", "is off, and ZeRO is planned in bf16")
    if enabled["bf16"] is True:
        keys.put("autocast", True)
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states", "immediate_grad_update"):
        if told.get(key):
            keys.refuse("bf16", f"has {key}, which memplan does not plan")
    if keys.mapping("torch_autocast").get("enabled"):
        keys.refuse("torch_autocast", "is not planned: memplan plans ZeRO as it casts the model itself")
    if keys.mapping("data_types").get("grad_accum_dtype") not in (None, "bf16"):
        keys.refuse("data_types", "adds gradients up in another dtype than the model's")
    keys.refuse_any({"communication_data_type": "reduces gradients in another dtype, which is not planned"})


def _sizes(keys: Keys) -> None:
    """Numbers, or auto, which leaves it to the Trainer's arguments."""
    numbers = {
        key: unless_auto(keys, key, keys.whole)
        for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    }
    micro, steps, whole = numbers.values()
    keys.put("batch_size", micro)
    keys.put("gradient_accumulation_steps", steps)
    if whole and micro and steps:
        if whole % (micro * steps):
            keys.wrong("train_batch_size", f"a multiple of {micro * steps}, a card's share of it")
        keys.put("gpus", whole // (micro * steps))
    elif whole:
        keys.leave_out("train_batch_size: it is not divided by cards and passes that are not said")
    keys.put("max_grad_norm", unless_auto(keys, "gradient_clipping", keys.number))
    for key in (*numbers, "gradient_clipping"):
        if keys.understood.get(key) == "auto":
            del keys.understood[key]


def _optimizer(keys: Keys) -> None:
    told = keys.mapping("optimizer")
    kind = told.get("type")
    if kind is None:
        return
    if not isinstance(kind, str) or kind.lower() not in ("adam", "adamw"):
        keys.refuse("optimizer", "is not planned with ZeRO; Adam and AdamW are")
    if "offload" not in keys.options:
        keys.leave_out("optimizer: DeepSpeed's FusedAdam is planned as PyTorch's fused AdamW")


RUNFILE = RunFile(
    title="DeepSpeed",
    own=words(
        """
        zero_optimization train_micro_batch_size_per_gpu zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer wall_clock_breakdown
    """
    ),
    read=_read,
    refuses={
        "tensor_parallel": "splits layers over cards, which memplan does not plan yet",
        "sequence_parallel_size": "splits sequences over cards, which memplan does not plan yet",
        "pipeline": "is of DeepSpeed's pipelines, which memplan does not plan",
        "amp": "is of NVIDIA's apex, which memplan does not plan",
        "expert_parallel": "spreads experts over cards, which memplan does not plan yet",
        "hybrid_engine": "is DeepSpeed-Chat's, which memplan does not plan",
        "weight_quantization": "quantises weights, which memplan does not plan",
        "compression_training": "quantises or prunes weights, which memplan does not plan",
    },
    ignored=words(
        """
        steps_per_print wall_clock_breakdown scheduler zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer activation_checkpointing prescale_gradients gradient_predivide_factor
        sparse_gradients dump_state comms_logger communication_options flops_profiler tensorboard wandb
        csv_monitor comet checkpoint autotuning elasticity aio memory_breakdown data_efficiency
        curriculum_learning dataloader_drop_last disable_allgather seq_parallel_communication_data_type
        nebula eigenvalue progressive_layer_drop load_universal_checkpoint use_data_before_expert_parallel_
        graph_harvesting monitor_config timers
    """
    ),
    launch="deepspeed YOUR_SCRIPT.py --deepspeed FILE",
    binding=frozenset({"batch_size", "gradient_accumulation_steps", "max_grad_norm", "gpus"}),
)
