"""What Qwen's towers have in common: how images are resized, and what is worked out on the card of their
sizes (transformers 5.23, models/qwen2_vl/image_processing_qwen2_vl.py and vision_utils.py)."""

from __future__ import annotations

from math import ceil, floor, sqrt
from typing import Any

from memplan.asked.fields import Fields
from memplan.errors import RecipeError, shown
from memplan.shadow.tensor import Tensor, empty, float32, int32, int64
from memplan.towers import Fed, Grid, Pictures, places

_SLIMMEST = 200  # sides of an image, one by the other


def grid(width: int, height: int, patch: int, merge: int, least: int, most: int) -> Grid:
    """``smart_resize``: sides are multiples of a token's, and pixels within bounds. Raises RecipeError."""
    if max(width, height) > _SLIMMEST * min(width, height):
        raise RecipeError(
            f"an image of {width}x{height} pixels is more than {_SLIMMEST} times as long as it is wide, "
            "which its processor refuses: give another --image-size"
        )
    side = patch * merge
    rows, columns = round(height / side), round(width / side)
    if rows * columns * side * side > most:
        by = sqrt(height * width / most)
        rows, columns = (max(1, floor(size / by / side)) for size in (height, width))
    elif rows * columns * side * side < least:
        by = sqrt(least / (height * width))
        rows, columns = (ceil(size * by / side) for size in (height, width))
    return Grid(rows * merge, columns * merge, rows * columns)


def batch(seen: Pictures, length: int) -> dict[str, Fed]:
    """``Qwen2VLImageProcessor`` and the processor's types of tokens."""
    vision, image = seen.vision, seen.grid
    width = vision.channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "mm_token_type_ids": Fed((seen.sequences, length), "int64", [places(seen, length)] * seen.sequences),
        "pixel_values": Fed((seen.patches, width), "float32"),
        "image_grid_thw": Fed((seen.number, 3), "int64", [[1, image.rows, image.columns]] * seen.number),
    }


def common(fields: Fields, hidden: int, out: str) -> dict[str, Any]:
    """What all of them say of a tower before a decoder so wide, which ``out`` must be."""
    width, heads = fields.size("hidden_size"), fields.size("num_heads")
    if width % (4 * heads):
        fields.fail(
            f"its tower's hidden_size ({width}) must be a multiple of four times num_heads ({heads}), for "
            "rows and columns are rotated apart"
        )
    if fields.size(out) != hidden:
        fields.fail(f"its tower's {out} is {fields.size(out)}, but the decoder's hidden_size is {hidden}")
    activation = fields.get("hidden_act")
    if activation not in ("gelu_pytorch_tanh", "gelu", "silu"):
        fields.fail(
            f"its tower's hidden_act is {shown(activation)}, but it must be gelu_pytorch_tanh, gelu or silu"
        )
    return {
        "hidden_size": width,
        "num_heads": heads,
        "intermediate_size": fields.size("intermediate_size"),
        "hidden_act": activation,
        "channels": fields.size("in_channels", most=64),
        "patch_size": fields.size("patch_size", most=1 << 10),
        "merge_size": fields.size("spatial_merge_size", most=64),
        "out_hidden_size": hidden,
    }


# -- on the card ------------------------------------------------------------------------------------------


def repeat_interleave(shape: tuple[int, ...], count: int) -> Tensor:
    """``torch.repeat_interleave(x, repeats)``: running sums of these, places, and what lies there."""
    sums = empty(shape, int64, "cumsum")
    index = empty((count,), int64, "repeat_interleave")
    del sums
    out = empty((count,), int64, "index_select")
    del index
    return out


def cumulative_lengths(seen: Pictures) -> Tensor:
    """``get_vision_cu_seqlens``: where each image's patches end."""
    images = (seen.number,)
    product = empty(images, int64, "mul")
    lengths = repeat_interleave(images, seen.number)
    del product
    converted = empty(images, int32, "_to_copy")
    sums = empty(images, int32, "cumsum")
    del converted
    out = empty((seen.number + 1,), int32, "constant_pad_nd")
    del sums, lengths
    return out


