"""Python imports this when a program that is dry-run starts: the card's libraries are loaded before anybody
asks for NVIDIA's, so that they are taken, and memplan_watch.py is told when PyTorch has been imported."""

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


def _before_torch() -> None:
    libraries = os.environ["MEMPLAN_CARD_LIBRARIES"]
    with open(os.path.join(libraries, "order"), encoding="utf-8") as file:
        for library in file.read().split():
            ctypes.CDLL(os.path.join(libraries, library), mode=ctypes.RTLD_GLOBAL)


def _after_torch(torch: Any) -> None:
    if "MEMPLAN_WATCH" in os.environ:
        import memplan_watch

        memplan_watch.start(torch)


def _next_one() -> None:
    """The environment's own sitecustomize, whose place this one took."""
    here = sys.modules["sitecustomize"]
    paths = [path for path in sys.path if os.path.abspath(path or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", paths)
    if spec is not None and spec.loader is not None:
        other = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = other
        try:
            spec.loader.exec_module(other)
        finally:
            sys.modules["sitecustomize"] = here


if "MEMPLAN_CARD_LIBRARIES" in os.environ:
    import memplan_ranks
    from memplan_imports import when_imported

    memplan_ranks.leave()
    when_imported("torch", _after_torch, before=_before_torch)
_next_one()
