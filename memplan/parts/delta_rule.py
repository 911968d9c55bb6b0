"""Linear attention by the gated delta rule, as transformers' own code runs it where flash-linear-attention
and causal-conv1d are not installed (transformers 5.23, models/qwen3_5, ``Qwen3_5GatedDeltaNet``,
``torch_chunk_gated_delta_rule``).

Shapes: B batch, S tokens, H heads, K key size, V value size, C chunks, T tokens of a chunk, D channels.
"""

from __future__ import annotations

from memplan.asked.spec import ModelSpec
from memplan.parts.context import Context, Leaves
from memplan.parts.module import Module, Modules, linear, norm
from memplan.parts.norms import RMSNorm
from memplan.shadow import ops
from memplan.shadow.matmul import matmul
from memplan.shadow.recurrent import (
    copied_into,
    cumsum_last,
    depthwise_conv1d,
    exp,
    masked_fill,
    pad,
    pad_before,
    repeat_interleave,
    select,
    solve_triangular,
    split_last,
    strictly_upper,
    to_contiguous,
    write,
)
from memplan.shadow.tensor import Tensor, empty, float32, state
from memplan.shadow.turns import Turns

_CHUNK = 64  # tokens


def widths(spec: ModelSpec) -> tuple[int, int]:
    """Of all keys together, and of all values."""
    return spec.linear_key_heads * spec.linear_key_dim, spec.linear_value_heads * spec.linear_value_dim


def modules(spec: ModelSpec) -> Modules:
    hidden, heads = spec.hidden_size, spec.linear_value_heads
    key, value = widths(spec)
    channels = 2 * key + value
    return {
        "linear_attn": Module("raw", {"dt_bias": (heads,), "A_log": (heads,)}),
        "linear_attn.conv1d": Module("raw", {"weight": (channels, 1, spec.linear_conv_kernel)}),
        "linear_attn.norm": norm(spec.linear_value_dim),
        "linear_attn.out_proj": linear(value, hidden),
        "linear_attn.in_proj_qkv": linear(hidden, channels),
        "linear_attn.in_proj_z": linear(hidden, value),
        "linear_attn.in_proj_b": linear(hidden, heads),
        "linear_attn.in_proj_a": linear(hidden, heads),
    }


