"""The table of operator stand-ins: what replaces an operator while the recorder is on.

A stand-in is called as ``f(recorder, *args, **kwargs)`` with the recorder active, so that what it
allocates with ``torch.empty`` is on the tape for as long as its local variables hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

OPERATORS: dict[Any, Callable[..., Any]] = {}


def operator(*overloads: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a stand-in for operators."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for overload in overloads:
            OPERATORS[overload] = function
        return function

    return register


def workspace(nbytes: int) -> torch.Tensor:
    """Scratch memory, alive while the result is."""
    return torch.empty(nbytes, dtype=torch.uint8)
