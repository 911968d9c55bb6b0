"""Rotary embeddings: the tables, and the rotation (transformers 5.23, ``modeling_*.py``)."""

from __future__ import annotations

from collections.abc import Callable

from memplan.asked.spec import ModelSpec
from memplan.parts.context import Context
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, bool_, empty, float32, int64

Rotate = Callable[[Tensor, Tensor, Context], tuple[Tensor, Tensor]]  # of queries and keys


def cos_sin(spec: ModelSpec, length: int, hidden: Tensor, *, cast: bool = True) -> tuple[Tensor, Tensor]:
    """The rotary embedding's forward; ``cast``: to the dtype of the hidden states."""
    width = int(spec.head_dim * spec.partial_rotary_factor)
    if spec.longrope:
        _choose_frequencies(width)
    position = empty((1, length, 1), float32, "_to_copy")
    freqs = empty((1, length, width // 2), float32, "mul")
    del position
    emb = empty((1, length, width), float32, "cat")
    cos = ops.scale(ops.pointwise("cos", emb))
    sin = ops.scale(ops.pointwise("sin", emb))
    if not cast:
        return cos, sin
    cos_out = ops.to(cos, hidden.dtype)
    sin_out = ops.to(sin, hidden.dtype)
    del freqs, emb
    return cos_out, sin_out


def of_three_grids(spec: ModelSpec, length: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """``Qwen3VLTextRotaryEmbedding.forward``, and that of Qwen3.5: tables for time, rows and columns
    [3, B, S, D / 2], columns of which are put together in one; those of a text are all alike."""
    batch, width = hidden.shape[0], int(spec.head_dim * spec.partial_rotary_factor)
    grids = (3, batch, length)
    positions = empty((*grids, 1), float32, "_to_copy")
    freqs = empty((*grids, width // 2), float32, "mul")
    del positions
    cos = ops.scale(ops.pointwise("cos", freqs))
    sin = ops.scale(ops.pointwise("sin", freqs))
    sin = empty((batch, length, width), float32, "cat")
    cos = empty((batch, length, width), float32, "cat")
    cos_out = ops.to(cos, hidden.dtype)
    sin_out = ops.to(sin, hidden.dtype)
    del freqs
    return cos_out, sin_out


def _choose_frequencies(width: int) -> None:
    """longrope's table for short or long sequences (modeling_rope_utils.py, longrope_frequency_update)."""
    longest = empty((), int64, "max")
    length = empty((), int64, "add")
    del longest
    is_long = empty((), bool_, "gt")
    frequencies = empty((width // 2,), float32, "where")  # copied into the buffer
    del is_long, length, frequencies


def rotate(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb`` of whole heads."""
    cos, sin = tables(context)
    q_embed = rope(q, cos, sin)
    k_embed = rope(k, cos, sin)
    return q_embed, k_embed


def rotate_part(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb`` of the first columns of heads, and the rest put behind."""
    cos, sin = tables(context)
    width = cos.shape[-1]
    q_rot, q_pass = ops.narrow_last(q, 0, width), ops.narrow_last(q, width, q.shape[-1])
    k_rot, k_pass = ops.narrow_last(k, 0, width), ops.narrow_last(k, width, k.shape[-1])
    q_embed = rope(q_rot, cos, sin)
    k_embed = rope(k_rot, cos, sin)
    q_embed = ops.cat_last(q_embed, q_pass)
    k_embed = ops.cat_last(k_embed, k_pass)
    return q_embed, k_embed


def rotate_pairs(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb`` of neighbouring columns, in fp32."""
    dtype = q.dtype
    q, k = ops.to(q, float32), ops.to(k, float32)
    cos, sin = tables(context)
    q_embed = ops.add(ops.mul(q, cos), ops.mul(_rotate_neighbours(q), sin))
    k_embed = ops.add(ops.mul(k, cos), ops.mul(_rotate_neighbours(k), sin))
    return ops.to(q_embed, dtype), ops.to(k_embed, dtype)


def rotate_interleaved(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb_interleave``: neighbouring columns are turned, and laid apart."""
    cos_BSD, sin_BSD = context.cos_BSD, context.sin_BSD
    batch, length, width = cos_BSD.shape
    shape = (batch, 1, length, width // 2)
    cos = ops.view(ops.narrow_last(cos_BSD, 0, width // 2), shape)
    sin = ops.view(ops.narrow_last(sin_BSD, 0, width // 2), shape)
    q1, q2 = ops.every_second(q, 0), ops.every_second(q, 1)
    k1, k2 = ops.every_second(k, 0), ops.every_second(k, 1)
    q_embed = _turn(q1, q2, cos, sin)
    k_embed = _turn(k1, k2, cos, sin)
    return q_embed, k_embed


def _turn(x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first = ops.sub(ops.mul(x1, cos), ops.mul(x2, sin))
    return ops.cat_last(first, ops.add(ops.mul(x2, cos), ops.mul(x1, sin)))


def _rotate_neighbours(x: Tensor) -> Tensor:
    x1, x2 = ops.every_second(x, 0), ops.every_second(x, 1)
    return ops.interleave(ops.neg(x2), x1)


def tables(context: Context) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, S, D]."""
    batch, length, width = context.cos_BSD.shape
    cos = ops.view(context.cos_BSD, (batch, 1, length, width))
    sin = ops.view(context.sin_BSD, (batch, 1, length, width))
    return cos, sin


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ops.add(ops.mul(x, cos), ops.mul(_rotate_half(x), sin))


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x1 = ops.narrow_last(x, 0, half)
    x2 = ops.narrow_last(x, half, x.shape[-1])
    return ops.cat_last(ops.neg(x2), x1)
