"""The HF Trainer's arguments, as `TrainingArguments.to_json_string` writes them or a script reads them
(transformers 5.23)."""

from __future__ import annotations

from memplan.runfiles import RunFile, sizes
from memplan.runfiles._keys import Keys, words
from memplan.runfiles._trainer import IGNORED, REFUSED, SAYS, arguments, checkpointing


def _read(keys: Keys) -> None:
    keys.sizes = sizes("peft", ("batch_size",))
    keys.put("trainer", "peft")
    keys.base("model_name_or_path")  # scripts of transformers' examples have it beside
    arguments(keys)
    checkpointing(keys)
    keys.put("autocast", keys.flag("bf16") or keys.flag("fp16"))
    keys.launched_by("deepspeed")
    liger = keys.mapping("liger_kernel_config")
    if keys.flag("use_liger_kernel") and liger.get("fused_linear_cross_entropy", True) is not False:
        keys.put("loss", "liger")
        keys.left_out.append("use_liger_kernel: Liger's other kernels are not played")


RUNFILE = RunFile(
    title="the HF Trainer",
    own=words("per_device_train_batch_size per_device_eval_batch_size optim num_train_epochs"),
    read=_read,
    refuses=REFUSED,
    launch="python YOUR_SCRIPT.py",
    ignored=IGNORED,
    says=SAYS,
)
