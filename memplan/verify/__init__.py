"""The measured writer: real training, recorded, and held against the plan.

Modules that train import torch; those that only read results (:mod:`~memplan.verify.measurement`,
:mod:`~memplan.verify.compare`, :mod:`~memplan.verify.campaign`) do not. ``MemoryCallback`` is for the
Hugging Face Trainer: :mod:`memplan.verify.callback`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["MemoryCallback"]


def __getattr__(name: str) -> Any:
    if name == "MemoryCallback":  # imports transformers
        from memplan.verify.callback import MemoryCallback

        return MemoryCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
