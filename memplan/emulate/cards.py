"""What a card that is not there says of itself."""

from __future__ import annotations

from memplan.asked.gpus import Gpu
from memplan.errors import MemplanError

DRY = "dry "  # begins its name, so that nobody takes what it shows for a measurement

# The card's own facts, not taken from memplan.cuda, whose plans it is to check. Streaming multiprocessors:
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


MOST = 64  # cards that one program sees


def description(gpu: Gpu, taken: int = 0, count: int = 1) -> str:
    """The card as card/card.c reads it from MEMPLAN_CARD, of which there are ``count``; ``taken``: bytes that
    are in use on each before the program allocates any, as a process's context is. Raises MemplanError for a
    card whose facts are not listed here.
    """
    if gpu.name not in MULTIPROCESSORS or gpu.capability is None:
        raise MemplanError(
            f"the {gpu.name} can't be emulated yet; one of these can: {', '.join(MULTIPROCESSORS)}"
        )
    shared = SHARED_KIB[gpu.capability] << 10
    facts = (count, gpu.visible_bytes, taken, *gpu.capability, MULTIPROCESSORS[gpu.name], shared)
    return ":".join(map(str, facts)) + f":{DRY}{gpu.name}"
