"""Runs a script as on several machines of so many cards each, which HYBRID_SHARD asks PyTorch for.

python benchmarks/ranks/machines.py CARDS SCRIPT ...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

cards = int(sys.argv[1])
torch.cuda.device_count = lambda: cards
sys.argv = sys.argv[2:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does
runpy.run_path(sys.argv[0], run_name="__main__")
