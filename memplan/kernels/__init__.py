"""NF4 training kernels: ``apply(model)`` puts them into a PEFT + bitsandbytes model, ``remove(model)`` takes
them out again.

The code lies in the folder ``kernels/`` of the repository, which the wheel has here. It can't be imported as
``kernels``, a name that belongs to a Hugging Face library: without an ``__init__.py`` the folder is no
package that transformers or bitsandbytes would take for it, and an installed one goes before it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from memplan.errors import KernelError

__all__ = ["KernelError", "apply", "remove"]

_CHECKOUT = Path(__file__).resolve().parents[2] / "kernels"
if (_CHECKOUT / "strips.py").is_file():
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> Any:
    """What needs torch is imported when first used."""
    if name not in ("apply", "remove"):
        raise AttributeError(f"module 'memplan.kernels' has no attribute {name!r}")
    return getattr(import_module("memplan.kernels.patch"), name)
