"""Python imports this when a program starts under benchmarks/measure.py: of the ranks that a launcher
starts, the first runs, with nobody to wait for."""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


def _next_one() -> None:
    """The environment's own sitecustomize, whose place this one took."""
    paths = [path for path in sys.path if Path(path).resolve() != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", paths)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _after_torch(torch: Any) -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans have FlashAttention
    if memplan_ranks.alone():  # and not a launcher
        memplan_ranks.prepare(torch)


if "MEMPLAN_PLAYED" in os.environ:
    import json

    told = json.loads(os.environ["MEMPLAN_PLAYED"])
    sys.path.append(told["hook"])  # behind this folder, whose memplan_integers is taken
    import memplan_ranks
    from memplan_imports import when_imported

    memplan_ranks._told = lambda: told
    if memplan_ranks.alone() and os.environ["RANK"] != "0":
        os._exit(0)
    when_imported("torch", _after_torch)
_next_one()
