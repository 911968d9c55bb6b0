"""The cards of this machine, asked of NVIDIA's driver: no torch, no context, no memory of the card taken.

``cuDeviceTotalMem`` is what PyTorch reports as a card's total capacity (``cudaDeviceProp::totalGlobalMem``).
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def present() -> dict[str, int]:
    """Bytes that PyTorch can see of each card of this machine, by the driver's name for it; of several alike
    the smallest. Empty without a driver."""
    driver = _library()
    if driver is None:
        return {}
    try:
        return _ask(driver)
    except (AttributeError, OSError, ctypes.ArgumentError):  # a library of that name that is none
        return {}


def _library() -> Any:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _ask(driver: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return found
    for ordinal in range(count.value):
        device, total = ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(256)
        if (
            driver.cuDeviceGet(ctypes.byref(device), ordinal)
            or driver.cuDeviceGetName(name, len(name), device)
            or driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        ):
            continue
        text = name.value.decode(errors="replace")
        found[text] = min(total.value, found.get(text, total.value))
    return found
