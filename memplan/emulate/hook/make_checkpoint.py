"""Makes a checkpoint that takes no disk: python make_checkpoint.py CONFIG FOLDER, in an environment with
transformers. Safetensors are made of holes, in shards as a real model's; a tokenizer is made where the folder
has none. It stands alone, for that environment need not have memplan.
"""

from __future__ import annotations

import json
import struct
import sys
from math import prod
from pathlib import Path
from typing import Any

ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4}
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SHARD = 5 * 10**9  # bytes, as transformers' save_pretrained cuts them (max_shard_size)
WORDS = 256  # of the tokenizer
CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' ' }}{% endfor %}"
    "{{ eos_token }}"
)


def make(config: dict[str, Any], folder: Path) -> None:
    """Write config.json, model-*.safetensors and their index, and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tied = model.all_tied_weights_keys  # of which a checkpoint has one
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    dtype = config.get("dtype", config.get("torch_dtype", "bfloat16"))
    _holes(folder, shapes, STORED.get(str(dtype), "BF16"))
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        _tokenizer(folder)


def _holes(folder: Path, shapes: dict[str, list[int]], dtype: str) -> None:
    """Safetensors whose data nobody wrote: zeros that the file system does not store."""
    shards: list[dict[str, list[int]]] = [{}]
    size = total = 0
    for name, shape in shapes.items():
        nbytes = prod(shape) * ITEMSIZE[dtype]
        if size + nbytes > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, total = size + nbytes, total + nbytes
    if len(shards) == 1:
        _shard(folder / "model.safetensors", shards[0], dtype)
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _shard(folder / file, shard, dtype)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _shard(path: Path, shapes: dict[str, list[int]], dtype: str) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _tokenizer(folder: Path) -> None:
    """One that takes each word for a token, and knows few."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(WORDS)} | {"<eos>": WORDS}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = CHAT
    made.save_pretrained(folder)


if __name__ == "__main__":
    make(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
