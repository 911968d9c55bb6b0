"""NF4 to 16 or 32 bits, bit by bit as bitsandbytes 0.50 does it, in one launch that reads nested scales
directly.

A value is ``code[nibble] * scale`` in fp32, rounded once to the output's dtype. A nested scale is
``nested_code[byte] * nested_absmax`` rounded, plus the offset rounded: never a fused multiply-add.
"""

# No postponed annotations here: Triton reads tl.constexpr from them.
from typing import Any, Optional

import torch
from torch import Tensor

from memplan.errors import KernelError
from memplan.kernels.launch import Runs, jit, launch, rounded, tl, where
from memplan.kernels.weight import DTYPES, Weight, weight_of

_TILE = 4096  # values a program writes

Span = tuple[int, int]

# -- the kernels -------------------------------------------------------------------------------------------


@jit
def _scales(
    block, mask, absmax, nested_absmax, nested_code, offset, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr
):
    """The scales of blocks."""
    if NESTED:
        byte = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        shared = tl.load(nested_absmax + block // NESTED_BLOCK, mask=mask, other=0.0)
        scale = tl.load(nested_code + byte) * shared + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    return scale


@jit
def _decode(nibble, code, SELECT: tl.constexpr):
    """The values of codes: by the table in memory (64 bytes, which stay in L1), or by comparisons."""
    if SELECT:
        value = tl.full(nibble.shape, -1.0, tl.float32)
        for number in tl.static_range(1, 16):
            value = tl.where(nibble == number, tl.load(code + number), value)
    else:
        value = tl.load(code + nibble)
    return value


@jit
def _dequantize_blocks(
    packed, absmax, code, nested_absmax, nested_code, offset, out,
    blocks, wide, stride, first,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    SELECT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Whole blocks: ``wide`` of them from each row of ``stride``, beginning with block ``first``. Blocks are
    counted in 32 bits, in which a division costs a GPU a tenth; their values and bytes need 64.
    """
    number = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = number < blocks
    row = number // wide
    source = (first + row * stride + (number - row * wide)).to(tl.int64)
    scale = _scales(source, mask, absmax, nested_absmax, nested_code, offset, NESTED, NESTED_BLOCK)
    byte = tl.arange(0, BLOCK // 2)
    pair = tl.load(packed + source[:, None] * (BLOCK // 2) + byte[None, :], mask=mask[:, None], other=0)
    pair = pair.to(tl.int32)
    high = _decode(pair >> 4, code, SELECT) * scale[:, None]
    low = _decode(pair & 15, code, SELECT) * scale[:, None]
    values = tl.reshape(tl.join(high, low), (TILE, BLOCK))
    place = number.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + place, rounded(values, out.dtype.element_ty), mask=mask[:, None])


@jit
def _dequantize_values(
    packed, absmax, code, nested_absmax, nested_code, offset, out,
    count, wide, stride, first,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    SELECT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Value by value, wherever blocks and bytes begin."""
    number = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = number < count
    source = first + number // wide * stride + number % wide
    scale = _scales(source // BLOCK, mask, absmax, nested_absmax, nested_code, offset, NESTED, NESTED_BLOCK)
    pair = tl.load(packed + source // 2, mask=mask, other=0).to(tl.int32)
    nibble = tl.where(source % 2 == 0, pair >> 4, pair & 15)
    value = _decode(nibble, code, SELECT) * scale
    tl.store(out + number, rounded(value, out.dtype.element_ty), mask=mask)


# -- plain torch -------------------------------------------------------------------------------------------


def reference_scales(weight: Weight) -> Tensor:
    """All scales, fp32."""
    if weight.nested_absmax is None or weight.nested_code is None or weight.offset is None:
        return weight.absmax
    shared = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: weight.absmax.numel()]
    return weight.nested_code[weight.absmax.to(torch.int64)] * shared + weight.offset


def reference(
    weight: Weight, dtype: torch.dtype, rows: Optional[Span] = None, columns: Optional[Span] = None
) -> Tensor:
    """The weight, or a strip of it, in plain torch: what the kernels are held against."""
    device = weight.packed.device
    row = torch.arange(*(rows or (0, weight.rows)), device=device)
    column = torch.arange(*(columns or (0, weight.columns)), device=device)
    place = row[:, None] * weight.columns + column
    pair = weight.packed.reshape(-1)[place // 2]
    nibble = torch.where(place % 2 == 0, pair >> 4, pair & 15)
    values = weight.code[nibble.to(torch.int64)] * reference_scales(weight)[place // weight.blocksize]
    return values.to(dtype)


# -- into a buffer -----------------------------------------------------------------------------------------


def dequantize_into(out: Tensor, weight: Weight, rows: Span, columns: Span, *, select: bool = False) -> None:
    """Write the strip ``weight[rows, columns]`` to ``out``, a contiguous buffer of that shape. ``select``:
    decode by comparisons.
    """
    runs = where(out)
    if runs is Runs.NOT:
        return
    if runs is Runs.TORCH:
        out.copy_(reference(weight, out.dtype, rows, columns))
        return
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    first = rows[0] * weight.columns + columns[0]
    stride = weight.columns
    if width == stride:  # whole rows lie one after the other
        width, height, stride = width * height, 1, width * height
    block = weight.blocksize
    settings: dict[str, Any] = {
        "BLOCK": block, "NESTED": weight.nested, "NESTED_BLOCK": weight.nested_blocksize, "SELECT": select,
    }  # fmt: skip
    pointers = (
        weight.packed, weight.absmax, weight.code,
        *(weight.absmax if piece is None else piece
          for piece in (weight.nested_absmax, weight.nested_code, weight.offset)),
        out,
    )  # fmt: skip
    count = height * width
    if not count:
        return
    if not out.is_contiguous():
        raise KernelError("a strip is written to a contiguous buffer")
    if any(number % block for number in (width, stride, first)) or weight.rows * weight.columns > block << 30:
        grid = (-(-count // _TILE),)
        launch(
            _dequantize_values,
            grid,
            out.device,
            *pointers,
            count,
            width,
            stride,
            first,
            **settings,
            TILE=_TILE,
        )
        return
    tile = max(_TILE // block, 1)
    numbers = [number // block for number in (count, width, stride, first)]
    grid = (-(-numbers[0] // tile),)
    launch(_dequantize_blocks, grid, out.device, *pointers, *numbers, **settings, TILE=tile)


# -- the operator ------------------------------------------------------------------------------------------


@torch.library.custom_op("memplan::nf4_dequantize", mutates_args=())
def nf4_dequantize_op(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Optional[Tensor],
    nested_code: Optional[Tensor],
    offset: Optional[Tensor],
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """A whole weight in ``dtype``."""
    weight = Weight(
        packed, absmax, code, nested_absmax, nested_code, offset, rows, columns, blocksize, nested_blocksize
    )
    out = packed.new_empty((rows, columns), dtype=dtype)
    dequantize_into(out, weight, (0, rows), (0, columns))
    return out


@nf4_dequantize_op.register_fake
def _(packed: Tensor, *rest: Any) -> Tensor:
    rows, columns = rest[5:7]
    return packed.new_empty((rows, columns), dtype=rest[-1])


def nf4_dequantize(packed: Tensor, state: Any, dtype: Optional[torch.dtype] = None) -> Tensor:
    """The weight that bitsandbytes packed, with its ``QuantState``, in ``dtype`` (default: the state's).

    Equal to ``bitsandbytes.functional.dequantize_4bit`` bit by bit. Raises KernelError for what is not NF4.
    """
    weight = weight_of(packed, state)
    dtype = dtype or state.dtype
    if dtype not in DTYPES:
        raise KernelError(f"NF4 is decoded to bfloat16, float16 or float32, not to {dtype}")
    out: Tensor = nf4_dequantize_op(*weight, dtype)
    return out
