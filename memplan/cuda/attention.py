"""``scaled_dot_product_attention`` on CUDA: the choice of kernel, and what each takes beside its results.

Sources: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, cuda/flash_attn/flash_api.cpp,
cuda/mem_eff_attention/kernel_{forward,backward}.h (the headers as installed with torch 2.13), and
cudnn_frontend node/scaled_dot_product_flash_attention.h. Shapes: B batch, H heads, S positions, D head
dimension.
"""

from __future__ import annotations

from typing import Literal

from memplan.cuda.card import FLASH_CAPABILITY, Card

Kernel = Literal["flash", "efficient", "cudnn", "math"]

_FLASH_MAX_HEAD_DIM = 256


def up(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def kernel(
    card: Card,
    dtype: str,
    head_dim: int,
    value_dim: int,
    *,
    keys: int,
    masked: bool,
    grouped: bool,
    gqa: bool,
) -> Kernel:
    """``select_sdp_backend``, of tensors whose rows are contiguous, when gradients are wanted.

    ``dtype`` as torch calls it; ``grouped``: fewer key heads than query heads, which ``gqa`` (``enable_gqa``)
    allows.
    """
    half = dtype in ("float16", "bfloat16")
    if grouped and not gqa:
        return "math"
    # check_prefer_cudnn_attention: first on 9.0 and 10.x with cuDNN > 9.15.0, which the wheels carry
    prefers_cudnn = card.cudnn_attention and card.capability[0] in (9, 10)
    if prefers_cudnn and half and head_dim <= 128 and head_dim % 8 == 0 and keys > 1:
        return "cudnn"
    ampere = card.capability >= FLASH_CAPABILITY
    if ampere and half and not masked and value_dim == head_dim <= _FLASH_MAX_HEAD_DIM:
        # check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120
        if head_dim <= 192 or head_dim > 224 or card.capability in ((8, 0), (9, 0), (10, 0)):
            return "flash"
    # use_mem_efficient_attention: no bfloat16 before Ampere
    if not ampere and dtype == "bfloat16":
        return "math"
    # check_head_dim_size_mem_efficient: 128-bit loads; no grouped queries (supports_gqa is false in 2.13)
    alignment = 8 if half else 4
    if not grouped and head_dim % alignment == 0 and value_dim % alignment == 0:
        return "efficient"
    return "math"


# -- flash -----------------------------------------------------------------------------------------------


def rounded_head(head_dim: int) -> int:
    """The width of fp32 accumulators."""
    return up(head_dim, 32 if head_dim <= 128 else 64)


def key_splits(card: Card, rows: int, length: int, keys: int, head_dim: int) -> int:
    """``num_splits_heuristic``: into how many parts keys are split to fill the card.

    ``rows`` are batch times heads. The fewest splits within 85 % of the best use of the card; more than
    enough blocks need none.
    """
    processors = 2 * card.multiprocessors
    blocks = rows * -(-length // 64)
    if blocks >= 0.8 * processors:
        return 1
    parts = -(-keys // (256 if head_dim <= 64 else 128 if head_dim <= 128 else 64))
    used = {}
    for splits in range(1, min(128, processors, parts) + 1):
        if splits == 1 or -(-parts // splits) != -(-parts // (splits - 1)):
            waves = blocks * splits / processors
            used[splits] = waves / -(-blocks * splits // processors)
    best = max(used.values())
    return next(splits for splits, share in used.items() if share >= 0.85 * best)


def split_accumulators(
    card: Card, batch: int, heads: int, length: int, keys: int, head_dim: int
) -> tuple[int, ...]:
    """``set_params_splitkv``: bytes of the log-sum-exps and fp32 sums of each part of the keys, if split."""
    splits = key_splits(card, batch * heads, length, keys, head_dim)
    if splits == 1:
        return ()
    rows = 4 * splits * batch * heads * length
    return rows, rows * rounded_head(head_dim)


def flash_backward(batch: int, heads: int, length: int, head_dim: int) -> tuple[int, int]:
    """``mha_bwd``: bytes of fp32 row sums, and of a fp32 accumulator of dq."""
    rows = 4 * batch * heads * up(length, 128)
    return rows, rows * rounded_head(head_dim)


# -- memory-efficient ------------------------------------------------------------------------------------


def efficient_accumulates(dtype: str, head_dim: int, value_dim: int) -> bool:
    """Whether 16-bit outputs are accumulated in fp32 in global memory (kernel_forward.h
    ``kNeedsOutputAccumulatorBuffer``), of the kernel for the wider of both."""
    return max(head_dim, value_dim) > 128 and dtype != "float32"


def efficient_workspace(
    card: Card, rows: int, length: int, keys: int, head_dim: int, value_dim: int, half: bool
) -> int:
    """kernel_backward.h ``workspace_size``, of the kernel that cutlassB.h's list gives from sm80 on. ``rows``
    are batch times heads.

    Tiles of fp32 for dq (GradQTempStorage), each with 16 bytes of lock, counter and padding, wanted because
    keys may be split; and where dk and dv do not stay in registers, a pair of tiles for each split.
    """
    tile_rows = tile_columns = 64
    registers = False
    widest = max(head_dim, value_dim)
    # Whether the 128-row kernels' shared memory fits: taken to on sm80 and sm90, not on sm86 and sm89, whose
    # blocks have 99 KiB (the kernels' own sizes are known to the CUDA compiler only).
    large = card.shared_memory > 102_400
    if half:
        if widest <= 64:
            registers = True
        elif widest <= 96 and card.capability in ((8, 6), (8, 9)):
            tile_rows, registers = 128, True
        elif widest <= 128 and large:
            tile_rows = tile_columns = 128
            registers = True
        elif widest > 128 and large:
            tile_rows = 128
    elif widest > 64 and large:
        tile_rows = 128
    tile = tile_rows * tile_columns + 4
    elements = -(-length // tile_rows) * -(-head_dim // tile_columns) * tile
    if half and not registers:
        splits = max(1, min(-(-keys // tile_columns), 200 // rows))
        elements += splits * tile_columns * (up(head_dim, tile_rows) + up(value_dim, tile_rows))
    return rows * up(elements, 4) * 4


# -- cuDNN -----------------------------------------------------------------------------------------------


def cudnn_backward(
    itemsize: int, batch: int, heads: int, key_heads: int, length: int, keys: int, head_dim: int
) -> int:
    """The workspace that cudnn_frontend asks for (``CompositeSDPABackwardNode``): a fp32 accumulator of dq
    and fp32 row sums. What grouped queries need (dk and dv of every query head, virtual there) is an
    estimate; what forward asks for is not known here."""
    nbytes = 4 * batch * heads * length * (head_dim + 1)
    if key_heads != heads:
        nbytes += 2 * itemsize * batch * heads * keys * head_dim
    return nbytes
