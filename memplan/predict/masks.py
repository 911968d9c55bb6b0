"""Attention masks, one for each kind of layer (transformers/masking_utils.py, 5.23)."""

from __future__ import annotations

from memplan import attention, families
from memplan.asked.recipe import Batches, Recipe
from memplan.asked.spec import ModelSpec
from memplan.shadow.tensor import DType, Tensor, bool_, empty, int64, state


def layer_type(spec: ModelSpec, index: int) -> str:
    """``full_attention``, ``sliding_attention`` or ``linear_attention``."""
    return spec.layer_types[index] if spec.layer_types else "full_attention"


def is_rotated(spec: ModelSpec, index: int) -> bool:
    """Whether a layer turns its queries and keys."""
    return not spec.rotated_layers or spec.rotated_layers[index]


def needed(spec: ModelSpec, recipe: Recipe) -> dict[str, bool]:
    """For each type of layer that the model has, whether a mask is made."""
    masked = attention.of(recipe).masked
    return {kind: masked(bites, recipe.batches) for kind, bites in _bites(spec, recipe).items()}


def _bites(spec: ModelSpec, recipe: Recipe) -> dict[str, bool]:
    """For each type of layer, whether it has a window that is shorter than the sequence."""
    used = ["full_attention", "sliding_attention"]
    if "linear_attention" in spec.layer_types:
        used = ["full_attention"]  # even if no layer has it
    elif not families.find(spec.model_type).makes_both_masks:
        used = [kind for kind in used if kind in (spec.layer_types or ("full_attention",))]
    window = spec.sliding_window
    bites = window is not None and recipe.seq_len >= window
    return {kind: kind == "sliding_attention" and bites for kind in used}


def make(spec: ModelSpec, recipe: Recipe, dtype: DType, padding: Tensor | None) -> dict[str, Tensor | None]:
    """The masks of a batch [B, S], of a recipe as it is fed: bool [B, 1, S, S] for SDPA, ``dtype`` for
    eager. ``padding``: the batch's own mask [B, S], if it has one."""
    state.tape.module = "model"
    masks: dict[str, Tensor | None] = {}
    for kind, bites in _bites(spec, recipe).items():
        masks[kind] = _mask(spec, recipe, dtype, kind == "sliding_attention", bites)
    if "linear_attention" in spec.layer_types:
        masks["linear_attention"] = _recurrent(padding, recipe.batches)
    return masks


def _mask(spec: ModelSpec, recipe: Recipe, dtype: DType, local: bool, bites: bool) -> Tensor | None:
    shape = (recipe.batch_size, recipe.seq_len)
    batches: Batches | None = recipe.batches
    told = None
    if batches is not Batches.PACKED:
        told = empty(shape, bool_, "_to_copy")
    elif families.find(spec.model_type).masks_of_positions:
        told = _sequence_indices(shape[1])
    else:
        batches = None
    mask = attention.of(recipe).mask(shape, dtype, local, bites, batches)
    del told
    return mask


def _recurrent(padding: Tensor | None, batches: Batches) -> Tensor | None:
    """``create_recurrent_attention_mask``: the batch's own mask, unless it is all ones or of one token."""
    if padding is None or padding.shape[1] == 1:
        return None
    ones = empty(padding.shape, bool_, "eq")
    every = empty((), bool_, "all")
    del ones, every
    return padding if batches is Batches.PADDED else None


def _sequence_indices(length: int) -> Tensor:
    """``find_packed_sequence_indices``: which sequence each position of the row belongs to."""
    row = (1, length)
    first = empty((1, 1), int64, "sub")
    longer = empty((1, length + 1), int64, "cat")
    differences = empty(row, int64, "sub")
    del longer
    begins = empty(row, bool_, "ne")
    counted = empty(row, int64, "_to_copy")
    indices = empty(row, int64, "cumsum")
    del counted, begins
    zero = empty((1,), bool_, "eq")
    every = empty((), bool_, "all")
    del zero, every, first, differences
    return indices
