"""Makes a checkpoint that takes no disk: python make_checkpoint.py CONFIG FOLDER [merged], in an environment
with transformers. Safetensors are made of holes, in shards and under the names that a published model's have,
or with experts merged as transformers holds them; a tokenizer, and a processor where the model sees.
It stands alone, for that environment need not have memplan. What can't be made beside the weights is said on
standard output.
"""

from __future__ import annotations

import json
import sys
from math import prod
from pathlib import Path
from typing import Any

import memplan_holes

STORED = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8", "int64": "I64", "int32": "I32",
    "bool": "BOOL",
}  # fmt: skip
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I64": 8, "I32": 4, "BOOL": 1}
SHARD = 5 * 10**9  # bytes, as transformers' save_pretrained cuts them (max_shard_size)
WORDS = 256  # of the tokenizer
PROCESSING = ("preprocessor_config.json", "video_preprocessor_config.json")
# one message after the other; pictures and films, which stand among the parts of a message, as their tokens
CHAT = (
    "{%% for message in messages %%}{{ message['role'] + ': ' }}"
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}"
    "{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'text' %%}{{ part['text'] }}"
    "{%% elif part['type'] == 'image' %%}%(image)s{%% elif part['type'] == 'video' %%}%(video)s{%% endif %%}"
    "{%% endfor %%}{%% endif %%}{{ ' ' }}{%% endfor %%}{{ eos_token }}"
)
Tensors = dict[str, tuple[str, list[int]]]  # safetensors' name of the type, and the shape


def make(config: dict[str, Any], folder: Path, merged: bool) -> None:
    """Write config.json, model-*.safetensors and their index, a tokenizer and a processor."""
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    holes(folder, "model", *tensors(config, folder, merged))
    tokenizer(folder, {})
    try:
        _processor(folder)
    except Exception as error:  # whatever a model's own processor raises: weights are there all the same
        for name in PROCESSING:
            (folder / name).unlink(missing_ok=True)
        said = " ".join(str(error).split())
        sys.stdout.write(f"made without a processor, which transformers can't make: {said}\n")


