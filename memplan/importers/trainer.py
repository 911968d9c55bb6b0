"""A Trainer's arguments and its model -> the recipe that they amount to, and the model's spec.

They are asked, not imported: nothing here needs torch, transformers or PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.errors import MemplanError
from memplan.importers.hf import spec_from_config


def base_of(model: Any) -> Any:
    """The model without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def spec_of(model: Any) -> ModelSpec:
    """The architecture of a model that transformers made. Raises MemplanError if it has no plan."""
    base = base_of(model)
    if not hasattr(base, "config"):
        raise MemplanError(f"a {type(base).__name__} has no configuration of transformers'")
    config = base.config.to_dict()
    config["architectures"] = [_made_as(type(base)).__name__]
    if getattr(base, "is_loaded_in_4bit", False):
        config.pop("quantization_config", None)  # the layers tell, more exactly (recipe_of)
    return spec_from_config(config, config.get("_name_or_path") or type(base).__name__)


def _made_as(kind: type) -> type:
    """The class that transformers made: ``fully_shard`` puts the model into one of its own
    (torch/distributed/fsdp/_fully_shard/_fully_shard.py, ``_apply_to_module``)."""
    first, *rest = kind.__bases__
    return rest[0] if first.__name__ == "FSDPModule" and rest else kind


def recipe_of(args: Any, model: Any, seq_len: int) -> Recipe:
    """The recipe that a Trainer's arguments and model amount to. Raises MemplanError for what can't be
    planned, such as an optimizer that has no model."""
    base = base_of(model)
    options: dict[str, Any] = {
        "mode": "full",
        "trainer": "trl" if type(args).__module__.partition(".")[0] == "trl" else "peft",
        "batch_size": args.per_device_train_batch_size,
        "seq_len": seq_len,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "max_grad_norm": args.max_grad_norm or 0.0,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "autocast": bool(args.bf16 or args.fp16),
        "use_cache": bool(getattr(base.config, "use_cache", False)),  # set by the Trainer
        "attn": getattr(base.config, "_attn_implementation", None) or "sdpa",
        "loss": loss_of(args),
        "gradient_checkpointing": any(
            getattr(module, "gradient_checkpointing", False) for module in base.modules()
        ),
    }
    if options["gradient_checkpointing"]:
        options["use_reentrant"] = _reentrant(base)
    if hasattr(model, "peft_config"):
        options |= _adapter(model, base)
    if getattr(args, "world_size", 1) > 1:
        options |= _spread(args, model)
    options["dtype"] = _dtype(base)
    return Recipe(**options)


def _spread(args: Any, model: Any) -> dict[str, Any]:
    """How several processes share a step, told by what has become of the model."""
    classes = [kind.__name__ for kind in type(model).__mro__]
    if "FullyShardedDataParallel" in classes:
        raise MemplanError("FSDP1 is not planned: set fsdp_version to 2")
    engine = str(getattr(getattr(args, "distributed_state", None), "distributed_type", ""))
    if getattr(args, "deepspeed", None) or engine.endswith("DEEPSPEED"):
        raise MemplanError("DeepSpeed is not measured by this callback so far: ask `memplan` for its plan")
    options: dict[str, Any] = {"parallel": "ddp", "gpus": args.world_size, "device_map": None}
    if "FSDPModule" in classes:
        options["parallel"] = "fsdp2"
        away = str(next(model.parameters()).device).partition(":")[0] == "cpu"
        if away and str(args.device).partition(":")[0] != "cpu":
            options["offload"] = "both"
        options |= _divided(model)
    return options


def _divided(model: Any) -> dict[str, Any]:
    """Over how many processes, and whether what is gathered goes after forward: that of the last norm and of
    the model itself never does (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, 2.13)."""
    found: dict[str, Any] = {}
    mesh = next(model.parameters()).device_mesh
    if mesh.ndim > 1:
        found["dp_replicate"] = mesh.size(0)
    states = [one._get_fsdp_state() for one in model.modules() if hasattr(one, "_get_fsdp_state")]
    told = [state for state in states if not state._auto_reshard_after_forward]  # which is the model itself
    groups = [group for state in told for group in state._fsdp_param_groups]
    if all(group.post_forward_mesh_info is None for group in groups):
        found["reshard_after_forward"] = False
    return found


def _adapter(model: Any, base: Any) -> dict[str, Any]:
    config = model.peft_config[model.active_adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise MemplanError(f"adapters of PEFT's type {kind} are not planned, only LORA")
    own = next((p for name, p in model.named_parameters() if "lora_A" in name), None)
    targets = config.target_modules
    options: dict[str, Any] = {
        "mode": "lora",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else tuple(sorted(targets or ())),
        "modules_to_save": tuple(config.modules_to_save or ()),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    if own is not None:
        options["adapter_dtype"] = _name(own.dtype)
    if getattr(base, "is_loaded_in_4bit", False):
        _, state = next(_quantised(base))
        norms = [p for name, p in base.named_parameters() if p.dim() == 1 and "norm" in name]
        options |= {
            "mode": "qlora",
            "quant_type": state.quant_type,
            "double_quant": state.nested,
            # prepare_model_for_kbit_training leaves no norm in 16 bits (peft/utils/other.py)
            "kbit_prep": bool(norms)
            and all(_name(p.dtype) == "float32" for p in norms)
            and _dtype(base) != "float32",
            "compute_dtype": _compute_dtype(base),
        }
    return options


def _quantised(base: Any) -> Iterator[tuple[Any, Any]]:
    """Layers in 4 bits, and what bitsandbytes keeps beside their weights: of a weight that is sharded, the
    layer alone has it."""
    for module in base.modules():
        weight = getattr(module, "weight", None)
        for owner in (weight, module):
            state = getattr(owner, "quant_state", None)
            if weight is not None and state is not None:
                yield module, state
                break


def _dtype(base: Any) -> str:
    """What the model was loaded in, which 4-bit weights remember."""
    for _, state in _quantised(base):
        return _name(state.dtype)
    return _name(next(p.dtype for p in base.parameters() if p.is_floating_point()))


def _compute_dtype(base: Any) -> str | None:
    """What 4-bit layers multiply in; None where they have not been told."""
    for module, _ in _quantised(base):
        compute = getattr(module, "compute_dtype", None)
        if compute is not None:
            return _name(compute)
    return None


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _reentrant(base: Any) -> bool:
    """What the model's checkpointing function was given; torch's own default is reentrant."""
    for module in base.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return True


def loss_of(args: Any) -> str:
    """The loss that its arguments ask for."""
    if getattr(args, "use_liger_kernel", False):
        return "liger"
    return "chunked" if tiled_by_trl(getattr(args, "loss_type", None)) else "standard"


def tiled_by_trl(loss_type: str | None) -> bool:
    """Whether SFTTrainer computes its loss in tiles: in TRL 1.16 "chunked_nll" is another name of "nll",
    which does (trl/trainer/sft_config.py); before, "nll" was the standard loss."""
    from importlib.metadata import version

    if loss_type == "nll":
        return tuple(int(part) for part in version("trl").split(".")[:2]) >= (1, 16)
    return loss_type == "chunked_nll"
