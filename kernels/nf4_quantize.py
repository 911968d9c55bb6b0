"""Weights to NF4, code by code as bitsandbytes 0.50 does it on the same device: ``x * (1 / absmax)`` against
the midpoints of the code, a tie going to the lower of the two. The scales' own quantisation, which is small,
is bitsandbytes'.

Its CUDA code differs from its CPU code in the last bit: built with --use_fast_math, it takes the hardware's
approximate reciprocal, flushes what is below fp32's normal numbers, and holds four of the midpoints, which
fp32 does not have, rounded the other way (sm_90 code of libbitsandbytes_cuda128.so, disassembled; never yet
compared on a GPU).
"""

# No postponed annotations here: Triton reads tl.constexpr from them.
from typing import Any

import torch
from torch import Tensor

from memplan.errors import KernelError
from memplan.kernels.launch import EMULATE_ROUNDING as AS_ON_CPU
from memplan.kernels.launch import Runs, jit, launch, tl, where
from memplan.kernels.weight import BLOCKSIZES, DTYPES, NF4

_TILE = 4096  # values a program reads
_TINY = 1e-38  # what a block of zeros is divided by (quantize_4bit, backends/default/ops.py)

# The midpoints as CUDA code has them: four (0, 8, 12 and 14) lie half way between two numbers of fp32.
CUDA_BOUNDS = (
    -0.8480964303016663, -0.6106328964233398, -0.4599952697753906, -0.33967941999435425,
    -0.23460739850997925, -0.13791173696517944, -0.045525018125772476, 0.03979014977812767,
    0.1202552542090416, 0.2035212516784668, 0.2920137643814087, 0.3893125355243683,
    0.5016633868217468, 0.6427869200706482, 0.8614783883094788,
)  # fmt: skip


def bounds(device: torch.device) -> Tensor:
    """The 15 numbers above which a code ends, as bitsandbytes has them on that kind of device."""
    if device.type == "cuda":
        return torch.tensor(CUDA_BOUNDS, device=device)
    code = torch.tensor(NF4)
    return (code[:-1] + code[1:]) / 2


@jit
def _quantize(values, bounds, packed, absmax, count, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    place = number[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(values + place, mask=place < count, other=0.0).to(tl.float32)
    if AS_ON_CPU:
        largest = tl.max(tl.abs(x), axis=1)
        # fp32 explicitly: for Triton 3.6 a bare 1e-38 is a double
        least = tl.full((TILE,), 1e-38, tl.float32)
        inverse = tl.div_rn(tl.full((TILE,), 1.0, tl.float32), tl.maximum(largest, least))
    else:  # a block of zeros: 0 * infinity is above no bound, so code 0
        x = tl.where(tl.abs(x) < 1.1754943508222875e-38, 0.0, x)
        largest = tl.max(tl.abs(x), axis=1)
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [largest], dtype=tl.float32, is_pure=True, pack=1
        )
    tl.store(absmax + number, largest, mask=number < blocks)
    x = x * inverse[:, None]
    nibble = tl.zeros((TILE, BLOCK), tl.int32)
    for bound in tl.static_range(15):
        nibble += (x > tl.load(bounds + bound)).to(tl.int32)
    high, low = tl.split(tl.reshape(nibble, (TILE, BLOCK // 2, 2)))
    byte = number[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + byte, ((high << 4) | low).to(tl.uint8), mask=byte < (count + 1) // 2)


def reference(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Packed codes and fp32 scales, in plain torch."""
    flat = values.reshape(-1).float()
    blocks = -(-flat.numel() // blocksize)
    padded = torch.nn.functional.pad(flat, (0, blocks * blocksize - flat.numel())).view(blocks, blocksize)
    absmax = padded.abs().amax(dim=1)
    scaled = padded * (1.0 / absmax.clamp(min=_TINY))[:, None]
    nibbles = torch.bucketize(scaled.view(-1), bounds(values.device), out_int32=True)
    packed = (nibbles[::2] << 4 | nibbles[1::2]).to(torch.uint8)
    return packed[: (flat.numel() + 1) // 2].unsqueeze(1), absmax


@torch.library.custom_op("memplan::nf4_quantize", mutates_args=())
def nf4_quantize_op(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Packed codes [bytes, 1] and fp32 scales."""
    if where(values) is Runs.TORCH:
        return reference(values, blocksize)
    values = values.contiguous()
    packed, absmax = _outputs(values, blocksize)
    tile = max(_TILE // blocksize, 1)
    grid = (-(-absmax.numel() // tile),)
    tensors = values, bounds(values.device), packed, absmax
    sizes = values.numel(), absmax.numel()
    launch(_quantize, grid, values.device, *tensors, *sizes, BLOCK=blocksize, TILE=tile)
    return packed, absmax


@nf4_quantize_op.register_fake
def _(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return _outputs(values, blocksize)


def _outputs(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    count = values.numel()
    packed = values.new_empty(((count + 1) // 2, 1), dtype=torch.uint8)
    return packed, values.new_empty((-(-count // blocksize),), dtype=torch.float32)


def nf4_quantize(values: Tensor, blocksize: int = 64, *, double_quant: bool = False) -> tuple[Tensor, Any]:
    """``bitsandbytes.functional.quantize_4bit(values, quant_type="nf4")``: packed codes and their
    ``QuantState``.

    Raises KernelError for a dtype or a block size that bitsandbytes does not have.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    if values.dtype not in DTYPES:
        raise KernelError(f"NF4 is made of bfloat16, float16 or float32, not of {values.dtype}")
    if blocksize not in BLOCKSIZES:
        raise KernelError(f"bitsandbytes has no blocks of {blocksize} weights: {BLOCKSIZES}")
    packed, absmax = nf4_quantize_op(values, blocksize)
    offset = nested = None
    if double_quant:
        offset = absmax.mean()
        absmax, nested = quantize_blockwise(absmax - offset, blocksize=256)
    return packed, QuantState(
        absmax,
        shape=values.shape,
        dtype=values.dtype,
        blocksize=blocksize,
        code=get_4bit_type("nf4", device=values.device),
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
