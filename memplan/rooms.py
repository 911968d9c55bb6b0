"""Rooms: folders in which every file is one thing of a kind, found by the file's name.

Nothing is listed anywhere: a new file is a new thing, and is imported when it is chosen. The rooms are
``families``, ``attention``, ``towers``, ``weights``, ``adapters``, ``optimizers``, ``losses``, ``stacks`` and
``runfiles``; the ``__init__.py`` of each says what its files define.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from sys import modules
from typing import Any

from memplan.errors import MemplanError, UnknownName, reason, shown

_folders = [Path(__file__).parent]


def extend(folder: str | Path) -> None:
    """Find things in this folder too: ``folder/optimizers/mine.py`` is the optimizer ``mine``. Its code runs
    when it is chosen. memplan's own thing of a name comes first. Raises MemplanError if there is no such
    folder."""
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise MemplanError(f"there is no folder {shown(str(folder))} with rooms in it")
    if folder not in _folders:
        _folders.append(folder)
        _look_again()


def forget(folder: str | Path) -> None:
    """Undo :func:`extend`."""
    folder = Path(folder).resolve()
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
    """What the file of that name defines as ``attribute``. Raises UnknownName, which calls it a ``kind``, or
    MemplanError if somebody's file defines none."""
    if name not in names(room):
        raise UnknownName(kind, name, names(room))
    package = f"memplan.{room}"
    import_module(package)
    modules[package].__path__ = [str(folder / room) for folder in _folders]
    try:
        module = import_module(f"{package}.{name}")
    except Exception as error:
        if (Path(__file__).parent / room / f"{name}.py").is_file():
            raise
        raise MemplanError(
            f"the {kind} {shown(name)} can't be imported from its file: {reason(error)}"
        ) from error
    if not hasattr(module, attribute):
        raise MemplanError(f"the file of the {kind} {shown(name)} defines no {attribute}, so it is none")
    return getattr(module, attribute)