class GatedNorm(RMSNorm):
    """``Qwen3_5RMSNormGated``: the gate's silu comes last, in fp32."""

    __slots__ = ()

    def __call__(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        assert gate is not None
        state.tape.module = self.name
        dtype = x.dtype
        x = ops.to(x, float32)
        variance = ops.mean_last(ops.square(x))
        x = ops.mul(x, ops.rsqrt(ops.shift(variance)))
        x = ops.mul(self.weight, ops.to(x, dtype))
        x = ops.mul(x, ops.activation("silu", ops.to(gate, float32)))
        return ops.to(x, dtype)


def delta_net(m: Leaves, hidden_states: Tensor, context: Context) -> Tensor:
    """``Qwen3_5GatedDeltaNet.forward``."""
    spec = context.spec
    key_width, value_width = widths(spec)
    batch, length, _ = hidden_states.shape
    state.tape.module = "linear_attn"
    if context.mask is not None:
        hidden_states = ops.mul(hidden_states, ops.view(context.mask, (batch, length, 1)))
    mixed_qkv = ops.transpose(m["linear_attn.in_proj_qkv"](hidden_states), 1, 2)
    z = m["linear_attn.in_proj_z"](hidden_states)
    z = ops.view(z, (batch, length, spec.linear_value_heads, spec.linear_value_dim))
    b = m["linear_attn.in_proj_b"](hidden_states)
    a = m["linear_attn.in_proj_a"](hidden_states)
    state.tape.module = "linear_attn"
    if context.cache is not None:
        mixed_qkv = _cached_for_conv(mixed_qkv, context.cache, spec.linear_conv_kernel)
    mixed_qkv = _causal_conv(mixed_qkv, m["linear_attn.conv1d"]["weight"], spec)
    if context.cache is not None:
        mixed_qkv = ops.narrow(mixed_qkv, (*mixed_qkv.shape[:-1], length))  # [:, :, -length:]
    mixed_qkv = ops.transpose(mixed_qkv, 1, 2)
    query, key, value = split_last(mixed_qkv, key_width, key_width, value_width)
    query = ops.reshape(query, (batch, length, spec.linear_key_heads, spec.linear_key_dim))
    key = ops.reshape(key, (batch, length, spec.linear_key_heads, spec.linear_key_dim))
    value = ops.reshape(value, (batch, length, spec.linear_value_heads, spec.linear_value_dim))
    beta = ops.result_activation("sigmoid", b)
    own = m["linear_attn"]
    rate = ops.neg(exp(ops.to(own["A_log"], float32)))
    g = ops.mul(rate, ops.activation("softplus", ops.add(ops.to(a, float32), own["dt_bias"])))
    del rate
    core_attn_out, last_state = chunk_gated_delta_rule(
        query, key, value, g, beta, final=context.cache is not None
    )
    if context.cache is not None and last_state is not None:
        context.cache.append(_copied(last_state))
    rows = batch * length * spec.linear_value_heads
    core_attn_out = ops.reshape(core_attn_out, (rows, spec.linear_value_dim))
    z = ops.reshape(z, (rows, spec.linear_value_dim))
    core_attn_out = m["linear_attn.norm"](core_attn_out, z)
    state.tape.module = "linear_attn"
    core_attn_out = ops.reshape(core_attn_out, (batch, length, value_width))
    output: Tensor = m["linear_attn.out_proj"](core_attn_out)
    return output


def _cached_for_conv(hidden_states: Tensor, cache: list[Tensor], kernel: int) -> Tensor:
    """``update_conv_state`` (transformers/cache_utils.py, ``LinearAttentionLayer``): the last tokens stay."""
    state_shape = (*hidden_states.shape[:-1], kernel)
    conv_state = empty(state_shape, hidden_states.dtype, "zeros")
    hidden_states = pad_before(hidden_states, kernel) if hidden_states.shape[-1] < kernel else hidden_states
    length = hidden_states.shape[-1]
    cache.append(copied_into(conv_state, ops.narrow_last(hidden_states, length - kernel, length)))
    return hidden_states


def _copied(last_state: Tensor) -> Tensor:
    """``update_recurrent_state``."""
    return copied_into(empty(last_state.shape, last_state.dtype, "zeros_like"), last_state)


def _causal_conv(hidden_states: Tensor, weight: Tensor, spec: ModelSpec) -> Tensor:
    """``causal_conv1d_fn``, of [B, D, S]."""
    length, dtype = hidden_states.shape[-1], hidden_states.dtype
    padding = weight.shape[-1] - 1
    weight = ops.view(ops.view(weight, (weight.shape[0], weight.shape[2])), weight.shape)  # squeezed and back
    out = depthwise_conv1d(ops.to(hidden_states, weight.dtype), weight, padding)
    out = ops.narrow_last(out, 0, length)
    out = ops.activation("silu" if spec.hidden_act in ("silu", "swish") else "gelu", out)
    return ops.to(out, dtype)


def _l2norm(x: Tensor) -> Tensor:
    inv_norm = ops.rsqrt(ops.shift(ops.sum_last(ops.mul(x, x))))
    return ops.mul(x, inv_norm)


def _last(x: Tensor) -> Tensor:
    """``x.unsqueeze(-1)``."""
    return ops.view(x, (*x.shape, 1))


def chunk_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, *, final: bool
) -> tuple[Tensor, Tensor | None]:
    """``torch_chunk_gated_delta_rule``, without a state from before: [B, S, H, ...] to [B, S, H, V], and the
    ``final`` state if that is asked for."""
    initial_dtype = query.dtype
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[-2:]
    if key_heads != heads:
        query = repeat_interleave(query, heads // key_heads, 2)
        key = repeat_interleave(key, heads // key_heads, 2)
    query, key, value, beta, decay = [
        to_contiguous(ops.transpose(x, 1, 2), float32) for x in (query, key, value, beta, decay)
    ]
    query = _l2norm(query)
    key = _l2norm(key)
    query = ops.scale(query)
    more = -length % _CHUNK
    query, key, value = (pad(x, 2, more) for x in (query, key, value))
    beta, decay = (pad(x, 2, more) for x in (beta, decay))
    chunks = (length + more) // _CHUNK
    v_beta = ops.mul(value, _last(beta))
    k_beta = ops.mul(key, _last(beta))
    query, key, k_beta, v_beta = [
        ops.reshape(x, (batch, heads, chunks, _CHUNK, x.shape[-1])) for x in (query, key, k_beta, v_beta)
    ]
    decay = ops.reshape(decay, (batch, heads, chunks, _CHUNK))
    upper = strictly_upper(_CHUNK)
    cum_decay = cumsum_last(decay)
    square = (batch, heads, chunks, 1, _CHUNK)
    pairwise_decay = ops.sub(_last(cum_decay), ops.view(cum_decay, square))
    pairwise_decay = masked_fill(pairwise_decay, upper)
    pairwise_decay = exp(pairwise_decay)
    ut_system = ops.mul(matmul(k_beta, ops.transpose(key, -1, -2)), pairwise_decay)
    intra_chunk_attn = ops.mul(matmul(query, ops.transpose(key, -1, -2)), pairwise_decay)
    decayed_k_beta = ops.mul(k_beta, _last(exp(cum_decay)))
    new_values = solve_triangular(ut_system, v_beta)
    k_cumdecay = solve_triangular(ut_system, decayed_k_beta)
    last_state = empty((batch, heads, key_dim, value_dim), new_values.dtype, "zeros")
    core_attn_out = empty(new_values.shape, new_values.dtype, "zeros_like", new_values.strides)
    query = ops.mul(query, _last(exp(cum_decay)))
    key = ops.mul(key, _last(exp(ops.sub(ops.narrow_last(cum_decay, _CHUNK - 1, _CHUNK), cum_decay))))
    chunk_decay = _last(_last(exp(select(cum_decay, 3))))
    for _ in Turns(chunks):
        v_new = ops.sub(select(new_values, 2), matmul(select(k_cumdecay, 2), last_state))
        inter_chunk_attn = matmul(select(query, 2), last_state)
        read = ops.add(inter_chunk_attn, matmul(select(intra_chunk_attn, 2), v_new))
        core_attn_out = write(core_attn_out, 2, read)
        del read
        last_state = ops.add(
            ops.mul(last_state, select(chunk_decay, 2)),
            matmul(ops.transpose(select(key, 2), -1, -2), v_new),
        )
    final_state = last_state if final else None
    del last_state
    core_attn_out = ops.reshape(core_attn_out, (batch, heads, chunks * _CHUNK, value_dim))
    core_attn_out = _first_tokens(core_attn_out, length)
    core_attn_out = to_contiguous(ops.transpose(core_attn_out, 1, 2), initial_dtype)
    return core_attn_out, final_state


def _first_tokens(x: Tensor, length: int) -> Tensor:
    """``x[:, :, :length]``: itself if that is all of it."""
    if length == x.shape[2]:
        return x
    return ops.narrow(x, (*x.shape[:2], length, x.shape[3]))
