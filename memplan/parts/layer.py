"""Decoder layers and what they run, in the words of transformers' modelling files (5.23).

A layer is played on leaf modules by name, ``m["self_attn.q_proj"]`` and so on. Local variables outlive their
use exactly as they do in the library: that is part of the memory.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.asked.spec import ModelSpec
from memplan.parts.context import Context, Layer, Leaves
from memplan.parts.experts import Route, sparse_mlp
from memplan.parts.rotary import Rotate, rotate
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, empty, int64, state

# -- attention -------------------------------------------------------------------------------------

# Projections return queries, keys and values as [B, H, S, D].
Project = Callable[[Leaves, Tensor, ModelSpec], tuple[Tensor, Tensor, Tensor]]


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, H·D] to [B, H, S, D]."""
    return ops.transpose(ops.view(x, (*x.shape[:-1], x.shape[-1] // head_dim, head_dim)), 1, 2)


def project(m: Leaves, x: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Llama's and most others'."""
    return (
        heads(m["self_attn.q_proj"](x), spec.head_dim),
        heads(m["self_attn.k_proj"](x), spec.head_dim),
        heads(m["self_attn.v_proj"](x), spec.head_dim),
    )


def project_and_norm_heads(m: Leaves, x: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """With norms over each head, before the heads are transposed."""
    return (
        ops.transpose(m["self_attn.q_norm"](_split(m["self_attn.q_proj"](x), spec)), 1, 2),
        ops.transpose(m["self_attn.k_norm"](_split(m["self_attn.k_proj"](x), spec)), 1, 2),
        heads(m["self_attn.v_proj"](x), spec.head_dim),
    )


def project_all_and_norm(m: Leaves, x: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """All three projections, then the norms over heads, if there are any (``use_qk_norm``)."""
    q = _split(m["self_attn.q_proj"](x), spec)
    k = _split(m["self_attn.k_proj"](x), spec)
    v = _split(m["self_attn.v_proj"](x), spec)
    if spec.use_qk_norm:
        q = m["self_attn.q_norm"](q)
        k = m["self_attn.k_norm"](k)
    return ops.transpose(q, 1, 2), ops.transpose(k, 1, 2), ops.transpose(v, 1, 2)


def _split(x: Tensor, spec: ModelSpec) -> Tensor:
    """[B, S, H·D] to [B, S, H, D]."""
    return ops.view(x, (*x.shape[:-1], x.shape[-1] // spec.head_dim, spec.head_dim))


def attention(
    m: Leaves, x: Tensor, context: Context, project: Project = project, rotate: Rotate = rotate
) -> tuple[Tensor, Tensor | None]:
    """The output [B, S, E], and the weights that eager attention returns."""
    if state.spread is not None:  # all arguments are given by name
        return state.spread.module(  # type: ignore[no-any-return]
            "self_attn", _attention, None, m, x, context, project, rotate
        )
    return _attention(None, m, x, context, project, rotate)


def _attention(
    _: None, m: Leaves, x: Tensor, context: Context, project: Project, rotate: Rotate
) -> tuple[Tensor, Tensor | None]:
    q, k, v = project(m, x, context.spec)
    state.tape.module = "self_attn"
    if context.rotated:
        q, k = rotate(q, k, context)
    k, v = cached(k, v, context)
    out, weights = context.attend(q, k, v, context)
    out = ops.view(out, (*out.shape[:2], out.shape[2] * out.shape[3]))
    out = m["self_attn.o_proj"](out)
    out = _finished(out, context.spec, "self_attn")
    return out, weights


def _finished(x: Tensor, spec: ModelSpec, name: str) -> Tensor:
    """What a module ends with: ``nn.functional.dropout``, where a family has it."""
    if spec.residual_dropout:
        state.tape.module = name
        x = ops.dropout(x, spec.residual_dropout)
    return x


def cached(k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """``past_key_values.update``: copies, where there is a cache."""
    if context.cache is None:
        return k, v
    if context.sliding:
        # DynamicSlidingWindowLayer moves its window, a number, to the card
        context.cache.append(empty((), int64, "_to_copy"))
    copies = ops.copy_into_cache(k, k.dtype), ops.copy_into_cache(v, k.dtype)
    context.cache.extend(copies)
    return copies


# -- mlp -------------------------------------------------------------------------------------------


def mlp(m: Leaves, x: Tensor, context: Context, route: Route | None = None) -> Tensor:
    """A gated one; experts where the layer has some, to which ``route`` sends."""
    if state.spread is not None:
        return state.spread.module("mlp", _mlp, x, m, context, route)  # type: ignore[no-any-return]
    return _mlp(x, m, context, route)


def _mlp(x: Tensor, m: Leaves, context: Context, route: Route | None) -> Tensor:
    if "mlp.experts" in m:
        assert route is not None, "a layer with experts and no router"
        return sparse_mlp(m, x, context.spec, route, context.router_logits)
    return gated_mlp(m, x, context.spec)


def gated_mlp(m: Leaves, x: Tensor, spec: ModelSpec, name: str = "mlp") -> Tensor:
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` of the MLP of that name."""
    down = m[f"{name}.down_proj"](
        _gated(act(spec, m[f"{name}.gate_proj"](x), name), m[f"{name}.up_proj"](x), name)
    )
    down = _finished(down, spec, name)
    return down


def _gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    state.tape.module = name
    return ops.mul(gate, up)


def act(spec: ModelSpec, x: Tensor, name: str = "mlp") -> Tensor:
    state.tape.module = name
    if state.spread is not None:
        return state.spread.module(f"{name}.act_fn", _act, x, spec)  # type: ignore[no-any-return]
    return _act(x, spec)


def _act(x: Tensor, spec: ModelSpec) -> Tensor:
    return ops.activation("silu" if spec.hidden_act in ("silu", "swish") else "gelu", x)


# -- layers ----------------------------------------------------------------------------------------


def residual(before: Tensor, x: Tensor) -> Tensor:
    """``residual + hidden_states``."""
    state.tape.module = ""
    return ops.add(before, x)


def llama_like(project: Project = project, route: Route | None = None) -> Layer:
    """A norm before attention and one before the MLP."""

    def layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
        before = hidden
        hidden = m["input_layernorm"](hidden)
        hidden, _ = attention(m, hidden, context, project)
        hidden = residual(before, hidden)
        before = hidden
        hidden = m["post_attention_layernorm"](hidden)
        hidden = mlp(m, hidden, context, route)
        hidden = residual(before, hidden)
        return hidden

    return layer


def gemma_like(project: Project = project) -> Layer:
    """Norms before and after both."""

    def layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
        before = hidden
        hidden = m["input_layernorm"](hidden)
        hidden, _ = attention(m, hidden, context, project)
        hidden = m["post_attention_layernorm"](hidden)
        hidden = residual(before, hidden)
        before = hidden
        hidden = m["pre_feedforward_layernorm"](hidden)
        hidden = mlp(m, hidden, context)
        hidden = m["post_feedforward_layernorm"](hidden)
        hidden = residual(before, hidden)
        return hidden

    return layer
