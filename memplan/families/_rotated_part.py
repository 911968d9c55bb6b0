"""Attention whose forward rotates a part of each head itself, and so keeps what it rotated until it ends
(transformers 5.23, models/stablelm and phi)."""

from __future__ import annotations

from memplan.parts.context import Context, Leaves
from memplan.parts.layer import Project, cached
from memplan.parts.rotary import rope, tables
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, state


def attention(
    m: Leaves, x: Tensor, context: Context, project: Project, output: str
) -> tuple[Tensor, Tensor | None]:
    """``output``: the name of the last projection."""
    q, k, v = project(m, x, context.spec)
    state.tape.module = "self_attn"
    cos, sin = tables(context)
    width = cos.shape[-1]
    query_rot, query_pass = ops.narrow_last(q, 0, width), ops.narrow_last(q, width, q.shape[-1])
    key_rot, key_pass = ops.narrow_last(k, 0, width), ops.narrow_last(k, width, k.shape[-1])
    query_rot, key_rot = rope(query_rot, cos, sin), rope(key_rot, cos, sin)
    q = ops.cat_last(query_rot, query_pass)
    k = ops.cat_last(key_rot, key_pass)
    k, v = cached(k, v, context)
    out, weights = context.attend(q, k, v, context)
    out = ops.view(out, (*out.shape[:2], out.shape[2] * out.shape[3]))
    out = m[output](out)
    return out, weights
