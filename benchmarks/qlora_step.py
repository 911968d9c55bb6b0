"""Models for whole QLoRA steps: a config's true sizes, NF4 weights of random codes, PEFT's adapters, one
batch.

No weights are downloaded: time and memory do not depend on their values. Used by benchmarks/kernels.py.
"""

from __future__ import annotations

import gc
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import quantize_4bit
from torch import nn

from memplan.asked.recipe import Recipe
from memplan.trace.modules import prepare

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "model_type": "llama", "vocab_size": 99, "hidden_size": 64, "intermediate_size": 192,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip

# as PEFT prepares a model, with the residual stream in bf16, and then with dropout
CHECKPOINTED: tuple[dict[str, Any], ...] = (
    {"r": 16, "seq_len": 2048, "use_reentrant": False},
    {"r": 16, "seq_len": 2048, "use_reentrant": False, "kbit_prep": False},
    {"r": 16, "seq_len": 2048, "use_reentrant": False, "kbit_prep": False, "lora_dropout": 0.05},
)
# The peaks of all these are attention's or the logits', with the kernels or without. What the kernels save of
# a peak shows where activations are kept; those of a 70B would need 132 GiB, so it is left out.
RECIPES: dict[str, tuple[dict[str, Any], ...]] = {
    "llama-3.1-8b": (
        *CHECKPOINTED,
        {"r": 16, "seq_len": 2048, "kbit_prep": False, "gradient_checkpointing": False},
    ),
    "llama-3.3-70b": CHECKPOINTED,
}


def case(
    name: str, options: dict[str, Any], device: str
) -> tuple[dict[str, Any], nn.Module, Callable[[], None]]:
    """What it is, the model, and a step of it. Whoever is done with a model lets go of it and calls
    :func:`forget` before the next. On a CPU, for a rehearsal, the model is tiny whatever its name.
    """
    if device == "cpu":
        name, options = "rehearsal", {**options, "seq_len": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries deprecate
        model = build(config_of(name), Recipe(trainer="peft", **options).resolved(), device)
    return {"model": name, **options, **_predicted(name, options)}, model, stepper(model, options, device)


def forget() -> None:
    """Free what is no longer used, models in reference cycles too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _predicted(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The plan's peaks, stock and with the kernels, to hold what is measured against."""
    if name == "rehearsal":
        return {}
    from memplan.planning.plan import plan

    return {
        f"predicted_{kernels}_bytes": plan(
            name, Recipe(trainer="peft", kernels=kernels, **options), gpus=[]
        ).peak.tensor_bytes
        for kernels in ("stock", "memplan")
    }


def config_of(name: str) -> dict[str, Any]:
    if name == "rehearsal":
        return TINY
    models = json.loads((ROOT / "data" / "model_specs.json").read_text(encoding="utf-8"))["models"]
    return next(model["config"] for model in models if model["alias"] == name)


def build(config: dict[str, Any], recipe: Recipe, device: str) -> nn.Module:
    """The model on its device, never larger there than it is in the end."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    hf = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, random_linear(module, device))
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(0, 0.02)
                setattr(module, key, nn.Parameter(values + 1 if parameter.dim() == 1 else values))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(hf)
    model.tie_weights()
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.use_cache = False
    model = prepare(model, recipe)
    return model.to(device).train()


def random_linear(source: nn.Linear, device: str) -> nn.Module:
    """A 4-bit layer of random codes, with the scales of one small matrix over and over."""
    outputs, inputs = source.weight.shape
    small = torch.randn(256, 64, dtype=torch.bfloat16, device=device) / math.sqrt(inputs)
    _, state = quantize_4bit(small, compress_statistics=True, quant_type="nf4")
    blocks = outputs * inputs // 64
    state.absmax = state.absmax.repeat(-(-blocks // 256))[:blocks].clone()
    state.state2.absmax = state.state2.absmax.repeat(-(-blocks // 256)).clone()
    state.shape = source.weight.shape
    packed = torch.randint(0, 256, (outputs * inputs // 2, 1), dtype=torch.uint8, device=device)
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
    )
    layer.quant_state = state
    if source.bias is not None:
        layer.bias = nn.Parameter(
            torch.zeros(outputs, dtype=torch.bfloat16, device=device), requires_grad=False
        )
    return layer


def stepper(model: nn.Module, options: dict[str, Any], device: str) -> Callable[[], None]:
    """Forward, backward, clipping, AdamW."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (1, options["seq_len"]), device=device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
