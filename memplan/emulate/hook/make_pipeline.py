"""Makes a pipeline of diffusers that takes no disk, like one whose weights are left out: python
make_pipeline.py GIVEN FOLDER, in an environment with diffusers. Each component that model_index.json lists is
made as make_checkpoint.py, beside which it stands, makes a checkpoint; what has no weights is copied.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import make_checkpoint


def make(given: Path, folder: Path) -> None:
    """Write a folder for each component."""
    shutil.copy(given / "model_index.json", folder)
    for name, told in json.loads((given / "model_index.json").read_text(encoding="utf-8")).items():
        if isinstance(told, list) and isinstance(
            told[-1], str
        ):  # [library, class]; [null, null] if it has none
            (folder / name).mkdir(exist_ok=True)
            _component(given / name, folder / name, *told)


def _component(given: Path, folder: Path, library: str, kind: str) -> None:
    for file in given.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    if "Tokenizer" in kind:
        if not (folder / "tokenizer.json").exists():
            _tokenizer(folder)
    elif (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if library == "transformers":
            tensors, contents = make_checkpoint.tensors({"dtype": "float32", **config}, folder, False)
            make_checkpoint.holes(folder, "model", tensors, contents)
        else:
            make_checkpoint.holes(folder, "diffusion_pytorch_model", _of_diffusers(config, kind), {})


def _of_diffusers(config: dict[str, Any], kind: str) -> make_checkpoint.Tensors:
    """In 32 bits, as it publishes them where a file's name tells no variant."""
    import diffusers  # type: ignore[import-not-found]  # the program's environment has it
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, kind).from_config(config)
    return {name: ("F32", list(tensor.shape)) for name, tensor in model.state_dict().items()}


def _tokenizer(folder: Path) -> None:
    """A tokenizer of a few words, of the length that the pipeline's own is told to have."""
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    make_checkpoint.tokenizer(folder, {})
    length = {name: told[name] for name in ("model_max_length",) if name in told}
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **length}), encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
