"""A matrix product that decodes its NF4 operand in registers, one launch and no scratch at all.

The weight is the left operand, which on Hopper may come from registers (WGMMA); the result is written
transposed. Each sum runs in one program, in order. On an H200 it takes 3 to 80 times as long as the product
with a 16-bit weight (docs/kernels.md), so :mod:`memplan.kernels.nf4_linear` takes strips unless told
otherwise.
"""

# No postponed annotations here: Triton reads tl.constexpr from them.
from typing import Optional

import torch
from torch import Tensor

from memplan.errors import KernelError
from memplan.kernels.launch import Runs, dot, jit, launch, rounded, tl, where
from memplan.kernels.nf4_dequantize import _decode, _scales, reference
from memplan.kernels.weight import Weight

TILES = {"TILE_W": 128, "TILE_X": 64, "TILE_SUM": 64}  # not yet tuned


@jit
def _product(
    packed, absmax, code, nested_absmax, nested_code, offset, x, bias, out,
    length, rows, columns, x_stride, out_stride,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr,
    TILE_W: tl.constexpr, TILE_X: tl.constexpr, TILE_SUM: tl.constexpr,
):  # fmt: skip
    """``out = x @ W.T`` (x [length, columns]), or ``x @ W`` if TRANSPOSED (x [length, rows]); W [rows,
    columns].

    A program makes TILE_W outputs for TILE_X rows of x.
    """
    first_w = tl.program_id(0) * TILE_W
    first_x = tl.program_id(1) * TILE_X
    here_x = first_x + tl.arange(0, TILE_X)
    here_w = first_w + tl.arange(0, TILE_W)
    total = tl.zeros((TILE_W, TILE_X), tl.float32)
    width = rows if TRANSPOSED else columns
    kept = columns if TRANSPOSED else rows
    for start in range(0, width, TILE_SUM):
        here_sum = start + tl.arange(0, TILE_SUM)
        if TRANSPOSED:  # bytes lie along the outputs: decode [sum, w], then turn it
            row = here_sum.to(tl.int64)
            pair_column = first_w // 2 + tl.arange(0, TILE_W // 2)
        else:
            row = here_w.to(tl.int64)
            pair_column = start // 2 + tl.arange(0, TILE_SUM // 2)
        inside = (row < rows)[:, None] & (pair_column < columns // 2)[None, :]
        byte = row[:, None] * (columns // 2) + pair_column[None, :]
        pair = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
        scale = _scales(
            byte // (BLOCK // 2), inside, absmax, nested_absmax, nested_code, offset, NESTED, NESTED_BLOCK
        )
        high = rounded(_decode(pair >> 4, code, False) * scale, DTYPE)
        low = rounded(_decode(pair & 15, code, False) * scale, DTYPE)
        if TRANSPOSED:
            left = tl.trans(tl.reshape(tl.join(high, low), (TILE_SUM, TILE_W)))
        else:
            left = tl.reshape(tl.join(high, low), (TILE_W, TILE_SUM))
        right = tl.load(
            x + here_x[None, :].to(tl.int64) * x_stride + here_sum[:, None],
            mask=(here_x < length)[None, :] & (here_sum < width)[:, None],
            other=0.0,
        )
        total = dot(left, right, total)
    if BIAS:
        total += tl.load(bias + here_w, mask=here_w < kept, other=0.0).to(tl.float32)[:, None]
    place = out + here_x[None, :].to(tl.int64) * out_stride + here_w[:, None]
    # as the strips round: first to the dtype of the product, then to the output's
    short = rounded(total, DTYPE).to(tl.float32) if tl.float32 != DTYPE else total
    tl.store(
        place,
        rounded(short, out.dtype.element_ty),
        mask=(here_x < length)[None, :] & (here_w < kept)[:, None],
    )


def product(out: Tensor, x: Tensor, weight: Weight, bias: Optional[Tensor], *, transposed: bool) -> None:
    """Write ``x @ W.T + bias`` (``transposed``: ``x @ W``) to ``out``; both have contiguous rows.

    Raises KernelError for a weight with an odd number of columns, whose rows begin amid a byte.
    """
    if weight.columns % 2:
        raise KernelError(
            f"the fused product needs an even number of columns, not {weight.columns}: use strips"
        )
    runs = where(out)
    if runs is Runs.NOT:
        return
    if runs is Runs.TORCH:
        matrix = reference(weight, x.dtype)
        value = x @ matrix if transposed else torch.nn.functional.linear(x, matrix, bias)
        out.copy_(value)
        return
    x = x.contiguous()
    length = x.shape[0]
    kept = weight.columns if transposed else weight.rows
    grid = (-(-kept // TILES["TILE_W"]), -(-length // TILES["TILE_X"]))
    spare = weight.absmax
    pointers = (
        weight.packed, weight.absmax, weight.code,
        *(spare if piece is None else piece
          for piece in (weight.nested_absmax, weight.nested_code, weight.offset)),
        x, spare if bias is None else bias, out,
    )  # fmt: skip
    launch(
        _product, grid, out.device, *pointers,
        length, weight.rows, weight.columns, x.stride(0), out.stride(0),
        BLOCK=weight.blocksize, NESTED=weight.nested, NESTED_BLOCK=weight.nested_blocksize,
        BIAS=bias is not None, TRANSPOSED=transposed, DTYPE=TRITON_DTYPES[x.dtype], **TILES,
    )  # fmt: skip


TRITON_DTYPES = {
    dtype: getattr(tl, str(dtype).removeprefix("torch."), None)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
}
