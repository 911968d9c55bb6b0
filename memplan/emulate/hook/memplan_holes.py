"""Safetensors whose data nobody wrote: zeros that the file system does not store. Stands alone beside
make_checkpoint.py and from_hub.py."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def write(
    path: Path,
    tensors: dict[str, dict[str, Any]],
    metadata: dict[str, str],
    contents: dict[str, bytes] | None = None,
) -> None:
    """Write a file of ``tensors``, each with the dtype, shape and data_offsets that its header tells;
    ``contents``: what those of them hold that are read as text."""
    end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    text = json.dumps({"__metadata__": metadata, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for name, content in (contents or {}).items():
            file.seek(8 + len(text) + tensors[name]["data_offsets"][0])
            file.write(content)
