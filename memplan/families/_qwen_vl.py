"""What the decoders of Qwen's models that see have in common: three positions a token, worked out on the
card of where its images lie, and their rotary tables (transformers 5.23, models/qwen3_vl)."""

from __future__ import annotations

from memplan.shadow import ops
from memplan.shadow.images import Mask, masked_scatter
from memplan.shadow.indexing import by_mask, nonzero
from memplan.shadow.tensor import Shape, Tensor, bool_, empty, float32, int64
from memplan.towers import Grid, Pictures


def stays(sequences: int) -> dict[str, Shape]:
    """``rope_deltas``, until there are new ones."""
    return {"rope_deltas": (sequences, 1)}


def placed(held: list[Tensor], tokens: Tensor, seen: Pictures) -> tuple[Mask, Tensor]:
    """``get_placeholder_mask``, and the images' embeddings put in their places; the masks of images, and of
    videos, whose name stays."""
    embeds = held.pop()
    image_mask = Mask(empty(embeds.shape[:2], bool_, "eq"), seen.tokens)
    video_mask = empty(embeds.shape[:2], bool_, "eq")
    image_count = ops.count(embeds.shape[:2])
    wanted = empty((), int64, "mul")
    equal = empty((), bool_, "eq")
    del wanted
    every = empty((), bool_, "_is_all_true")
    del equal, every
    video_count = ops.count(embeds.shape[:2])
    del image_count, video_count
    held.append(masked_scatter(embeds, image_mask, tokens))
    return image_mask, video_mask


def positions(ids: Tensor, types: Tensor, seen: Pictures) -> tuple[Tensor, Tensor]:
    """``get_rope_index``: positions [3, B, S], and how far each sequence's run ahead. Names live until they
    are given another value, or it returns."""
    batch, length = ids.shape
    position_ids = empty((3, batch, length), int64, "zeros")
    deltas = []
    current_input_ids: Tensor | None = None
    input_token_type: Tensor | None = None
    for _ in range(batch):
        current_input_ids = input_token_type = None  # rows of the batch
        current_input_ids = _counted(ids, length)
        input_token_type = _counted(types, length)
        position = None  # a number of the host's, until an image ends
        parts = []
        for _ in range(seen.each):
            parts.append(_text(1))
            vision_position_ids = _image(seen.grid, seen.vision.merge_size)
            parts.append(vision_position_ids)
            position = _behind_image(position)
        parts.append(_text(length - seen.each * (seen.grid.tokens + 1)))
        llm_positions = empty((3, length), int64, "cat")
        chosen = empty((length,), bool_, "_to_copy")
        indices = nonzero(1, length, "index_put_")
        del indices, chosen
        longest = empty((), int64, "max")
        ahead = empty((), int64, "add")
        del longest
        deltas.append(empty((), int64, "sub"))
        del ahead
    rope_deltas = empty((batch, 1), int64, "_to_copy")
    del current_input_ids, input_token_type, parts, vision_position_ids, llm_positions, deltas
    del position
    return position_ids, rope_deltas


def _counted(row: Tensor, length: int) -> Tensor:
    """``row[attention_mask.bool()]``."""
    chosen = empty((length,), bool_, "_to_copy")
    return by_mask(row.viewed((length,)), chosen, length)


def _text(length: int) -> Tensor:
    arange = empty((length,), int64, "arange")
    return ops.pointwise("add", arange.viewed((3, length), (0, 1)))


def _image(grid: Grid, merge: int) -> Tensor:
    """``get_vision_position_ids``: time, row and column of each token."""
    arange = empty((1,), int64, "arange")
    scaled = empty((1,), float32, "mul")
    del arange
    position_temporal = empty((1,), int64, "_to_copy")
    del scaled
    arange = empty((grid.rows // merge,), int64, "arange")
    position_height = ops.pointwise("add", arange)
    del arange
    arange = empty((grid.columns // merge,), int64, "arange")
    position_width = ops.pointwise("add", arange)
    del arange
    out = empty((3, grid.tokens), int64, "stack")
    del position_temporal, position_height, position_width
    return out


def _behind_image(position: Tensor | None) -> Tensor:
    """``current_pos += max(rows, columns) // merge``."""
    greater = empty((), bool_, "gt")
    del greater
    longer = empty((), int64, "floor_divide")
    return ops.pointwise("add", longer) if position is None else position
