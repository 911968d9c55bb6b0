"""accelerate's YAML or JSON (1.15, `commands/config/config_args.py`): where a run runs, not what it is."""

from __future__ import annotations

from memplan.runfiles import RunFile
from memplan.runfiles._keys import Keys, words

_ALONE = ("NO", "no")


def _read(keys: Keys) -> None:
    kind = keys.text("distributed_type") or "NO"
    if kind not in _ALONE:
        keys.refuse("distributed_type", "spreads the run over several cards, which memplan does not plan yet")
    keys.several("num_processes", "num_machines")
    keys.refuse_any(dict.fromkeys(("deepspeed_config", "fsdp_config"), "is not planned yet"))
    keys.refuse_any({"use_cpu": "trains on the processor, whose memory memplan does not plan"})
    precision = keys.one_of("mixed_precision", {"no": False, "bf16": True, "fp16": True, "fp8": None}, False)
    if precision is None:
        keys.refuse("mixed_precision", "computes in 8 bits, which memplan does not plan")
    if precision:  # "no" leaves it to the trainer, whose own bf16 overrules it
        keys.put("autocast", True)
    keys.leave_out("what torch.compile keeps is another amount", "dynamo_config")


RUNFILE = RunFile(
    title="accelerate",
    own=words("distributed_type compute_environment machine_rank num_machines num_processes"),
    read=_read,
    launch="accelerate launch --config_file FILE YOUR_SCRIPT.py",
    ignored=words(
        """
        compute_environment debug machine_rank gpu_ids main_process_ip main_process_port rdzv_backend
        same_network main_training_function enable_cpu_affinity parallelism_config megatron_lm_config
        mpirun_config tpu_name tpu_zone tpu_use_cluster tpu_use_sudo command_file commands tpu_vm tpu_env
        downcast_bf16 fp8_config
    """
    ),
)
