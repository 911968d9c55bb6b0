"""Says when a module has been imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def when_imported(name: str, then: Callable[[Any], None], before: Callable[[], None] | None = None) -> None:
    """Call ``then`` with the module once it is there, and ``before`` before its code runs."""
    sys.meta_path.insert(0, _Finder(name, then, before))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module as it would be found anyway."""

    asking = False

    def __init__(self, name: str, then: Callable[[Any], None], before: Callable[[], None] | None) -> None:
        self.name, self.then, self.before = name, then, before

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name or self.asking:
            return None
        self.asking = True  # who only asks where a module is has not imported it yet
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        sys.meta_path.remove(self)
        module.__spec__.loader = module.__loader__ = self.loader
        if self.before is not None:
            self.before()
        self.loader.exec_module(module)
        self.then(module)
