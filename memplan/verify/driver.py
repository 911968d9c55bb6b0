"""What NVIDIA's driver says of a card, without making a CUDA context: through NVML (the package nvidia-ml-py)
if it is installed, else by asking ``nvidia-smi``. None where neither can tell."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import Any

MIB = 1 << 20


def version() -> str | None:
    """The driver's version."""
    nvml = _nvml()
    if nvml is not None:
        answer = nvml.nvmlSystemGetDriverVersion()
        return answer.decode() if isinstance(answer, bytes) else str(answer)
    return _smi("driver_version", "0")


def used_bytes(index: int = 0) -> int | None:
    """Bytes in use on the card by everybody, without what the driver reserves for itself, which PyTorch does
    not see either. ``index`` is CUDA's, mapped by CUDA_VISIBLE_DEVICES."""
    nvml = _nvml()
    device = _physical(index)
    # version 1 counts the reserved bytes as used (nvml.h, nvmlMemory_t): hundreds of MiB on a large card
    version = getattr(nvml, "nvmlMemory_v2", None)
    if version is not None:
        with contextlib.suppress(Exception):  # NVML's own errors: an old driver, no permission
            return int(nvml.nvmlDeviceGetMemoryInfo(_handle(nvml, device), version=version).used)
    answer = _smi("memory.used", device)
    return int(answer) * MIB if answer is not None and answer.isdigit() else None


def process_bytes(index: int = 0) -> int | None:
    """Bytes in use on the card by this process; None in a container whose process numbers are its own."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(_handle(nvml, _physical(index)))
    except Exception:  # NVML's own errors
        return None
    own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return int(own[0]) if own and own[0] is not None else None


def _nvml() -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no card
        return None
    return pynvml


def _handle(nvml: Any, device: str) -> Any:
    if device.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(device))
    return nvml.nvmlDeviceGetHandleByUUID(device)


def _physical(index: int) -> str:
    """The driver's number or UUID of a CUDA device."""
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return visible[index] if index < len(visible) else str(index)


def _smi(field: str, device: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={device}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.strip().partition("\n")[0] or None
