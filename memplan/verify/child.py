"""The process that trains: one run, and it is gone, with all that it had on the card.

It reads a job from standard input and writes the measurement to the file that its argument names. What it
has to say on the way are lines on standard output that begin with :data:`SIGN`; libraries may print others.
When its standard input is closed, its parent is gone, and so is it.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

from memplan import optimizers
from memplan.errors import MemplanError, reason
from memplan.verify.job import Job
from memplan.verify.measurement import Device, Measurement, Outcome, Step
from memplan.verify.ranks import rank_here

SIGN = "@memplan "
STATUS_DONE, STATUS_REFUSED = 0, 2

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_SETTINGS = (*ALLOCATOR_SETTINGS, "CUBLAS_WORKSPACE_CONFIG")


def main() -> int:
    """Run the job; the exit status."""
    job = Job.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tell("state", "importing the libraries")
    try:
        measured = run(job)
    except MemplanError as error:
        tell("refused", str(error))
        return STATUS_REFUSED
    result = Path(sys.argv[1])
    beside = result.with_suffix(".part")
    content = measured.model_dump_json()
    try:
        beside.write_text(content, encoding="utf-8")
        beside.replace(result)
    except OSError:  # the disk is full
        sys.stdout.write("\n")  # whatever a library left on the line
        tell("result", content)
    if job.recipe.gpus > 1:
        # what joins the ranks may wait for others, which are gone, before it lets this one end
        sys.stdout.flush()
        os._exit(STATUS_DONE)
    return STATUS_DONE


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def tell(kind: str, value: Any) -> None:
    """Say something to the parent."""
    sys.stdout.write(SIGN + json.dumps({"kind": kind, "value": value}) + "\n")
    sys.stdout.flush()


def run(job: Job) -> Measurement:
    """Train and measure. Raises MemplanError if the run is refused."""
    from memplan import libraries
    from memplan.verify import driver

    libraries.require(doing="verifying")
    # before there is a CUDA context
    baseline = driver.used_bytes(rank_here(job.recipe)) if job.device == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries deprecate is for those who call them
        return _run(job, baseline)


def _run(job: Job, baseline: int | None) -> Measurement:
    import torch

    from memplan.trace import quiet
    from memplan.verify.train import Training, train

    backend = _backend(job)
    device = device_of(job)
    _check_room(job, device)
    _check_bitsandbytes(job, torch.device(job.device))
    outcome = Outcome(kind="trained")
    training: Training | None = None
    steps: list[Step] = []
    with quiet():
        try:
            if job.run.loop == "memplan":
                training = train(job, backend, tell, steps)
            else:
                from memplan.verify.trainer import train_with_trainer

                training = train_with_trainer(job, backend, tell, steps)
        except MemplanError:
            raise
        except Exception as error:  # whatever the libraries raise
            if job.device == "cuda" and _out_of_memory(error):
                outcome = Outcome(kind="out of memory", event=backend.out_of_memory(error))
            else:
                outcome = Outcome(kind="failed", why=_sentence(error))
            traceback.clear_frames(error.__traceback__)  # they hold the model
    if training is not None and training.evidence.doubts:
        outcome = Outcome(kind="trained", why="; ".join(training.evidence.doubts))
    gc.collect()
    return _measurement(job, device, outcome, steps, training, baseline, getattr(backend, "remarks", []))


def _out_of_memory(error: Exception) -> bool:
    """The allocator's own error, or the driver's from what libraries take beside the allocator."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def _sentence(error: BaseException) -> str:
    where = ""
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return f"{reason(error)}{where}"


def _backend(job: Job) -> Any:
    import torch

    if job.device == "cpu":
        from memplan.verify.host import Host

        return Host()
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        why = "no CUDA device that PyTorch can use" if built else "a PyTorch that was built without CUDA"
        raise MemplanError(f"this machine has {why}: --device cpu trains on the host and counts storages")
    from memplan.verify.record_cuda import Cuda

    count = torch.cuda.device_count()
    if count < job.recipe.gpus:
        raise MemplanError(
            f"this machine has {count} GPU{'s' if count > 1 else ''}, and the run is of {job.recipe.gpus}: "
            f"`memplan dry-run --gpu {job.recipe.gpus}xCARD` runs a script of it on cards that are not there"
        )
    torch.cuda.set_device(rank_here(job.recipe))
    return Cuda(job)


def device_of(job: Job) -> Device:
    """What the run's device is."""
    import torch

    from memplan.verify import driver

    if job.device == "cpu":
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return Device(kind="cpu", name=platform.processor() or platform.machine(), total_bytes=pages * size)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(
        kind="cuda",
        name=properties.name,
        capability=(properties.major, properties.minor),
        total_bytes=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        driver=driver.version(),
    )


def _check_room(job: Job, device: Device) -> None:
    """Refuse a run that the plan says does not fit: by the allocated peak alone, so that no run is refused
    which might."""
    if job.anyway:
        return
    room = device.total_bytes
    if job.device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        room = min(free + torch.cuda.memory_reserved(), job.run.cap_bytes or device.total_bytes)
    needed = job.predicted_bytes
    if job.device == "cpu":
        needed *= job.recipe.gpus  # which share the host
    if needed > room:
        what = f"under the cap {job.run.cap_name}" if job.run.cap_name else f"on this {device.name}"
        raise MemplanError(
            f"the plan says that this run allocates {needed / 2**30:.2f} GiB, and {what} there "
            f"are {room / 2**30:.2f} GiB free: ask `memplan plan` what fits, or run it --anyway"
        )


def _check_bitsandbytes(job: Job, device: Any) -> None:
    """Whether the library works there, by using it."""
    if job.recipe.mode.value != "qlora" and not optimizers.find(job.recipe.optimizer).bitsandbytes:
        return
    import torch
    from bitsandbytes import functional

    try:
        weight = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
        functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # the library's own, a missing kernel's, the driver's
        from importlib.metadata import version

        why = " ".join(str(error).split())[:160]
        raise MemplanError(
            f"bitsandbytes {version('bitsandbytes')} has no working backend for {device.type} here ({why}): "
            "install a build for this CUDA, or use --mode lora with a torch optimizer"
        ) from None


def _measurement(
    job: Job,
    device: Device,
    outcome: Outcome,
    steps: list[Step],
    training: Any,
    baseline: int | None,
    remarks: list[str],
) -> Measurement:
    from datetime import datetime, timezone

    from memplan import __version__, libraries
    from memplan.verify.measurement import packed

    settings = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
    tape = training.tape if training else None
    return Measurement(
        counted="CUDA caching allocator" if job.device == "cuda" else "CPU storages",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        memplan_version=__version__,
        git_commit=_commit(),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        libraries=libraries.installed(),
        device=device,
        model=job.model,
        recipe=job.recipe,
        run=job.run.model_copy(update={"settings": settings}),
        outcome=outcome,
        steps=tuple(steps),
        evidence=training.evidence if training else None,
        baseline_driver_bytes=baseline,
        tape_step=steps[-1].number if tape is not None else None,
        tape=packed(tape) if tape is not None else None,
        remarks=tuple(remarks),
        rank=rank_here(job.recipe),
    )


def _commit() -> str | None:
    """The checkout's commit, with a + if it has changes."""
    import subprocess

    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
