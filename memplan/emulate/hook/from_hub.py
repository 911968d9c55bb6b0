"""A checkpoint of the Hub without its weights: python from_hub.py ID FOLDER, in an environment with
huggingface_hub. The headers of its safetensors are read, by range, and their data are holes; what else it has
is fetched as it is. Exit status 1, and nothing is there, if the Hub can't be asked or has no such checkpoint.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

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
        _write(folder / file, header)
    return True


def _write(path: Path, header: Any) -> None:
    told: dict[str, Any] = {
        name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": list(tensor.data_offsets),
        }
        for name, tensor in header.tensors.items()
    }
    end = max((tensor["data_offsets"][1] for tensor in told.values()), default=0)
    text = json.dumps({"__metadata__": header.metadata or {"format": "pt"}, **told}).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


if __name__ == "__main__":
    raise SystemExit(not fetch(sys.argv[1], Path(sys.argv[2])))