def tensors(config: dict[str, Any], folder: Path, merged: bool) -> tuple[Tensors, dict[str, bytes]]:
    """What the checkpoint holds, and of what is read as text the content."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    told = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    dtype = getattr(torch, str(told or "bfloat16"))
    read = AutoConfig.from_pretrained(folder)
    named = getattr(transformers, (config.get("architectures") or [""])[0], None)
    with torch.device("meta"):
        if named is None:
            model = AutoModelForCausalLM.from_config(read, dtype=dtype)
        else:
            model = named._from_config(read, dtype=dtype)
    state = model.state_dict()
    for name in model.all_tied_weights_keys:  # of which a checkpoint has one
        state.pop(name, None)
    found = {
        name: (STORED[str(tensor.dtype).removeprefix("torch.")], list(tensor.shape))
        for name, tensor in (state if merged else _as_published(model, state)).items()
    }
    how = config.get("quantization_config")
    if how is None:
        return found, {}
    if "load_in_4bit" in how:
        return _in_4_bits(found, _linear(model, how), how)
    return _in_mxfp4(found), {}


def _as_published(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Transformers loads experts, for one, into tensors other than those that are published."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before 5.0 it did not
        return state
    return dict(revert_weight_conversion(model, state))


def _linear(model: Any, how: dict[str, Any]) -> set[str]:
    """The weights that bitsandbytes has in 4 bits: of linear layers, but for the output layer and what the
    checkpoint keeps."""
    from torch import nn

    head, kept = model.get_output_embeddings(), set(how.get("llm_int8_skip_modules") or ())
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and name not in kept
        and kept.isdisjoint(name.split("."))
    }


def _in_4_bits(tensors: Tensors, linear: set[str], how: dict[str, Any]) -> tuple[Tensors, dict[str, bytes]]:
    """The same as bitsandbytes saves them (0.50 functional.py, ``QuantState.as_dict(packed=True)``)."""
    found: Tensors = {}
    contents = {}
    words = {short: word for word, short in STORED.items()}
    for name, (dtype, shape) in tensors.items():
        if name not in linear:
            found[name] = dtype, shape
            continue
        count = prod(shape)
        scales = -(-count // 64)
        code, nested = how.get("bnb_4bit_quant_type") or "fp4", bool(how.get("bnb_4bit_use_double_quant"))
        told = {"quant_type": code, "blocksize": 64, "dtype": words[dtype], "shape": shape}
        if nested:
            told |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0}
            found[f"{name}.nested_absmax"] = "F32", [-(-scales // 256)]
            found[f"{name}.nested_quant_map"] = "F32", [256]
        state = f"{name}.quant_state.bitsandbytes__{code}"
        contents[state] = json.dumps(told).encode()
        found[name] = "U8", [(count + 1) // 2, 1]
        found[f"{name}.absmax"] = "U8" if nested else "F32", [scales]
        found[f"{name}.quant_map"] = "F32", [16]
        found[state] = "U8", [len(contents[state])]
    return found, contents


def _in_mxfp4(tensors: Tensors) -> Tensors:
    """The same as its file has them if it is published in MXFP4."""
    found: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        if len(shape) == 3:  # experts alone: 32 numbers in 16 bytes and one scale, along what goes in
            expert, inward, outward = shape
            found[f"{name}_blocks"] = ("U8", [expert, outward, inward // 32, 16])
            found[f"{name}_scales"] = ("U8", [expert, outward, inward // 32])
        else:
            found[name] = (dtype, shape)
    return found


def holes(folder: Path, called: str, tensors: Tensors, contents: dict[str, bytes]) -> None:
    """The tensors in one file, or in several and their index."""
    shards: list[Tensors] = [{}]
    size = total = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * ITEMSIZE[dtype]
        if size + nbytes > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = dtype, shape
        size, total = size + nbytes, total + nbytes
    if len(shards) == 1:
        _shard(folder / f"{called}.safetensors", shards[0], contents)
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{called}-{number:05}-of-{len(shards):05}.safetensors"
        _shard(folder / file, shard, contents)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    text = json.dumps(index, indent=1) + "\n"
    (folder / f"{called}.safetensors.index.json").write_text(text, encoding="utf-8")


def _shard(path: Path, tensors: Tensors, contents: dict[str, bytes]) -> None:
    told = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * ITEMSIZE[dtype]
        told[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    here = {name: content for name, content in contents.items() if name in tensors}
    memplan_holes.write(path, told, {"format": "pt"}, here)


def tokenizer(folder: Path, marks: dict[str, int], image: str = "", video: str = "") -> None:
    """One that takes each word for a token, and knows few; or each byte, where transformers makes its
    tokenizer by a class of its own, whatever its files say (Qwen2's), and that class sees no words. It has as
    many tokens as the model, for a program may cut the embeddings to its length.
    ``marks``: tokens of a model's own, with their numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [f"w{number}" for number in range(WORDS)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256
    for listed in (names, letters):
        words = {word: number for number, word in enumerate(listed)} | {"<eos>": WORDS} | marks
        free = set(range(WORDS, _vocabulary(folder))) - set(words.values())
        words |= {f"w{number}": number for number in sorted(free)}
        by_words = listed is names
        plain = Tokenizer(models.WordLevel(words, unk_token="w0") if by_words else models.BPE(words, []))
        plain.pre_tokenizer = (
            pre_tokenizers.Whitespace() if by_words else pre_tokenizers.ByteLevel(add_prefix_space=False)
        )
        plain.add_special_tokens(list(marks))
        made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>")
        made.chat_template = CHAT % {"image": image, "video": video}
        made.save_pretrained(folder)
        if _takes_words(folder):
            return


def _vocabulary(folder: Path) -> int:
    """How many tokens the model in the folder has; 0 where none says."""
    if not (file := folder / "config.json").exists():
        return 0
    config = json.loads(file.read_text(encoding="utf-8"))
    told = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return told if isinstance(told, int) else 0


def _takes_words(folder: Path) -> bool:
    from transformers import AutoTokenizer

    try:
        return len(AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"]) >= 2
    except Exception:  # of classes that need what is not installed: whoever loads it will be told
        return True


def _processor(folder: Path) -> None:
    """That of a model which takes pictures, as transformers finds it by config.json: with the patches that
    the model has; what is not told there is as its class has it."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = AutoConfig.from_pretrained(folder)
    if type(config) not in PROCESSOR_MAPPING:
        return
    sees = getattr(config, "vision_config", None)
    told = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size",
            "spatial_merge_size": "merge_size"}  # fmt: skip
    facts = {there: getattr(sees, here) for here, there in told.items() if hasattr(sees, here)}
    if isinstance(size := getattr(sees, "image_size", None), int):
        facts["size"] = facts["crop_size"] = {"height": size, "width": size}
    for name in PROCESSING:
        (folder / name).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    blank = AutoProcessor.from_pretrained(folder)
    marks: dict[str, int] = {}
    for name in ("image", "video", "vision_start", "vision_end", "boi", "eoi"):
        token, number = getattr(blank, f"{name}_token", None), getattr(config, f"{name}_token_id", None)
        number = getattr(config, f"{name}_token_index", None) if number is None else number
        if isinstance(token, str):
            marks[token] = number if number is not None else WORDS + 1 + len(marks)
    start, end = (getattr(blank, f"vision_{name}_token", "") for name in ("start", "end"))
    image, video = (start + getattr(blank, f"{name}_token", "") + end for name in ("image", "video"))
    tokenizer(folder, marks, image, video)
    AutoProcessor.from_pretrained(folder).save_pretrained(folder)


if __name__ == "__main__":
    make(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]), "merged" in sys.argv)
