"""DeepSpeed's JSON: recognised, so that the answer says what it is. It is of several cards, and holds no
model."""

from __future__ import annotations

from memplan.runfiles import RunFile
from memplan.runfiles._keys import Keys, words


def _read(keys: Keys) -> None:
    zero = keys.mapping("zero_optimization")
    stage = zero.get("stage", 0)
    auto = next((key for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
                 if keys.value(key) == "auto"), None)  # fmt: skip
    unresolved = f", and its {auto} is auto, which nothing here resolves" if auto else ""
    told = f"ZeRO stage {stage}" if type(stage) is int else "of a stage that is no number"
    key = "zero_optimization" if zero else next(iter(RUNFILE.own & keys.keys), "zero_optimization")
    keys.refuse(
        key,
        f"is DeepSpeed's ({told}): the file holds no model{unresolved}, and memplan does not plan DeepSpeed "
        "yet",
    )


RUNFILE = RunFile(
    title="DeepSpeed",
    own=words(
        """
        zero_optimization train_micro_batch_size_per_gpu zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer wall_clock_breakdown
    """
    ),
    read=_read,
    launch="deepspeed YOUR_SCRIPT.py --deepspeed FILE",
)
