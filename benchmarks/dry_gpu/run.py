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

from memplan.asked.gpus import find_gpu
from memplan.errors import MemplanError
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


# The card's own facts, not taken from memplan, whose plans it is to check. Streaming multiprocessors:
# NVIDIA's architecture white papers (V100, Turing, A100, GA102, Ada, H100, Blackwell) and data sheets.
MULTIPROCESSORS = {
    "Tesla V100-SXM2-32GB": 80,
    "Tesla V100-SXM2-16GB": 80,
    "Tesla T4": 40,
    "NVIDIA A100-SXM4-80GB": 108,
    "NVIDIA A100 80GB PCIe": 108,
    "NVIDIA A100-SXM4-40GB": 108,
    "NVIDIA A100-PCIE-40GB": 108,
    "NVIDIA A30": 56,
    "NVIDIA A40": 84,
    "NVIDIA A10": 72,
    "NVIDIA RTX A6000": 84,
    "NVIDIA GeForce RTX 3090": 82,
    "NVIDIA L40S": 142,
    "NVIDIA L4": 58,
    "NVIDIA RTX 6000 Ada Generation": 142,
    "NVIDIA GeForce RTX 4090": 128,
    "NVIDIA H100 PCIe": 114,
    "NVIDIA H100 80GB HBM3": 132,
    "NVIDIA H100 NVL": 132,
    "NVIDIA H200": 132,
    "NVIDIA H200 NVL": 132,
    "NVIDIA B200": 148,
    "NVIDIA RTX PRO 6000 Blackwell": 188,
    "NVIDIA GeForce RTX 5090": 170,
}
# KiB of shared memory that a block may opt in to: CUDA programming guide, table of compute capabilities.
SHARED_KIB = {
    (7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99,
}  # fmt: skip


def description(name: str) -> str:
    """DRY_GPU of a card by its name in ``data/gpus.json``, as card.c reads it. Raises UnknownName, and
    MemplanError for a card whose facts are not listed here."""
    gpu = find_gpu(name)
    if gpu.name not in MULTIPROCESSORS or gpu.capability is None:
        raise MemplanError(
            f"the {gpu.name} can't be emulated yet; one of these can: {', '.join(MULTIPROCESSORS)}"
        )
    shared = SHARED_KIB[gpu.capability] << 10
    facts = (gpu.visible_bytes, *gpu.capability, MULTIPROCESSORS[gpu.name], shared)
    return ":".join(map(str, facts)) + f":{DRY}{gpu.name}"


def main() -> int:
    """The program's exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpu", default="h100", help="which card it is to seem (default: h100)")
    parser.add_argument(
        "--libraries", type=Path, default=ROOT / ".dry_gpu", help="where they are made (default: .dry_gpu)"
    )
    parser.add_argument(
        "--addresses",
        choices=["up", "down"],
        default="up",
        help="whether the driver puts a segment above the last or below (default: up, as the plan has it)",
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
        "DRY_ADDRESSES": arguments.addresses,
        "LD_LIBRARY_PATH": str(libraries),
        "TRITON_LIBCUDA_PATH": str(libraries),
    }
    return subprocess.run(arguments.program, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
