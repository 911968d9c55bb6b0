"""The adapter's products with dropout, whose mask is made again from a seed wherever it is needed.

An element is kept if a Philox number of (seed, column, row) is at least ``p`` of its range, and divided by 1
- p: so forward, recomputation and backward agree without a mask in memory. Shapes: x [M, K], rank R.
"""

# No postponed annotations here: Triton reads tl.constexpr from them.
import torch
from torch import Tensor

from memplan.kernels.launch import Runs, dot, jit, launch, rounded, tl, where
from memplan.kernels.nf4_product import TRITON_DTYPES

# Not yet tuned, but for what compiles without spilled registers into the 99 KiB of shared memory that a block
# has on a consumer card; fp32 has no tensor cores. A rank that is larger goes in parts of RANK.
TILES_16 = {"TILE_M": 64, "TILE_K": 64, "RANK": 64}
TILES_32 = {"TILE_M": 32, "TILE_K": 32, "RANK": 16}
_ROUND_A, _ROUND_B = (
    0xD2511F53,
    0xCD9E8D57,
)  # Salmon et al. 2011, Philox 4x32-10, as triton/language/random.py has it
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


# -- the kernels -------------------------------------------------------------------------------------------


@jit
def _keep(seed, here_m, here_k, threshold):
    """Which elements [M, K] are kept."""
    k = here_k[None, :] + here_m[:, None] * 0
    m = here_m[:, None] + here_k[None, :] * 0
    number, _, _, _ = tl.philox(tl.load(seed), k, m, k * 0, k * 0)
    return number.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold


@jit
def _dropped(x, seed, here_m, here_k, length, width, threshold):
    """``x[M, K]`` where it is kept, else 0; not yet divided by the share that is."""
    inside = (here_m < length)[:, None] & (here_k < width)[None, :]
    values = tl.load(x + here_m.to(tl.int64)[:, None] * width + here_k[None, :], mask=inside, other=0.0)
    return tl.where(_keep(seed, here_m, here_k, threshold), values, tl.zeros_like(values))