def position_ids(seen: Pictures) -> Tensor:
    """``get_vision_position_ids``: a row and a column of each patch."""
    merge = empty((1,), int64, "_to_copy")
    found = []
    hpos_ids: Tensor | None = None
    wpos_ids: Tensor | None = None
    for _ in range(seen.number):
        h = empty((seen.grid.rows,), int64, "arange")
        w = empty((seen.grid.columns,), int64, "arange")
        hpos_ids = wpos_ids = None
        hpos_ids = empty((seen.grid.patches,), int64, "clone")
        del h
        wpos_ids = empty((seen.grid.patches,), int64, "clone")
        del w
        stacked = empty((seen.grid.patches, 2), int64, "stack")
        found.append(empty((seen.grid.patches, 2), int64, "repeat"))
        del stacked
    out = empty((seen.patches, 2), int64, "cat")
    del merge, hpos_ids, wpos_ids
    return out


def interpolation(seen: Pictures) -> tuple[Tensor, Tensor]:
    """``get_vision_interpolation_indices_and_weights``: of each patch the four nearest places of the grid of
    positions, and how much each counts. Names live until it returns."""
    images, patches = (seen.number,), (seen.patches,)

    def each(operation: str) -> Tensor:
        return empty(patches, int64, operation)

    counts = empty(images, int64, "mul")
    counts = empty(images, int64, "mul")
    heights = repeat_interleave(images, seen.patches)
    widths = repeat_interleave(images, seen.patches)
    sums = empty(images, int64, "cumsum")
    padded = empty(images, int64, "constant_pad_nd")
    del sums
    starts = repeat_interleave(images, seen.patches)
    del padded
    total = empty((), int64, "sum")
    arange = each("arange")
    del total
    passed = each("sub")
    del arange
    area = each("mul")
    within = each("remainder")
    del passed, area
    blocks_w = each("floor_divide")
    in_col = each("remainder")
    rows = each("floor_divide")
    in_row = each("remainder")
    del rows
    rows = each("floor_divide")
    block_col = each("remainder")
    del rows
    wide = each("mul")
    block_row = each("floor_divide")
    del wide
    row = _merged(patches)
    col = _merged(patches)
    h_taps, h_weights = _taps(patches)
    w_taps, w_weights = _taps(patches)
    wide = empty((seen.patches, 2, 1), int64, "mul")
    indices = empty((seen.patches, 4), int64, "add")
    del wide
    weights = empty((seen.patches, 4), float32, "mul")
    del counts, heights, widths, starts, within, blocks_w, in_col, in_row, block_col, block_row, row, col
    del h_taps, h_weights, w_taps, w_weights
    return indices, weights


def _merged(patches: tuple[int]) -> Tensor:
    wide = empty(patches, int64, "mul")
    out = empty(patches, int64, "add")
    del wide
    return out


def _taps(patches: tuple[int]) -> tuple[Tensor, Tensor]:
    """``_interpolation_axis_taps_weights``."""
    pair = (*patches, 2)
    index = empty(patches, float32, "_to_copy")
    scaled = empty(patches, float32, "mul")
    less = empty(patches, int64, "sub")
    least = empty(patches, int64, "clamp")
    del less
    src = empty(patches, float32, "div")
    del scaled, least
    floored = empty(patches, float32, "floor")
    offsets = empty((2,), int64, "arange")
    whole = empty(patches, int64, "_to_copy")
    raw_taps = empty(pair, int64, "add")
    del whole
    taps = empty(pair, int64, "clamp")
    apart = empty(patches, float32, "sub")
    signed = empty(pair, float32, "sub")
    del apart
    distance = empty(pair, float32, "abs")
    del signed
    share = empty(pair, float32, "rsub")
    weights = empty(pair, float32, "clamp")
    del share, index, src, floored, offsets, raw_taps, distance
    return taps, weights


def image_sizes(seen: Pictures) -> Tensor:
    """``image_grid_thw.prod(-1) // merge_size**2``."""
    product = empty((seen.number,), int64, "prod")
    out = empty((seen.number,), int64, "floor_divide")
    del product
    return out


def lengths(seen: Pictures) -> Tensor:
    """``cu_seqlens[1:] - cu_seqlens[:-1]``."""
    return empty((seen.number,), int32, "sub")
