"""Rooms: folders in which every file is one thing of a kind, found by the file's name.

Nothing is listed anywhere: a new file is a new thing, and is imported when it is chosen. The rooms are
``families``, ``attention``, ``weights``, ``adapters``, ``optimizers`` and ``losses``; CONTRIBUTING.md says
what a file of each has to define.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from sys import modules
from typing import Any

from memplan.errors import UnknownName

_folders = [Path(__file__).parent]


def extend(folder: Path) -> None:
    """Find things in this folder too: ``folder/optimizers/mine.py`` is the optimizer ``mine``. Its code runs
    when it is chosen."""
    _folders.append(folder)
    _look_again()


def forget(folder: Path) -> None:
    """Undo :func:`extend`."""
    _folders.remove(folder)
    for name, module in list(modules.items()):
        file = getattr(module, "__file__", None)
        if name.startswith("memplan.") and file is not None and Path(file).is_relative_to(folder):
            del modules[name]
    _look_again()


def _look_again() -> None:
    names.cache_clear()
    thing.cache_clear()


@cache
def names(room: str) -> tuple[str, ...]:
    """What there is in a room, in the alphabet's order. Imports nothing. Names that begin with ``_`` are
    files that the others share."""
    found = iter_modules([str(folder / room) for folder in _folders])
    return tuple(sorted({module.name for module in found if not module.name.startswith("_")}))


@cache
def thing(room: str, name: str, attribute: str, kind: str) -> Any:
    """What the file of that name defines as ``attribute``. Raises UnknownName, which calls it a ``kind``."""
    if name not in names(room):
        raise UnknownName(kind, name, names(room))
    package = f"memplan.{room}"
    import_module(package)
    modules[package].__path__ = [str(folder / room) for folder in _folders]
    return getattr(import_module(f"{package}.{name}"), attribute)
