"""Python imports this when a program that is dry-run starts: the card's libraries are loaded before anybody
asks for NVIDIA's, so that they are taken, also where somebody asks by path, as PyTorch does; and
memplan_watch.py is told when PyTorch has been imported."""

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from functools import cache
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


def _before_torch() -> None:
    for library in _ours():
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def _after_torch(torch: Any) -> None:
    if "MEMPLAN_WATCH" in os.environ:
        import memplan_watch

        memplan_watch.start(torch)


@cache
def _ours() -> list[str]:
    """The card's libraries, as they have to be loaded, the card itself first."""
    folder = os.environ["MEMPLAN_CARD_LIBRARIES"]
    with open(os.path.join(folder, "order"), encoding="utf-8") as file:
        return [os.path.join(folder, library) for library in file.read().split()]


def _instead() -> None:
    """Whoever loads one of NVIDIA's libraries by its path gets the card's, or, of those that PyTorch does not
    link to, the card itself, which has none of their functions."""
    ours = _ours()
    load = ctypes.CDLL.__init__

    def loading(made: Any, name: Any, *args: Any, **kwargs: Any) -> None:
        asked = os.fsdecode(name) if name is not None else ""
        file = os.path.basename(asked)
        same = [one for one in ours if f"{file}.".startswith(f"{os.path.basename(one)}.")]
        if same:
            name = same[0]
        elif f"{os.sep}nvidia{os.sep}" in asked and ".so" in file:
            name = ours[0]
        load(made, name, *args, **kwargs)

    setattr(ctypes.CDLL, "__init__", loading)  # noqa: B010  # a method of somebody else's class


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
    _instead()
    when_imported("torch", _after_torch, before=_before_torch)
    if "MEMPLAN_WATCH" in os.environ:  # before a program imports huggingface_hub, which may be before PyTorch
        import json

        import memplan_serve

        told = json.loads(os.environ["MEMPLAN_WATCH"])
        memplan_serve.start(told["folder"], told["memplan"])
_next_one()
