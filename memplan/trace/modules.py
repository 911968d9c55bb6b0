"""The real model under fake tensors: transformers' class, bitsandbytes' 4-bit layers, PEFT's adapters."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memplan import weights
from memplan.asked.fields import MAX_LAYERS, MAX_POSITIONS, MAX_SIZE
from memplan.asked.options import ATTENTION
from memplan.asked.recipe import DTypeName, Kernels, Mode, Recipe
from memplan.errors import TraceError, shown
from memplan.weights import Quantised

DTYPES = {
    DTypeName.BFLOAT16: torch.bfloat16,
    DTypeName.FLOAT16: torch.float16,
    DTypeName.FLOAT32: torch.float32,
}

# Of heads that classify, which no step here has; transformers makes a name for each of ``num_labels``.
_OF_OTHER_HEADS = ("num_labels", "id2label", "label2id", "problem_type")

# Making a module takes 0.1 ms. DeepSeek-V3's 61 layers of 256 experts are 80,000 where each expert has some
# of its own; with fused experts, as here, no model has more than a few thousand.
_MAX_MODULES = 100_000


def build(config: dict[str, Any], recipe: Recipe) -> nn.Module:
    """The model as a Trainer would get it. Call inside ``FakeTensorMode``."""
    return dressed(base_model(config, recipe), recipe)


def dressed(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The base model quantised, prepared, with adapters and kernels, as the recipe says."""
    form = weights.of(recipe)
    if form is not None:
        quantize(model, recipe, form, form.fake)
    model = with_kernels(prepare(model, recipe), recipe)
    model.train()
    return model


