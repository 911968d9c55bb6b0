"""accelerate's YAML or JSON (1.15, `commands/config/config_args.py`): where a run runs, not what it is."""

from __future__ import annotations

from typing import Any

from memplan.asked.recipe import BackwardPrefetch
from memplan.errors import printable, shown
from memplan.runfiles import RunFile
from memplan.runfiles._deepspeed import ALONE, FLOAT16, unless_auto, zero
from memplan.runfiles._keys import Keys, words
from memplan.runfiles._trainer import ON_THE_FIRST_RANK

_ALONE = ("NO", "no")
# What each version is planned with, by keys of `fsdp_config`; what is not there is so by default or moves
# nothing.
_SHARDED: dict[int, dict[str, tuple[Any, ...]]] = {
    1: {
        "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
        "fsdp_use_orig_params": (True, None),
        "fsdp_sync_module_states": (True, None),
        "fsdp_activation_checkpointing": (False, None),
        "fsdp_ignored_modules": (None, ""),
    },
    2: {
        "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", None),
        "fsdp_activation_checkpointing": (False, None),
        "fsdp_ignored_modules": (None, ""),
    },
}
# `utils/constants.py`, FSDP_SHARDING_STRATEGY: names, or numbers from 1 on
_STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
_WRAPPED = ("DecoderLayer", "Block")  # how classes of whole layers are called
_STORING = words("fsdp_state_dict_type fsdp_min_num_params")


def _read(keys: Keys) -> None:
    kind = keys.text("distributed_type") or "NO"
    if kind == "MULTI_GPU":
        _of_several(keys, "ddp")
    elif kind == "FSDP":
        _sharded(keys)
    elif kind in _ALONE:
        keys.several("num_processes", "num_machines")
    elif kind == "DEEPSPEED":
        _zero(keys)
    else:
        keys.refuse("distributed_type", "spreads the run in a way that memplan does not plan yet")
    own = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}
    if keys.value("parallelism_config"):
        _mesh(keys)
    others = [key for of, key in own.items() if of != kind]
    keys.refuse_any(dict.fromkeys(others, "is not planned yet"))
    keys.refuse_any({"use_cpu": "trains on the processor, whose memory memplan does not plan"})
    precision = keys.one_of("mixed_precision", {"no": False, "bf16": True, "fp16": True, "fp8": None}, False)
    if precision is None:
        keys.refuse("mixed_precision", "computes in 8 bits, which memplan does not plan")
    if kind == "DEEPSPEED" and keys.value("mixed_precision") == "fp16":
        keys.refuse("mixed_precision", FLOAT16)
    if precision:  # "no" leaves it to the trainer, whose own bf16 overrules it
        keys.put("autocast", True)
    keys.leave_out("what torch.compile keeps is another amount", "dynamo_config")


def _of_several(keys: Keys, parallel: str) -> None:
    count = keys.whole("num_processes")
    keys.nodes(count)
    if count is None or count > 1:  # unless it is said, of all cards that there are
        keys.put("gpus", count)
        keys.put("parallel", parallel)


def _sharded(keys: Keys) -> None:
    told = keys.within("fsdp_config", keys.mapping("fsdp_config"))
    versions = {
        1: 1,
        2: 2,
        "1": 1,
        "2": 2,
        None: 1,
    }  # `utils/dataclasses.py`, `FullyShardedDataParallelPlugin`
    given = told.value("fsdp_version")
    if isinstance(given, (dict, list)) or given not in versions:
        told.wrong("fsdp_version", "1 or 2")
    version = versions[given]
    for key, planned in _SHARDED[version].items():
        value = told.value(key)
        if isinstance(value, (dict, list)) or value not in planned:
            said = f"no {key}" if value is None else f"{key} {printable(str(value)[:60])}"
            keys.refuse("fsdp_config", f"is of FSDP{version} with {said}, which memplan does not plan yet")
    for name in told.names("fsdp_transformer_layer_cls_to_wrap"):
        if not name.endswith(_WRAPPED):
            keys.refuse("fsdp_config", f"wraps {shown(name)}, and memplan plans decoder layers as units")
    _of_several(keys, "fsdp" if version == 1 else "fsdp2")
    several = "parallel" in keys.options
    if not several:
        keys.refuse("num_processes", "is one: FSDP on one card is not planned")
    ahead, behind = told.flag("fsdp_forward_prefetch"), _prefetch(told)
    _resharded(keys, told, version)
    if version == 1 and several:
        keys.put("backward_prefetch", behind)
        if ahead:
            keys.put("forward_prefetch", True)
        if keys.value("mixed_precision") == "fp16":
            keys.refuse("mixed_precision", "trains in float16, in which memplan does not plan FSDP1")
    if told.flag("fsdp_offload_params") and several:
        keys.put("offload", "both")
    if told.flag("fsdp_cpu_ram_efficient_loading"):
        keys.leave_out(ON_THE_FIRST_RANK)
    told.finish(_STORING | set(_SHARDED[1]))


