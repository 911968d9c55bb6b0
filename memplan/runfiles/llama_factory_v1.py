"""LLaMA-Factory's next generation (`llamafactory.v1`): recognised, for its keys are others' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.runfiles import RunFile
from memplan.runfiles._keys import Keys

_KEYS = {"train_dataset", "peft_config", "dist_config", "kernel_config", "init_config", "batching_strategy"}


def _holds(found: Mapping[str, Any]) -> bool:
    return isinstance(found.get("model"), str) and bool(_KEYS & found.keys())


def _read(keys: Keys) -> None:
    keys.refuse("model", "is trained by LLaMA-Factory's v1, whose step memplan does not plan")


RUNFILE = RunFile(title="LLaMA-Factory v1", holds=_holds, read=_read, launch="llamafactory-cli train FILE")
