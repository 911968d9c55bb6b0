"""torchtune's YAML: recognised, so that the answer says who can give one. Its models are its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.runfiles import RunFile
from memplan.runfiles._keys import Keys


def _holds(found: Mapping[str, Any]) -> bool:
    return any(
        isinstance(found.get(key), dict) and "_component_" in found[key]
        for key in ("model", "tokenizer", "optimizer", "checkpointer")
    )


def _read(keys: Keys) -> None:
    component = keys.mapping("model").get("_component_")
    named = f" ({component})" if isinstance(component, str) and len(component) < 80 else ""
    keys.refuse("model", f"is torchtune's own code{named}, and memplan plans transformers' models only")


RUNFILE = RunFile(
    title="torchtune",
    holds=_holds,
    read=_read,
    launch="tune run YOUR_RECIPE --config FILE",
)