def _resharded(keys: Keys, told: Keys, version: int) -> None:
    """What stays gathered after forward: FSDP2's is true or false, FSDP1's a strategy by name or number, for
    the launcher always says one (`utils/dataclasses.py`, `FullyShardedDataParallelPlugin.__post_init__`)."""
    several = "parallel" in keys.options
    after = told.value("fsdp_reshard_after_forward")
    if version == 2:
        told.value("fsdp_sharding_strategy")  # passed over
        if after is not None and not told.flag("fsdp_reshard_after_forward") and several:
            keys.put("reshard_after_forward", False)
        return
    given = told.value("fsdp_sharding_strategy")
    name = "FULL_SHARD" if given is None else str(given).upper()
    if name.isdecimal() and 0 < int(name[:2]) <= len(_STRATEGIES):
        name = _STRATEGIES[int(name[:2]) - 1]
    if name not in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"):
        said = f"fsdp_sharding_strategy {printable(str(given)[:60])}"
        keys.refuse("fsdp_config", f"is of FSDP1 with {said}, which memplan does not plan yet")
    if name == "SHARD_GRAD_OP" and several:
        keys.put("reshard_after_forward", False)
    if name == "HYBRID_SHARD" and several:
        keys.put("dp_replicate", keys.options.get("nodes"))  # on one machine all share a model
    if after is not None and str(after).upper() not in (name, "TRUE"):
        keys.leave_out(
            "fsdp_reshard_after_forward: accelerate passes it over of FSDP1, whose fsdp_sharding_strategy "
            f"is {name}"
        )


def _mesh(keys: Keys) -> None:
    """`parallelism_config.py`: how many times the model is there, and over how many each is divided."""
    told = keys.within("parallelism_config", keys.mapping("parallelism_config"))
    sizes = {
        name: told.whole(f"parallelism_config_{name}_size") or 1
        for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    }
    if max(sizes["tp"], sizes["cp"], sizes["sp"]) > 1:
        keys.refuse("parallelism_config", "spreads the run in more ways, which memplan does not plan yet")
    if keys.options.get("parallel") != "fsdp2":
        keys.refuse("parallelism_config", "is of FSDP2 alone (fsdp_version: 2)", instead=False)
    count = keys.options.get("gpus")
    replicas, shards = sizes["dp_replicate"], sizes["dp_shard"]
    if count is not None and replicas * shards != count:
        keys.refuse(
            "parallelism_config",
            f"has {replicas} × {shards} of {count} processes, and accelerate wants all of them",
            instead=False,
        )
    keys.put("gpus", replicas * shards)
    if replicas > 1:
        keys.put("dp_replicate", replicas)
    told.finish(_OF_MESHES)


_OF_MESHES = words(
    """
    parallelism_config_cp_backend parallelism_config_cp_comm_strategy parallelism_config_sp_backend
    parallelism_config_sp_seq_length parallelism_config_sp_seq_length_is_variable
    parallelism_config_sp_attn_implementation
    """
)


def _prefetch(told: Keys) -> str | None:
    """In any case of letters, or as a number."""
    given = told.value("fsdp_backward_prefetch")
    ways = [way.value for way in BackwardPrefetch]
    known: dict[str, str] = {way.upper(): way for way in ways} | {"1": ways[0], "2": ways[1]}
    if given is None:
        return None
    if isinstance(given, (dict, list)) or str(given).upper() not in known:
        told.wrong("fsdp_backward_prefetch", "BACKWARD_PRE, BACKWARD_POST or NO_PREFETCH")
    return known[str(given).upper()]


def _zero(keys: Keys) -> None:
    """`utils/dataclasses.py`, `DeepSpeedPlugin`: what is not said is DeepSpeed's own default."""
    told = keys.within("deepspeed_config", keys.mapping("deepspeed_config"))
    if told.given("deepspeed_config_file"):
        told.launched_by("deepspeed_config_file")
        keys.beside = told.beside
        told.finish(_LAUNCHING | {"zero_stage", "gradient_accumulation_steps", "gradient_clipping"})
        _of_several(keys, "zero3")  # or as that file says
        return
    stage = told.whole("zero_stage", least=0)
    values: dict[str, Any] = {"stage": 2 if stage is None else stage}
    for key, inside in (
        ("offload_optimizer_device", "offload_optimizer"),
        ("offload_param_device", "offload_param"),
    ):
        values[inside] = {"device": told.text(key) or "none"}
    zero(keys, "deepspeed_config", values)
    steps = "gradient_accumulation_steps"
    keys.put(steps, unless_auto(told, steps, told.whole))
    keys.put("max_grad_norm", unless_auto(told, "gradient_clipping", told.number))
    told.refuse_any({"enable_msamp": "trains in 8 bits, which memplan does not plan"})
    told.finish(_LAUNCHING)
    _of_several(keys, keys.options.pop("parallel"))
    if "parallel" not in keys.options:
        keys.refuse("num_processes", ALONE)


_LAUNCHING = words(
    """
    zero3_init_flag zero3_save_16bit_model deepspeed_multinode_launcher deepspeed_hostfile
    deepspeed_exclusion_filter deepspeed_inclusion_filter deepspeed_moe_layer_cls_names msamp_opt_level
    offload_optimizer_nvme_path offload_param_nvme_path
    """
)


RUNFILE = RunFile(
    title="accelerate",
    own=words("distributed_type compute_environment machine_rank num_machines num_processes"),
    read=_read,
    launch="accelerate launch --config_file FILE YOUR_SCRIPT.py",
    binding=frozenset({"gradient_accumulation_steps", "max_grad_norm"}),
    ignored=words(
        """
        compute_environment debug machine_rank gpu_ids main_process_ip main_process_port rdzv_backend
        same_network main_training_function enable_cpu_affinity megatron_lm_config
        mpirun_config tpu_name tpu_zone tpu_use_cluster tpu_use_sudo command_file commands tpu_vm tpu_env
        downcast_bf16 fp8_config
    """
    ),
)
