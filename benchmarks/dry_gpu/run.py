"""Run a program on a card that is not there: PyTorch's CUDA build, its real caching allocator, no GPU.

    python benchmarks/dry_gpu/run.py --gpu h200 -- python -m memplan verify llama-3.2-1b --out emulated

What comes out is *emulated*: no measurement, and memplan does not call it one. README.md says what it
needs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from build import build

from memplan.card import Card
from memplan.gpu import find_gpu
from memplan.verify.measurement import DRY

ROOT = Path(__file__).resolve().parents[2]
# what has the headers; any release of CUDA 13 does
HEADERS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88")


def headers(folder: Path) -> Path:
    """The folder with NVIDIA's headers, fetched into ``folder`` if they are not there."""
    found = folder / "nvidia" / "cu13" / "include"
    if not (found / "crt").is_dir():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *HEADERS]
        subprocess.run(command, check=True)
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
    return found


def description(name: str) -> str:
    """DRY_GPU of a card by its name in ``data/gpus.json``, as card.c reads it. Raises UnknownName."""
    gpu = find_gpu(name)
    card = Card(gpu.capability)
    facts = (gpu.visible_bytes, *gpu.capability, card.multiprocessors, card.shared_memory)
    return ":".join(map(str, facts)) + f":{DRY}{gpu.name}"


def main() -> int:
    """The program's exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpu", default="h100", help="which card it is to seem (default: h100)")
    parser.add_argument(
        "--libraries", type=Path, default=ROOT / ".dry_gpu", help="where they are made (default: .dry_gpu)"
    )
    parser.add_argument("program", nargs="+", help="after --: what to run, with its arguments")
    arguments = parser.parse_args()
    libraries = arguments.libraries.resolve() / f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (libraries / "libcudart.so.13").exists():
        libraries.mkdir(parents=True, exist_ok=True)
        build(libraries, headers(arguments.libraries.resolve()))
    environment = {
        **os.environ,
        "DRY_GPU": description(arguments.gpu),
        "LD_LIBRARY_PATH": str(libraries),
        "TRITON_LIBCUDA_PATH": str(libraries),
    }
    return subprocess.run(arguments.program, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