def with_kernels(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model with memplan's kernels, if the recipe has them."""
    if recipe.kernels is Kernels.MEMPLAN:
        from memplan.kernels import apply

        apply(model)
    return model


def configuration(config: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' configuration and class of a causal language model, or of one that sees, too."""
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    try:
        settings: dict[str, Any] = _bounded(config)  # a copy, for transformers writes into nested ones too
    except RecursionError:
        raise TraceError("the configuration is nested too deeply to be one of a model") from None
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise TraceError("the configuration has no model_type, so transformers can't tell which model it is")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own = ", and memplan runs no code that comes with a model" if "auto_map" in settings else ""
        raise TraceError(f"transformers {__version__} has no model of the type {str(model_type)[:60]!r}{own}")
    try:
        hf = AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # a value that its checks refuse
        reason = " ".join(str(error).split())[:200]
        raise TraceError(
            f"transformers can't read the configuration of this {model_type}: {reason}"
        ) from error
    maker = _maker(hf)
    if maker is None:
        raise TraceError(f"transformers has no causal language model of the type {model_type!r}")
    return hf, maker._model_mapping[type(hf)]


def _maker(hf: Any) -> Any:
    """The class of transformers that makes models of a configuration; None if none does."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    both = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((maker for maker in both if type(hf) in maker._model_mapping), None)


def _bounded(value: Any, key: str = "") -> Any:
    """A configuration, or a part of it, without what other heads need. Raises TraceError where it counts more
    of something than any model has: the libraries make one after the other, however many are asked for."""
    if isinstance(value, dict):
        return {name: _bounded(part, name) for name, part in value.items() if name not in _OF_OTHER_HEADS}
    if isinstance(value, list):
        return [_bounded(part) for part in value]
    if isinstance(value, int) and not isinstance(value, bool):
        most = MAX_POSITIONS
        if key.endswith(("layer", "layers")) and not key.startswith("max_"):  # max_window_layers makes none
            most = MAX_LAYERS
        elif key.startswith(("num_", "n_")):
            most = MAX_SIZE
        if value > most:
            raise TraceError(
                f"the configuration can't be traced: {key or 'an entry'} is {shown(value)}, but it must be "
                f"{most} at most"
            )
    return value


@contextmanager
def _few_modules() -> Iterator[None]:
    """Ends the making of a model that has no end. Raises TraceError."""
    made, init = 0, nn.Module.__init__

    def counted(self: nn.Module, *arguments: Any, **options: Any) -> None:
        nonlocal made
        made += 1
        if made > _MAX_MODULES:
            raise TraceError(
                f"the model has more than {_MAX_MODULES:,} modules, which none that is known has"
            )
        init(self, *arguments, **options)

    with mock.patch.object(nn.Module, "__init__", counted):
        yield


def as_built(config: dict[str, Any], recipe: Recipe) -> Recipe:
    """The recipe with the attention that the model has."""
    _, kind = configuration(config)
    return recipe.model_copy(update={"attn": attention(kind, recipe)})


def base_model(config: dict[str, Any], recipe: Recipe) -> nn.Module:
    from transformers import initialization

    hf, kind = configuration(config)
    hf.use_cache = recipe.use_cache  # as the Trainer does with what TrainingArguments say (trainer.py, 5.23)
    with initialization.no_init_weights(), _any_attention(), _few_modules():
        model: nn.Module = _maker(hf).from_config(
            hf, dtype=DTYPES[recipe.dtype], attn_implementation=attention(kind, recipe)
        )
    model.tie_weights()
    _keep_wide(model, DTYPES[recipe.dtype])
    return model


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """What ``from_pretrained`` keeps in fp32 whatever dtype it is asked for (``_get_dtype_plan``)."""
    for pattern, wide in model._get_dtype_plan(dtype).items():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if re.search(pattern.replace("*", ".*"), name) and tensor.dtype is not wide:
                tensor.data = tensor.data.to(wide)


def attention(kind: Any, recipe: Recipe) -> str:
    """transformers' name of the attention kernel; families without SDPA fall back to eager, as they do when
    none is asked for."""
    if recipe.attn == "sdpa" and not kind._supports_sdpa:
        return "eager"
    return recipe.attn or "sdpa"


def _any_attention() -> Any:
    """Lets a model ask for FlashAttention, whose package needs CUDA; :mod:`memplan.trace.attention` has a
    stand-in."""
    from transformers import PreTrainedModel

    def accept(self: Any, implementation: str | None, *_: Any, **__: Any) -> str:
        return implementation or "sdpa"

    return mock.patch.object(PreTrainedModel, "_check_and_adjust_attn_implementation", accept)


def count(model: nn.Module) -> tuple[int, int]:
    """Parameters, tied ones once and 4-bit ones as what they stand for, and the trainable ones."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        number = parameter.numel() if state is None else math.prod(state.shape)
        total += number
        trainable += number if parameter.requires_grad else 0
    return total, trainable


# -- quantised -----------------------------------------------------------------------------------------


def quantize(
    model: nn.Module,
    recipe: Recipe,
    form: Quantised,
    convert: Callable[[nn.Linear, Recipe], nn.Module],
) -> None:
    """Replace the layers that transformers' quantizers replace (transformers 5 integrations/bitsandbytes.py
    ``replace_with_bnb_linear``) by what ``convert`` makes of them."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import _assign_is_quantized, get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = get_keys_to_not_convert(model)
    for name, module in list(model.named_modules()):
        if not should_convert_module(name, skipped):
            continue
        if type(module) is nn.Linear:
            model.set_submodule(name, convert(module, recipe))
        elif isinstance(module, Conv1D):  # GPT-2's linear layer, whose weight is (inputs, outputs)
            linear = nn.Linear(*module.weight.shape, bias=False, dtype=module.weight.dtype)
            linear.bias = module.bias
            model.set_submodule(name, convert(linear, recipe))
    setattr(model, form.mark, True)
    model.is_quantized = True
    _assign_is_quantized(model)


# -- adapters and checkpointing ------------------------------------------------------------------------


def prepare(model: nn.Module, recipe: Recipe, *, data: bool = False) -> nn.Module:
    """Freezing, upcasts, checkpointing and adapters, in the order of a training script. With ``data`` the
    adapters are initialised, and what a first step does is left to it."""
    checkpointing = {"use_reentrant": bool(recipe.use_reentrant)}
    _in_order(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing_enable, which PEFT calls
        if recipe.kbit_prep:
            from peft import prepare_model_for_kbit_training

            model = prepare_model_for_kbit_training(
                model,
                use_gradient_checkpointing=bool(recipe.gradient_checkpointing),
                gradient_checkpointing_kwargs=checkpointing,
            )
        else:
            if recipe.mode is not Mode.FULL:
                model.requires_grad_(False)
            if recipe.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
                if recipe.mode is not Mode.FULL:
                    model.enable_input_require_grads()
        if recipe.mode is not Mode.FULL:
            model = with_adapters(model, recipe, initialised=data)
    if not data:
        after_first_step(model, weights.of(recipe))
    return model


def _in_order(model: nn.Module) -> None:
    """Kinds of layers that a model walks over as a set have another order in each process: that of their
    names is one of them (transformers 5.23, models/gemma4, ``Gemma4TextModel.forward``)."""
    for module in model.modules():
        kinds = getattr(module, "unique_layer_types", None)
        if isinstance(kinds, set):
            vars(module)["unique_layer_types"] = sorted(kinds)


def after_first_step(model: nn.Module, form: Quantised | None) -> None:
    """longrope makes its table for long sequences once (transformers 5 modeling_rope_utils.py), and quantised
    layers may settle."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module(torch.empty(1, 1, 1), torch.zeros((1, 1), dtype=torch.int64))
        if form is not None:
            form.settle(module)


def with_adapters(model: nn.Module, recipe: Recipe, *, initialised: bool = False) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=target_modules(model, recipe),
        modules_to_save=list(recipe.modules_to_save) or None,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        task_type="CAUSAL_LM",
        init_lora_weights=initialised,
    )
    back = recipe.casts_adapters_back
    widened = recipe.adapter_dtype is DTypeName.FLOAT32 or back
    adapted = get_peft_model(model, config, autocast_adapter_dtype=widened)
    if back:  # trl/trainer/sft_trainer.py, 1.16
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return adapted


def target_modules(model: nn.Module, recipe: Recipe) -> str | list[str]:
    names = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    if recipe.target_modules == "all-linear":
        return "all-linear"
    if recipe.target_modules == "attention":
        return sorted(names & set(ATTENTION))
    if recipe.target_modules == "q,v":
        return sorted(names & {"q_proj", "v_proj"}) or sorted(names & {"qkv_proj"})
    if isinstance(recipe.target_modules, str):
        return recipe.target_modules
    return list(recipe.target_modules)


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` for fake tensors, which the real one insists on swapping and which can't be:
    a tensor that ``fn`` converts is put in the old one's place, any other stays."""
    if recurse:
        for module in self.children():
            _apply(module, fn)
    for key, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                converted = fn(parameter)
            if converted is not parameter:
                self._parameters[key] = nn.Parameter(converted, parameter.requires_grad)
    for key, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[key] = fn(buffer)
    return self


def _deepcopy(self: FakeTensor, memo: dict[int, Any]) -> Any:
    """PEFT copies modules to save, and for DoRA 4-bit layers; ``torch.Tensor.__deepcopy__`` of a fake tensor
    gives one whose ``data`` has another storage than itself."""
    copy = torch.empty_like(self)
    if isinstance(self, nn.Parameter):
        copy = nn.Parameter(copy, self.requires_grad)
        copy.__class__ = type(self)
        for name, value in self.__dict__.items():
            copy.__dict__.setdefault(name, value)
    memo[id(self)] = copy
    return copy


@contextmanager
def fake_modules() -> Iterator[None]:
    """Lets modules of fake tensors be converted and copied while the context lasts."""
    with (
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(FakeTensor, "__deepcopy__", _deepcopy, create=True),
    ):
        yield
