"""Attention masks as transformers makes them (transformers/masking_utils.py, 5.23).

Nothing is padded here, so SDPA needs a mask only where a sliding window bites; eager always has one,
and flash attention never.
"""

from __future__ import annotations

from memplan.asked.recipe import Attention, Recipe
from memplan.asked.spec import ModelSpec
from memplan.shadow import ops
from memplan.shadow.tensor import DType, Tensor, bool_, empty, int64, state


def layer_type(spec: ModelSpec, index: int) -> str:
    """``full_attention`` or ``sliding_attention``."""
    return spec.layer_types[index] if spec.layer_types else "full_attention"


def needed(spec: ModelSpec, recipe: Recipe) -> dict[str, bool]:
    """For each type of layer that the model has, whether a mask is made (_ignore_causal_mask_sdpa)."""
    used = ["full_attention", "sliding_attention"]
    if spec.model_type not in ("gemma2", "gemma3_text"):  # those make both in any case
        used = [kind for kind in used if kind in (spec.layer_types or ("full_attention",))]
    window = spec.sliding_window
    bites = window is not None and recipe.seq_len >= window
    return {
        kind: recipe.attn is Attention.EAGER
        or (recipe.attn is Attention.SDPA and kind == "sliding_attention" and bites)
        for kind in used
    }


def make(spec: ModelSpec, recipe: Recipe, shape: tuple[int, int], dtype: DType) -> dict[str, Tensor | None]:
    """The masks of a batch of ``shape`` [B, S]: bool [B, 1, S, S] for SDPA, ``dtype`` for eager."""
    state.tape.module = "model"
    masks: dict[str, Tensor | None] = {}
    for kind, wanted in needed(spec, recipe).items():
        padding = empty(shape, bool_, "_to_copy")
        local = kind == "sliding_attention"
        if recipe.attn is Attention.EAGER:
            masks[kind] = _eager(shape, dtype, local)
        else:
            bites = local and wanted
            if recipe.attn is Attention.FLASH:
                _every_one()
            elif not bites:
                _all_ones(shape)
            masks[kind] = _boolean(shape, local) if wanted else None
        del padding
    return masks


def _all_ones(shape: tuple[int, int]) -> None:
    """fast_all(padding_mask): a sum and a comparison."""
    total = ops.count(shape)
    equal = empty((), bool_, "eq")
    del total, equal


def _every_one() -> None:
    """flash_attention_mask: ``attention_mask.all()``."""
    every = empty((), bool_, "all")
    del every


def _boolean(shape: tuple[int, int], local: bool) -> Tensor:
    """sdpa_mask without vmap: ``and_masks`` of the pattern and the padding, by broadcasting."""
    batch, length = shape
    square = (1, 1, length, length)
    ranges = [
        empty((batch,), int64, "arange"),
        empty((1,), int64, "arange"),
        _positions(length),
        _positions(length),
    ]
    result = empty((), bool_, "new_ones")
    pattern = _window(square) if local else empty(square, bool_, "le")
    result = _and(result, pattern, square)
    del pattern
    # CUDA's index makes its two indices alike first: each is copied that expanding has given a stride of zero
    # (TensorAdvancedIndexing.cpp ``make_info``)
    copies = (batch > 1) + (length > 1)
    expanded = [empty((batch, 1, 1, length), int64, "index") for _ in range(copies)]
    padding = empty((batch, 1, 1, length), bool_, "index")
    del expanded
    result = _and(result, padding, (batch, 1, length, length))
    del padding, ranges
    return result


def _positions(length: int) -> Tensor:
    arange = empty((length,), int64, "arange")
    positions = empty((length,), int64, "add")
    del arange
    return positions


def _window(square: tuple[int, ...]) -> Tensor:
    """sliding_window_causal_mask_function: a band, and below the diagonal."""
    result = empty((), bool_, "new_ones")
    shifted = empty((1, 1, square[-2], 1), int64, "sub")
    band = empty(square, bool_, "gt")
    del shifted
    result = _and(result, band, square)
    del band
    causal = empty(square, bool_, "le")
    result = _and(result, causal, square)
    return result


def _and(one: Tensor, two: Tensor, shape: tuple[int, ...]) -> Tensor:
    return empty(shape, bool_, "bitwise_and")


def _eager(shape: tuple[int, int], dtype: DType, local: bool) -> Tensor:
    """eager_mask: zero where attended, the dtype's minimum elsewhere."""
    mask = _boolean(shape, local)
    zero = empty((), dtype, "zeros")
    minimum = empty((), dtype, "scalar_tensor")
    additive = empty(mask.shape, dtype, "where")
    del zero, minimum, mask
    return additive
