"""memplan: will it fit on my GPU, and if not, what do I change?

from memplan import plan, Recipe
plan("llama-70b", Recipe(mode="qlora", r=8)).peak.allocated_bytes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memplan.asked.recipe import Recipe
    from memplan.asked.spec import ModelSpec
    from memplan.errors import MemplanError
    from memplan.planning.plan import Plan, plan

__all__ = ["MemplanError", "ModelSpec", "Plan", "Recipe", "__version__", "plan"]

_HOMES = {
    "MemplanError": "memplan.errors",
    "ModelSpec": "memplan.asked.spec",
    "Plan": "memplan.planning.plan",
    "Recipe": "memplan.asked.recipe",
    "plan": "memplan.planning.plan",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that ``import memplan`` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'memplan' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
