"""The files of TRL's other trainers (DPO, GRPO and more): recognised, for their other keys are SFT's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.runfiles import RunFile
from memplan.runfiles._keys import Keys

_REFUSED = dict.fromkeys(
    (
        "beta",
        "num_generations",
        "max_completion_length",
        "reward_model_path",
        "reward_funcs",
        "reward_model_name_or_path",
        "teacher_model_name_or_path",
        "total_episodes",
        "missing_eos_penalty",
        "max_prompt_length",
    ),
    "is of another trainer than SFTTrainer, which is all that memplan plans",
)


_OFF = (None, False, 0, "", "no", "none", "None", "false", "False")  # as refuse_any has them


def _holds(found: Mapping[str, Any]) -> bool:
    return any(found.get(key) not in _OFF for key in _REFUSED)


def _read(keys: Keys) -> None:
    keys.refuse_any(_REFUSED)


RUNFILE = RunFile(
    title="TRL's other trainers",
    holds=_holds,
    read=_read,
    refuses=_REFUSED,
    launch="trl TRAINER --config FILE",
)
