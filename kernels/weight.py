"""An NF4 weight as bitsandbytes keeps it, taken apart for kernels."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memplan.errors import KernelError

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # quantize_4bit, bitsandbytes 0.50 functional.py
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The NormalFloat4 code, as the number that fp32 rounds it to (get_4bit_type, bitsandbytes 0.50
# functional.py).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Weight(NamedTuple):
    """A weight [rows, columns]. Two codes a byte, the first in the high four bits; ``blocksize`` codes,
    counted through the rows, share a scale. With double quantisation the scales are bytes themselves, codes
    of ``nested_code`` with a scale for each ``nested_blocksize`` of them, and shifted by ``offset``.
    """

    packed: Tensor  # uint8
    absmax: Tensor  # fp32, or uint8 when nested
    code: Tensor  # the 16 values, fp32
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    rows: int
    columns: int
    blocksize: int
    nested_blocksize: int

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised too."""
        return self.nested_absmax is not None


def weight_of(packed: Tensor, state: Any) -> Weight:
    """The weight that bitsandbytes packed, with its ``QuantState``. Nothing is copied.

    Raises KernelError for what is not NF4, or whose pieces don't fit together.
    """
    if state is None or packed is None:
        raise KernelError("this layer is not quantised yet: move the model to its device first")
    if state.quant_type != "nf4":
        raise KernelError(
            f"the kernels decode NF4, and this weight is {state.quant_type!r}: leave it as it is"
        )
    shape = tuple(state.shape)
    if len(shape) != 2:
        raise KernelError(f"the kernels multiply by matrices, and this weight has the shape {shape}")
    if state.blocksize not in BLOCKSIZES:
        raise KernelError(f"bitsandbytes has no blocks of {state.blocksize} weights: {BLOCKSIZES}")
    if getattr(state, "packing_format_for_cpu", False):
        raise KernelError("this weight was packed anew for inference on a CPU: train with one that was not")
    codes = packed if packed.dtype is torch.uint8 else packed.view(torch.uint8)
    count = prod(shape)
    blocks = -(-count // state.blocksize)
    if codes.numel() < (count + 1) // 2 or not codes.is_contiguous():
        raise KernelError(f"{codes.numel()} packed bytes can't be a weight of the shape {shape}")
    nested = state.state2
    absmax_dtype = torch.uint8 if state.nested else torch.float32
    if state.absmax.dtype is not absmax_dtype or state.absmax.numel() != blocks:
        raise KernelError(
            f"{state.absmax.numel()} scales of {state.absmax.dtype} can't belong to {blocks} blocks of "
            f"{state.blocksize} weights"
        )
    if state.nested and nested.absmax.numel() * nested.blocksize < blocks:
        raise KernelError(f"{nested.absmax.numel()} second-order scales are too few for {blocks} scales")
    pieces = (state.absmax, state.code, *((nested.absmax, nested.code) if state.nested else ()))
    if not all(piece.is_contiguous() for piece in pieces):
        raise KernelError("scales or codes of this weight are not contiguous, as bitsandbytes makes them")
    return Weight(
        codes,
        state.absmax,
        state.code,
        nested.absmax if state.nested else None,
        nested.code if state.nested else None,
        state.offset if state.nested else None,
        *shape,
        state.blocksize,
        nested.blocksize if state.nested else 1,
    )


def check_code(weight: Weight) -> None:
    """Raise KernelError unless the weight's 16 values are NF4's. Reads the device, so once a layer."""
    if tuple(weight.code.tolist()) != NF4:
        raise KernelError("the code beside this weight is not NF4's, which bitsandbytes would decode it by")
