"""A checkpoint that takes no disk: a real model's ``config.json``, safetensors made of holes, a tokenizer.

python benchmarks/plain/checkpoint.py llama-3.1-8b FOLDER    # an alias of data/model_specs.json

The scripts beside this one load it with ``from_pretrained``, like any other.
"""

from __future__ import annotations

import json
import struct
import sys
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORDS = 256  # of the tokenizer, whose texts nobody reads
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4}
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def published(alias: str) -> dict[str, object]:
    """The fields of the model's published ``config.json``. Raises KeyError for a name that is not listed."""
    listed = json.loads((ROOT / "data" / "model_specs.json").read_text(encoding="utf-8"))["models"]
    return next(entry["config"] for entry in listed if entry["alias"] == alias)


def make(alias: str, folder: Path, layers: int | None = None) -> None:
    """Write the files into ``folder``, which is made; with only so many ``layers``, if given."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = published(alias)
    if layers is not None:
        config = {**config, "num_hidden_layers": layers}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tied = model.all_tied_weights_keys  # of which a checkpoint has one
    shapes = {name: list(p.shape) for name, p in model.state_dict().items() if name not in tied}
    _holes(folder / "model.safetensors", shapes, STORED[str(config.get("torch_dtype", "bfloat16"))])
    _tokenizer(folder)


def _holes(path: Path, shapes: dict[str, list[int]], dtype: str) -> None:
    """A safetensors file whose data nobody wrote: zeros that the file system does not store."""
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
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(WORDS)} | {"<eos>": WORDS}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder
    )


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
