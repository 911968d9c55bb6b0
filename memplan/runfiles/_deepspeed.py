"""What DeepSpeed is told of ZeRO (0.19.8, `runtime/zero/config.py` and `offload_config.py`), in its own file
or by accelerate's keys. `auto` is the Trainer's (transformers 5.23, `integrations/deepspeed.py`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from memplan.asked.recipe import ZERO
from memplan.errors import shown
from memplan.runfiles._keys import Keys, words

T = TypeVar("T")

FLOAT16 = "trains in float16, in which memplan does not plan ZeRO"
ALONE = "is one: DeepSpeed on one card is not planned"
_BUCKET, _PREFETCH, _PERSISTENCE = 500_000_000, 50_000_000, 100_000  # elements
# What ZeRO is planned with, by the first stage that it is of; what is not there moves nothing, or is so by
# default.
_AS_PLANNED: Mapping[str, tuple[int, tuple[Any, ...]]] = {
    "contiguous_gradients": (1, (True,)),
    "reduce_scatter": (1, (True,)),
    "round_robin_gradients": (1, (False,)),
    "parameter_alignment": (1, (False,)),
    "compute_grad_norm": (1, (True,)),
    "use_multi_rank_bucket_allreduce": (1, (True,)),
    "memory_efficient_linear": (3, (True,)),
    "sub_group_size": (3, (1_000_000_000,)),
    "stage3_max_live_parameters": (3, (1_000_000_000,)),
    "stage3_max_reuse_distance": (3, (1_000_000_000,)),
    "stage3_model_persistence_threshold": (3, (sys.maxsize,)),
    "stage3_module_granularity_threshold": (3, (0,)),
    "stage3_use_all_reduce_for_fetch_params": (3, (False,)),
    "stage3_allgather_sequential": (3, (False,)),
    "zero_hpz_partition_size": (3, (1, 0)),
    "zero_quantized_weights": (3, (False,)),
    "zero_quantized_nontrainable_weights": (3, (False,)),
    "zero_quantized_gradients": (3, (False,)),
    "mics_shard_size": (3, (-1,)),
    "mics_hierarchical_params_gather": (3, (False,)),
}
_IGNORED = words(
    """
    allgather_partitions allgather_bucket_size load_from_fp32_weights elastic_checkpoint
    ignore_unused_parameters legacy_stage1 pipeline_loading_checkpoint override_module_apply
    log_trace_cache_warnings enable_sanity_checks stage3_gather_16bit_weights_on_model_save
    stage3_gather_fp16_weights_on_model_save
    cpu_offload_use_pin_memory
    """
)


def zero(keys: Keys, key: str, values: Mapping[str, Any]) -> None:
    """Take the mapping ``zero_optimization``, which is under ``key`` of the file."""
    inside = keys.within(key, values)
    if not values:
        keys.refuse(key, "is not there: of DeepSpeed memplan plans ZeRO")
    stage = inside.whole("stage", least=0) or 0
    if not 0 < stage <= len(ZERO):
        inside.refuse("stage", "is not planned: memplan plans ZeRO's stages 1, 2 and 3")
    inside.refuse_any(
        {
            "cpu_offload": _OLD, "cpu_offload_param": _OLD, "zenflow": "is not planned yet",
            "leaf_module": "gathers other modules together, which memplan does not plan",
            "zeropp_loco_param": "is no key of DeepSpeed's any more",
        }
    )  # fmt: skip
    for name, (first, planned) in _AS_PLANNED.items():
        if inside.given(name) and inside.value(name) not in planned and stage >= first:
            inside.refuse(name, f"is not planned: memplan plans ZeRO with {shown(planned[0])}")
    overlaps = inside.flag("overlap_comm", default=stage == 3)
    spread(
        keys,
        stage,
        overlaps=overlaps,
        bucket=_elements(inside, "reduce_bucket_size", _BUCKET, least=1),
        prefetch=_elements(inside, "stage3_prefetch_bucket_size", _PREFETCH),
        persistence=_elements(inside, "stage3_param_persistence_threshold", _PERSISTENCE),
    )
    _offload(keys, inside, stage)
    inside.finish(_IGNORED)
    # short, for the line that says what was read
    away = keys.options.get("offload")
    keys.understood[key] = f"stage {stage}" + (f", offload {away}" if away else "")


_OLD = "is an old name: use offload_optimizer or offload_param"


def spread(
    keys: Keys,
    stage: int,
    *,
    overlaps: bool | None = None,
    bucket: int | str = _BUCKET,
    prefetch: int | str = _PREFETCH,
    persistence: int | str = _PERSISTENCE,
) -> None:
    """Set the recipe's options of a stage, by DeepSpeed's own defaults where nothing is given."""
    keys.put("parallel", ZERO[stage - 1])
    if not (stage == 3 if overlaps is None else overlaps):
        keys.put("overlap_comm", False)
    if bucket != (_BUCKET if stage < 3 else "auto"):
        keys.put("reduce_bucket_size", bucket)
    if stage == 3:
        if prefetch != "auto":
            keys.put("stage3_prefetch_bucket_size", prefetch)
        if persistence != "auto":
            keys.put("stage3_param_persistence_threshold", persistence)


def unless_auto(keys: Keys, key: str, read: Callable[[str], T | None]) -> T | None:
    """What is read of a key; None of `auto`, which leaves it to the Trainer's arguments."""
    return None if keys.value(key) == "auto" else read(key)


def _elements(inside: Keys, key: str, default: int, least: int = 0) -> int | str:
    if inside.value(key) == "auto":
        return "auto"
    found = inside.whole(key, least=least)
    return default if found is None else found


def _offload(keys: Keys, inside: Keys, stage: int) -> None:
    away = []
    for key in ("offload_optimizer", "offload_param"):
        told = inside.mapping(key)
        device = told.get("device") or "none"
        if device not in ("none", "cpu", "nvme"):
            inside.wrong(key, "with a device of none, cpu or nvme")
        if device == "none":
            continue
        if device == "nvme":
            inside.refuse(key, "offloads to a disk, which memplan does not plan")
        if told.get("ratio", 1) != 1 or told.get("super_offload"):
            inside.refuse(key, "offloads a part of the optimizer, which memplan does not plan")
        away.append(key)
        if told.get("pin_memory") is False:
            keys.left_out.append(f"{key}: the host's memory is told as if it were pinned")
    if not away:
        return
    if away == ["offload_param"]:
        inside.refuse("offload_param", "without offload_optimizer is not planned")
    if stage < 3 and len(away) > 1:
        inside.refuse("offload_param", "is of stage 3 alone", instead=False)
    keys.put("offload", "both" if len(away) > 1 else "optimizer")