@jit
def _down(
    x, down, seed, out, length, width, rank, threshold, factor,
    DTYPE: tl.constexpr, RANK: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """``out[M, R] = dropped(x) @ down[R, K].T``."""
    here_m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    here_r = tl.program_id(1) * RANK + tl.arange(0, RANK)
    total = tl.zeros((TILE_M, RANK), tl.float32)
    for start in range(0, width, TILE_K):
        here_k = start + tl.arange(0, TILE_K)
        values = _dropped(x, seed, here_m, here_k, length, width, threshold)
        factors = tl.load(
            down + here_r[None, :] * width + here_k[:, None],
            mask=(here_r < rank)[None, :] & (here_k < width)[:, None],
            other=0.0,
        )
        total = dot(values, rounded(factors.to(tl.float32), DTYPE), total)
    place = out + here_m.to(tl.int64)[:, None] * rank + here_r[None, :]
    mask = (here_m < length)[:, None] & (here_r < rank)[None, :]
    tl.store(place, rounded(total * factor, out.dtype.element_ty), mask=mask)


@jit
def _down_gradient(
    x, grad, seed, out, length, width, rank, threshold, factor,
    DTYPE: tl.constexpr, RANK: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """``out[R, K] = grad[M, R].T @ dropped(x)``; each sum over all rows in one program."""
    here_k = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    here_r = tl.program_id(1) * RANK + tl.arange(0, RANK)
    total = tl.zeros((RANK, TILE_K), tl.float32)
    for start in range(0, length, TILE_M):
        here_m = start + tl.arange(0, TILE_M)
        values = _dropped(x, seed, here_m, here_k, length, width, threshold)
        grads = tl.load(
            grad + here_m.to(tl.int64)[None, :] * rank + here_r[:, None],
            mask=(here_m < length)[None, :] & (here_r < rank)[:, None],
            other=0.0,
        )
        total = dot(grads, values, total)
    place = out + here_r[:, None] * width + here_k[None, :]
    mask = (here_r < rank)[:, None] & (here_k < width)[None, :]
    tl.store(place, rounded(total * factor, out.dtype.element_ty), mask=mask)


@jit
def _add_input_gradient(
    grad, down, seed, out, length, width, rank, threshold, factor, first, columns, out_stride,
    DTYPE: tl.constexpr, RANK: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """``out += dropped(grad[M, R] @ down[R, K])`` for ``columns`` columns from ``first``."""
    here_m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    inner = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    here_k = first + inner
    total = tl.zeros((TILE_M, TILE_K), tl.float32)
    for start in range(0, rank, RANK):
        here_r = start + tl.arange(0, RANK)
        grads = tl.load(
            grad + here_m.to(tl.int64)[:, None] * rank + here_r[None, :],
            mask=(here_m < length)[:, None] & (here_r < rank)[None, :],
            other=0.0,
        )
        factors = tl.load(
            down + here_r[:, None] * width + here_k[None, :],
            mask=(here_r < rank)[:, None] & (inner < columns)[None, :],
            other=0.0,
        )
        total = dot(grads, rounded(factors.to(tl.float32), DTYPE), total)
    total = tl.where(_keep(seed, here_m, here_k, threshold), total * factor, 0.0)
    place = out + here_m.to(tl.int64)[:, None] * out_stride + inner[None, :]
    mask = (here_m < length)[:, None] & (inner < columns)[None, :]
    before = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, rounded(before + total, out.dtype.element_ty), mask=mask)


# -- plain torch -------------------------------------------------------------------------------------------


def reference_keep(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask [rows, columns], in plain torch: unsigned 32-bit numbers held in int64."""
    device = seed.device
    c0 = torch.arange(columns, device=device)[None, :].expand(rows, columns)
    c1 = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    c2 = c3 = torch.zeros((rows, columns), dtype=torch.int64, device=device)
    k0, k1 = seed[0] & _LOW, seed[0] >> 32 & _LOW
    for _ in range(10):
        c0, c1, c2, c3 = (
            _high(_ROUND_B, c2) ^ c1 ^ k0, _ROUND_B * c2 & _LOW,
            _high(_ROUND_A, c0) ^ c3 ^ k1, _ROUND_A * c0 & _LOW,
        )  # fmt: skip
        k0, k1 = k0 + _KEY_A & _LOW, k1 + _KEY_B & _LOW
    return c0 >= threshold(p)


def _high(a: int, b: Tensor) -> Tensor:
    """The upper 32 bits of a product of 32-bit numbers, without leaving int64."""
    return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16


def threshold(p: float) -> int:
    """Numbers below it are dropped."""
    return int(p * (1 << 32))


def factor(p: float) -> float:
    """What kept elements are multiplied by; none is kept of all."""
    return 1 / (1 - p) if p < 1 else 0.0


def dropped(x_MK: Tensor, seed: Tensor, p: float) -> Tensor:
    """``x`` after dropout, in plain torch."""
    rows, columns = x_MK.shape
    return x_MK * reference_keep(seed, rows, columns, p) * factor(p)


# -- into buffers ------------------------------------------------------------------------------------------


def down_into(out_MR: Tensor, x_MK: Tensor, down_RK: Tensor, seed: Tensor, p: float) -> None:
    """``out = dropped(x) @ down.T``."""
    runs = where(x_MK)
    if runs is Runs.TORCH:
        out_MR.copy_(dropped(x_MK, seed, p) @ down_RK.to(x_MK.dtype).t())
    if runs is not Runs.TRITON:
        return
    _launch(_down, "TILE_M", 0, (x_MK, down_RK.contiguous(), seed, out_MR), x_MK, down_RK.shape[0], p)


def down_gradient_into(out_RK: Tensor, x_MK: Tensor, grad_MR: Tensor, seed: Tensor, p: float) -> None:
    """``out = grad.T @ dropped(x)``."""
    runs = where(x_MK)
    if runs is Runs.TORCH:
        out_RK.copy_(grad_MR.t() @ dropped(x_MK, seed, p))
    if runs is not Runs.TRITON:
        return
    _launch(_down_gradient, "TILE_K", 1, (x_MK, grad_MR, seed, out_RK), x_MK, out_RK.shape[0], p)


def add_input_gradient(
    out: Tensor, grad_MR: Tensor, down_RK: Tensor, seed: Tensor, p: float, start: int, stop: int
) -> None:
    """``out += dropped(grad @ down)[:, start:stop]``; ``out`` has contiguous rows."""
    runs = where(out)
    if runs is Runs.TORCH:
        keep = reference_keep(seed, out.shape[0], down_RK.shape[1], p)[:, start:stop]
        out += grad_MR @ down_RK[:, start:stop].to(grad_MR.dtype) * keep * factor(p)
    if runs is not Runs.TRITON:
        return
    length, (rank, width) = out.shape[0], down_RK.shape
    chosen = tiles(out.dtype, rank)
    grid = (-(-length // chosen["TILE_M"]), -(-(stop - start) // chosen["TILE_K"]))
    launch(
        _add_input_gradient, grid, out.device, grad_MR, down_RK.contiguous(), seed, out,
        length, width, rank, threshold(p), factor(p), start, stop - start, out.stride(0),
        DTYPE=TRITON_DTYPES[out.dtype], **chosen,
    )  # fmt: skip


def _launch(kernel, tile, dimension, pointers, x_MK, rank, p):
    chosen = tiles(x_MK.dtype, rank)
    grid = (-(-x_MK.shape[dimension] // chosen[tile]), -(-rank // chosen["RANK"]))
    launch(
        kernel, grid, x_MK.device, *pointers, *x_MK.shape, rank, threshold(p), factor(p),
        DTYPE=TRITON_DTYPES[x_MK.dtype], **chosen,
    )  # fmt: skip


def tiles(dtype: torch.dtype, rank: int) -> dict[str, int]:
    """Sizes of tiles, and of the part of the rank that a program takes, a power of two for tensor cores."""
    chosen = TILES_32 if dtype is torch.float32 else TILES_16
    return {**chosen, "RANK": min(max(16, 1 << (rank - 1).bit_length()), chosen["RANK"])}
