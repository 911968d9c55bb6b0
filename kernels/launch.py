"""Where a kernel runs: Triton if it is there, its interpreter on a CPU, or plain torch.

Triton decides when it is imported whether kernels are compiled or interpreted (``TRITON_INTERPRET=1``).
"""

# No postponed annotations here: Triton reads tl.constexpr from them.
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import cache
from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memplan.cuda.card import KERNELS_CAPABILITY
from memplan.errors import KernelError

try:
    import triton
    import triton.language as tl

    jit: Callable[[Any], Any] = triton.jit
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:  # not Linux, or not installed: the operators are still there, in plain torch on a CPU
    triton = None
    tl = SimpleNamespace(constexpr=None)
    INTERPRETED = False

    def jit(function: Any) -> Any:
        """Leave a kernel that nobody will launch as it is."""
        return function


# What kernels look up: the interpreter cuts fp32 off to bf16 where a GPU rounds.
EMULATE_ROUNDING = tl.constexpr(INTERPRETED) if triton is not None else False


@jit
def rounded(value, DTYPE: tl.constexpr):
    """fp32 in a shorter dtype, ties to even."""
    if EMULATE_ROUNDING and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        short = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        short = value.to(DTYPE)
    return short


@jit
def dot(left, right, total):
    """``total + left @ right`` with fp32 sums. The interpreter multiplies bf16 wrongly, and fp32 holds the
    products of shorter numbers exactly.
    """
    if EMULATE_ROUNDING:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


class Runs(Enum):
    """How the work on a tensor is done."""

    TRITON = "triton"
    TORCH = "plain torch"
    NOT = "a tensor without data"


_dry = 0


@contextmanager
def dry() -> Iterator[None]:
    """What runs inside allocates and computes nothing: for those who count (memplan/trace/nf4.py)."""
    global _dry
    _dry += 1
    try:
        yield
    finally:
        _dry -= 1


def where(tensor: Tensor) -> Runs:
    """How the work on ``tensor`` is done. Raises KernelError on a GPU that can't."""
    if _dry or isinstance(tensor, FakeTensor):
        return Runs.NOT
    if tensor.is_cuda:
        reason = refusal(tensor.device)
        if reason:
            raise KernelError(reason)
        return Runs.TRITON
    if tensor.device.type != "cpu":
        raise KernelError(f"the kernels run on NVIDIA GPUs, not on {tensor.device.type}")
    return Runs.TRITON if INTERPRETED else Runs.TORCH


@cache
def refusal(device: torch.device) -> Optional[str]:
    """Why the kernels can't run on a GPU, in a sentence; None if they can."""
    if triton is None:
        return "the kernels need Triton, which is not installed: run `pip install triton`"
    if torch.version.hip is not None:
        return "the kernels were written for NVIDIA GPUs and were never tried on AMD"
    capability = torch.cuda.get_device_capability(device)
    if capability < KERNELS_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"the kernels need an Ampere GPU or newer (8.0), and {name} is {capability[0]}.{capability[1]}"
    return None


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **settings: Any
) -> None:
    """Run a kernel, with multiplication and addition rounded apart as bitsandbytes' are (no fused ones)."""
    if not INTERPRETED:
        settings["enable_fp_fusion"] = False
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **settings)
