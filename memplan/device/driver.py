"""The cards of this machine, asked of NVIDIA's driver: no torch, no context, no memory of the card taken.

``cuDeviceTotalMem`` is what PyTorch reports as a card's total capacity (``cudaDeviceProp::totalGlobalMem``).
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any, NamedTuple

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR (cuda.h)
_CAPABILITY = (75, 76)


class Installed(NamedTuple):
    """A card of this machine: what PyTorch can see of it, and its compute capability, if it says."""

    nbytes: int
    capability: tuple[int, int] | None


@cache
def present() -> dict[str, int]:
    """Bytes that PyTorch can see of each card of this machine, by the driver's name for it; of several alike
    the smallest. Empty without a driver."""
    return {name: card.nbytes for name, card in installed().items()}


def installed() -> dict[str, Installed]:
    """The cards of this machine by the driver's names for them; of several alike the smallest."""
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


def _ask(driver: Any) -> dict[str, Installed]:
    found: dict[str, Installed] = {}
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
        one = Installed(total.value, _capability(driver, device))
        found[text] = min(one, found.get(text, one), key=lambda card: card.nbytes)
    return found


def _capability(driver: Any, device: ctypes.c_int) -> tuple[int, int] | None:
    major, minor = ctypes.c_int(), ctypes.c_int()
    try:
        for number, attribute in zip((major, minor), _CAPABILITY, strict=True):
            if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
                return None
    except AttributeError:
        return None
    return major.value, minor.value
