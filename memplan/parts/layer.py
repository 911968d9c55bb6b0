"""Decoder layers, one function a family, in the words of transformers' modelling files (5.23).

A layer is played on a namespace of leaf modules, ``m["self_attn.q_proj"]`` and so on. Local variables
outlive their use exactly as they do in the library: that is part of the memory.
Shapes: B batch, S sequence, H heads, K key-value heads, D head size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from memplan.asked.recipe import Attention
from memplan.asked.spec import ModelSpec
from memplan.parts.experts import sparse_mlp
from memplan.shadow import ops
from memplan.shadow.attention import flash_attention, scaled_dot_product_attention
from memplan.shadow.matmul import matmul
from memplan.shadow.tensor import DType, Tensor, bool_, empty, float32, int64, state

Modules = dict[str, Any]


class Context(NamedTuple):
    """What every layer is given beside the hidden states."""

    spec: ModelSpec
    attn: Attention
    dtype: DType  # the load dtype
    cos_BSD: Tensor
    sin_BSD: Tensor
    mask: Tensor | None
    position_ids: Tensor  # not read, but kept alive: a checkpoint's closure holds all arguments
    sliding: bool
    cache: list[Tensor] | None  # keys and values that a DynamicCache keeps, or None without a cache
    router_logits: list[Tensor] | None  # what each layer's router said, where the loss asks for it


Layer = Callable[[Modules, Tensor, Context], Tensor]


# -- attention -------------------------------------------------------------------------------------


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x1 = ops.narrow_last(x, 0, half)
    x2 = ops.narrow_last(x, half, x.shape[-1])
    return ops.cat_last(ops.neg(x2), x1)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ops.add(ops.mul(x, cos), ops.mul(_rotate_half(x), sin))


def _rotary(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    batch, length, width = context.cos_BSD.shape
    cos = ops.view(context.cos_BSD, (batch, 1, length, width))
    sin = ops.view(context.sin_BSD, (batch, 1, length, width))
    if context.spec.model_type == "olmo2":
        # fp32 rotation, cast back at the end (modeling_olmo2.py, apply_rotary_pos_emb)
        q_dtype, k_dtype = q.dtype, k.dtype
        q_embed = _rope(q, cos, sin)
        k_embed = _rope(k, cos, sin)
        return ops.to(q_embed, q_dtype), ops.to(k_embed, k_dtype)
    if width < q.shape[-1] or context.spec.model_type == "phi3":
        q_rot, q_pass = ops.narrow_last(q, 0, width), ops.narrow_last(q, width, q.shape[-1])
        k_rot, k_pass = ops.narrow_last(k, 0, width), ops.narrow_last(k, width, k.shape[-1])
        q_embed = ops.cat_last(_rope(q_rot, cos, sin), q_pass)
        k_embed = ops.cat_last(_rope(k_rot, cos, sin), k_pass)
        return q_embed, k_embed
    q_embed = _rope(q, cos, sin)
    k_embed = _rope(k, cos, sin)
    return q_embed, k_embed


def _attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    """The attention interface: [B, H, S, D] to [B, S, H, D], and the weights that eager returns."""
    groups = q.shape[1] // k.shape[1]
    if context.attn is Attention.EAGER:
        return _eager(q, k, v, groups, context)
    if context.attn is Attention.FLASH:
        return ops.contiguous(ops.transpose(_flash(q, k, v, context), 1, 2)), None
    gqa = False
    if groups > 1:
        # use_gqa_in_sdpa: no mask, and a head size that the fused kernels support
        gqa = context.mask is None and k.shape[-1] <= 256
        if not gqa:
            k, v = _repeat_kv(k, groups), _repeat_kv(v, groups)
    causal = context.mask is None and q.shape[2] > 1
    out = scaled_dot_product_attention(q, k, v, context.mask, causal=causal, gqa=gqa)
    return ops.contiguous(ops.transpose(out, 1, 2)), None


def _flash(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """_flash_attention_forward: flash-attn knows grouped queries and windows itself, and computes in 16 bits
    (transformers/modeling_flash_attention_utils.py, get_target_dtype)."""
    if q.dtype is float32:
        q, k, v = (ops.to(x, state.autocast or context.dtype) for x in (q, k, v))
    _is_packed_sequence(context.position_ids, q.shape[0])
    return flash_attention(q, k, v, package=True)


def _is_packed_sequence(position_ids: Tensor, batch: int) -> None:
    """What looking for packed sequences costs for a moment (modeling_flash_attention_utils.py)."""
    if batch != 1 or position_ids.shape[0] == 1:
        return
    expected = empty(position_ids.shape, int64, "arange")
    least = empty((), int64, "min")
    expected = empty(position_ids.shape, int64, "add")
    del least
    difference = empty(position_ids.shape, int64, "sub")
    distance = empty(position_ids.shape, int64, "abs")
    del difference
    total = empty((), int64, "sum")
    del distance
    answer = empty((), bool_, "_to_copy")
    del total, expected, answer


def _repeat_kv(x: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return x
    batch, heads, length, width = x.shape
    wide = ops.expand(_unsqueeze_heads(x), (batch, heads, groups, length, width))
    return ops.reshape(wide, (batch, heads * groups, length, width))


def _unsqueeze_heads(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    return ops.view(x, (batch, heads, 1, length, width))


def _eager(q: Tensor, k: Tensor, v: Tensor, groups: int, context: Context) -> tuple[Tensor, Tensor]:
    key_states = _repeat_kv(k, groups)
    value_states = _repeat_kv(v, groups)
    attn_weights = ops.scale(matmul(q, ops.transpose(key_states, 2, 3)))
    if context.spec.attn_logit_softcapping is not None:
        attn_weights = ops.scale(attn_weights, "div")
        attn_weights = ops.result_activation("tanh", attn_weights)
        attn_weights = ops.scale(attn_weights)
    if context.mask is not None:
        attn_weights = ops.add(attn_weights, context.mask)
    attn_weights = ops.to(ops.softmax(attn_weights, float32), q.dtype)
    attn_weights = ops.dropout(attn_weights, context.spec.attention_dropout)
    attn_output = matmul(attn_weights, value_states)
    attn_output = ops.contiguous(ops.transpose(attn_output, 1, 2))
    return attn_output, attn_weights


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, H·D] to [B, H, S, D]."""
    return ops.transpose(ops.view(x, (*x.shape[:-1], x.shape[-1] // head_dim, head_dim)), 1, 2)


# Projections return queries, keys and values as [B, H, S, D].
Projection = Callable[[Modules, Tensor, ModelSpec], tuple[Tensor, Tensor, Tensor]]


def _plain(m: Modules, x: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Llama, Mistral, Qwen2, Gemma 2."""
    return (
        _heads(m["self_attn.q_proj"](x), spec.head_dim),
        _heads(m["self_attn.k_proj"](x), spec.head_dim),
        _heads(m["self_attn.v_proj"](x), spec.head_dim),
    )


def _qwen3(m: Modules, x: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Norms over each head before the heads are transposed."""

    def split(y: Tensor) -> Tensor:
        return ops.view(y, (*y.shape[:-1], y.shape[-1] // spec.head_dim, spec.head_dim))

    return (
        ops.transpose(m["self_attn.q_norm"](split(m["self_attn.q_proj"](x))), 1, 2),
        ops.transpose(m["self_attn.k_norm"](split(m["self_attn.k_proj"](x))), 1, 2),
        _heads(m["self_attn.v_proj"](x), spec.head_dim),
    )


def _gemma3(m: Modules, x: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Norms over each head after the heads are transposed."""
    q, k, v = _plain(m, x, spec)
    q = m["self_attn.q_norm"](q)
    k = m["self_attn.k_norm"](k)
    return q, k, v


def _olmo2_projection(m: Modules, x: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Norms over the whole projection."""
    q = m["self_attn.q_norm"](m["self_attn.q_proj"](x))
    k = m["self_attn.k_norm"](m["self_attn.k_proj"](x))
    v = m["self_attn.v_proj"](x)
    return _heads(q, spec.head_dim), _heads(k, spec.head_dim), _heads(v, spec.head_dim)


def _attention(m: Modules, x: Tensor, context: Context, project: Projection) -> tuple[Tensor, Tensor | None]:
    q, k, v = project(m, x, context.spec)
    state.tape.module = "self_attn"
    q, k = _rotary(q, k, context)
    k, v = _cached(k, v, context)
    out, weights = _attend(q, k, v, context)
    out = ops.view(out, (*out.shape[:2], out.shape[2] * out.shape[3]))
    out = m["self_attn.o_proj"](out)
    return out, weights


def _cached(k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """``past_key_values.update``: copies, where there is a cache."""
    if context.cache is None:
        return k, v
    if context.sliding:
        # DynamicSlidingWindowLayer moves its window, a number, to the card
        context.cache.append(empty((), int64, "_to_copy"))
    cached = ops.copy_into_cache(k, k.dtype), ops.copy_into_cache(v, k.dtype)
    context.cache.extend(cached)
    return cached


def _phi3_attention(m: Modules, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    """One projection, kept alive by its name until the end."""
    spec = context.spec
    qkv = m["self_attn.qkv_proj"](x)
    query_pos = spec.num_attention_heads * spec.head_dim
    key_pos = query_pos + spec.num_key_value_heads * spec.head_dim
    q = ops.narrow_last(qkv, 0, query_pos)
    k = ops.narrow_last(qkv, query_pos, key_pos)
    v = ops.narrow_last(qkv, key_pos, qkv.shape[-1])
    q, k, v = _heads(q, spec.head_dim), _heads(k, spec.head_dim), _heads(v, spec.head_dim)
    state.tape.module = "self_attn"
    q, k = _rotary(q, k, context)
    k, v = _cached(k, v, context)
    out, weights = _attend(q, k, v, context)
    out = ops.view(out, (*out.shape[:2], out.shape[2] * out.shape[3]))
    out = m["self_attn.o_proj"](out)
    return out, weights


# -- mlp -------------------------------------------------------------------------------------------


def _mlp(m: Modules, x: Tensor, context: Context) -> Tensor:
    if "mlp.experts" in m:
        return sparse_mlp(m, x, context.spec, context.router_logits)
    return m["mlp.down_proj"](_gated(_act(context.spec, m["mlp.gate_proj"](x)), m["mlp.up_proj"](x)))  # type: ignore[no-any-return]


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    state.tape.module = "mlp"
    return ops.mul(gate, up)


def _act(spec: ModelSpec, x: Tensor) -> Tensor:
    state.tape.module = "mlp"
    return ops.activation("silu" if spec.hidden_act in ("silu", "swish") else "gelu", x)


def _phi3_mlp(m: Modules, x: Tensor, context: Context) -> Tensor:
    up_states = m["mlp.gate_up_proj"](x)
    gate, up_states = ops.chunk_last(up_states)
    up_states = ops.mul(up_states, _act(context.spec, gate))
    return m["mlp.down_proj"](up_states)  # type: ignore[no-any-return]


# -- layers ----------------------------------------------------------------------------------------


def _residual(residual: Tensor, x: Tensor) -> Tensor:
    state.tape.module = ""
    return ops.add(residual, x)


def _llama_like(project: Projection) -> Layer:
    def layer(m: Modules, hidden: Tensor, context: Context) -> Tensor:
        residual = hidden
        hidden = m["input_layernorm"](hidden)
        hidden, _ = _attention(m, hidden, context, project)
        hidden = _residual(residual, hidden)
        residual = hidden
        hidden = m["post_attention_layernorm"](hidden)
        hidden = _mlp(m, hidden, context)
        hidden = _residual(residual, hidden)
        return hidden

    return layer


def _gemma_like(project: Projection) -> Layer:
    def layer(m: Modules, hidden: Tensor, context: Context) -> Tensor:
        residual = hidden
        hidden = m["input_layernorm"](hidden)
        hidden, _ = _attention(m, hidden, context, project)
        hidden = m["post_attention_layernorm"](hidden)
        hidden = _residual(residual, hidden)
        residual = hidden
        hidden = m["pre_feedforward_layernorm"](hidden)
        hidden = _mlp(m, hidden, context)
        hidden = m["post_feedforward_layernorm"](hidden)
        hidden = _residual(residual, hidden)
        return hidden

    return layer


def _olmo2(m: Modules, hidden: Tensor, context: Context) -> Tensor:
    residual = hidden
    hidden, _ = _attention(m, hidden, context, _olmo2_projection)
    hidden = m["post_attention_layernorm"](hidden)
    hidden = _residual(residual, hidden)
    residual = hidden
    hidden = _mlp(m, hidden, context)
    hidden = m["post_feedforward_layernorm"](hidden)
    hidden = _residual(residual, hidden)
    return hidden


def _phi3(m: Modules, hidden: Tensor, context: Context) -> Tensor:
    residual = hidden
    hidden = m["input_layernorm"](hidden)
    hidden, _weights = _phi3_attention(m, hidden, context)
    hidden = _residual(residual, ops.dropout(hidden, context.spec.resid_dropout))
    residual = hidden
    hidden = m["post_attention_layernorm"](hidden)
    hidden = _phi3_mlp(m, hidden, context)
    hidden = _residual(residual, ops.dropout(hidden, context.spec.resid_dropout))
    return hidden


FAMILIES: dict[str, Layer] = {
    "llama": _llama_like(_plain),
    "mistral": _llama_like(_plain),
    "mixtral": _llama_like(_plain),
    "qwen2": _llama_like(_plain),
    "qwen3": _llama_like(_qwen3),
    "qwen3_moe": _llama_like(_qwen3),
    "gemma2": _gemma_like(_plain),
    "gemma3_text": _gemma_like(_gemma3),
    "olmo2": _olmo2,
    "phi3": _phi3,
}

NORM_STYLE = {"gemma2": "gemma", "gemma3_text": "gemma", "olmo2": "olmo2"}
