"""A checkpoint of the Hub without its weights: python from_hub.py ID FOLDER, in an environment with
huggingface_hub. The headers of its safetensors are read, by range, and their data are holes; what else it has
is fetched as it is. Exit status 1, and nothing is there, if the Hub can't be asked or has no such checkpoint.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import memplan_holes

# what is not fetched: weights, in whatever format
WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.onnx_data", "*.msgpack",
    "*.h5", "*.ot", "*.tflite",
)  # fmt: skip

_SECONDS = 5.0  # for the Hub to answer


def fetch(repo_id: str, folder: Path) -> bool:
    """Make it in ``folder``; False if it can't be."""
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi()
    try:
        info = api.model_info(repo_id, timeout=_SECONDS)  # asked once; other questions are repeated
        files = [sibling.rfilename for sibling in info.siblings or ()]
        shards = [file for file in files if file.endswith(".safetensors")]
        headers = {file: api.parse_safetensors_file_metadata(repo_id, file) for file in shards}
        if not headers:
            return False
        rest = snapshot_download(repo_id, ignore_patterns=list(WEIGHTS))
    except Exception:  # no network, no such model, none without a licence: there are other ways
        return False
    shutil.copytree(rest, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*WEIGHTS))
    for file, header in headers.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: _as_told(tensor) for name, tensor in header.tensors.items()}
        memplan_holes.write(folder / file, tensors, header.metadata or {"format": "pt"})
    return True


def _as_told(tensor: Any) -> dict[str, Any]:
    return {
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "data_offsets": list(tensor.data_offsets),
    }


if __name__ == "__main__":
    raise SystemExit(not fetch(sys.argv[1], Path(sys.argv[2])))
