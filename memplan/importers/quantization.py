"""What a ``config.json`` says of weights that are quantised already (``quantization_config``).

transformers loads such a checkpoint with its own settings, whatever BitsAndBytesConfig a script has
(5.23 quantizers/auto.py, ``merge_quantization_configs``). 4-bit bitsandbytes is what mode qlora plans;
MXFP4 is unpacked where a family is published in it (:mod:`memplan.predict.mxfp4`); everything else is
refused.
"""

from __future__ import annotations

import re
from typing import Any

from memplan.asked.spec import Quantization
from memplan.errors import SpecError, shown

MXFP4 = "MXFP4"
_WORDS = {
    "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8", "mxfp4": MXFP4, "nvfp4": "NVFP4",
    "modelopt": "ModelOpt's", "compressed-tensors": "compressed-tensors", "exl2": "EXL2", "mlx": "MLX",
    "torchao": "torchao's", "gguf": "GGUF", "aqlm": "AQLM", "hqq": "HQQ", "eetq": "EETQ",
}  # fmt: skip
# bitsandbytes.BitsAndBytesConfig (5.23 utils/quantization_config.py): what is not said
_DTYPES = ("bfloat16", "float16", "float32")
# A linear layer of a decoder, which mode qlora has in 4 bits; heads and vision towers stay in 16 bits anyway.
_IN_DECODER = re.compile(
    r"(^|\.)layers\.\d|(^|\.)(q|k|v|o|qkv|gate|up|down|gate_up)_proj$|self_attn|(^|\.)mlp"
)
_SEES = re.compile(r"vis(ion|ual)|image|tower")


def quantization_of(config: dict[str, Any], name: str) -> Quantization | None:
    """How the weights are quantised, None where they are not. Raises SpecError of what mode qlora doesn't
    plan and of what makes no sense."""
    given = config.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise SpecError(f"{shown(name)} has a quantization_config that is {shown(given)}, not an object")
    method = method_of(given)
    if method != "bitsandbytes":
        raise _not_planned(name, method)
    if given.get("load_in_8bit") or given.get("_load_in_8bit"):
        raise _not_planned(name, "8-bit bitsandbytes")
    if not (given.get("load_in_4bit") or given.get("_load_in_4bit")):
        raise SpecError(
            f"{shown(name)} has a quantization_config of bitsandbytes that is neither load_in_4bit nor "
            "load_in_8bit"
        )
    code, compute = given.get("bnb_4bit_quant_type") or "fp4", given.get("bnb_4bit_compute_dtype")
    compute = "float32" if compute is None else str(compute).removeprefix("torch.")
    if code not in ("nf4", "fp4"):
        raise SpecError(f"{shown(name)} has the bnb_4bit_quant_type {shown(code)}, but it must be nf4 or fp4")
    if compute not in _DTYPES:
        raise SpecError(
            f"{shown(name)} has the bnb_4bit_compute_dtype {shown(compute)}, but it must be one of "
            f"{', '.join(_DTYPES)}"
        )
    kept = _kept(given)
    if kept:
        raise SpecError(
            f"{shown(name)} is quantised to 4 bits but for {len(kept)} of its layers "
            "(llm_int8_skip_modules), which memplan doesn't plan: `memplan dry-run -- COMMAND` runs your own "
            "program with them"
        )
    return Quantization(
        quant_type=code, double_quant=bool(given.get("bnb_4bit_use_double_quant")), compute_dtype=compute
    )


def method_of(given: Any) -> str:
    """What a quantization_config is of, in words."""
    method = given.get("quant_method") if isinstance(given, dict) else None
    if isinstance(given, dict) and method is None and any("load_in_" in str(key) for key in given):
        return "bitsandbytes"  # written before there were other methods
    text = str(getattr(method, "value", method)).lower().replace("_", "-") if method is not None else ""
    if text == "bitsandbytes":
        return text
    return _WORDS.get(text, _WORDS.get(text.replace("-", "_"), "")) or (shown(text) if text else "quantised")


def _kept(given: dict[str, Any]) -> list[str]:
    """Layers of the decoder that are kept in 16 bits."""
    kept = given.get("llm_int8_skip_modules")
    names = [str(module) for module in kept] if isinstance(kept, list) else []
    return [module for module in names if _IN_DECODER.search(module) and not _SEES.search(module)]


def _not_planned(name: str, what: str) -> SpecError:
    if what == "GGUF":
        return SpecError(
            f"{shown(name)} holds GGUF files, for llama.cpp, which nothing trains: give the model that they "
            "were made of"
        )
    return SpecError(
        f"{shown(name)} holds {what} weights, which memplan doesn't plan: `memplan dry-run -- COMMAND` runs "
        "your own program with them, or give the model that they were made of, which --mode qlora has in "
        "4 bits"
    )
