"""OLMo 2: norms after attention and MLP and over whole queries and keys, rotation in fp32 (transformers 5.23,
models/olmo2)."""

from __future__ import annotations

from functools import partial

from memplan.asked.spec import ModelSpec
from memplan.families import Family
from memplan.parts.config import COMMON, Config, full
from memplan.parts.context import Context, Leaves
from memplan.parts.layer import attention, heads, mlp, residual
from memplan.parts.module import Modules, head_norms, norms, widths
from memplan.parts.module import attention as projections
from memplan.parts.module import mlp as mlp_modules
from memplan.parts.norms import LateCastNorm
from memplan.parts.rotary import cos_sin, rope, tables
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor


def modules(spec: ModelSpec, sparse: bool) -> Modules:
    after = norms(spec, "post_attention_layernorm", "post_feedforward_layernorm")
    return {**projections(spec), **head_norms(*widths(spec)), **mlp_modules(spec), **after}


def _project(m: Leaves, x: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Norms over the whole projection."""
    q = m["self_attn.q_norm"](m["self_attn.q_proj"](x))
    k = m["self_attn.k_norm"](m["self_attn.k_proj"](x))
    v = m["self_attn.v_proj"](x)
    return heads(q, spec.head_dim), heads(k, spec.head_dim), heads(v, spec.head_dim)


def _rotate(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """In fp32, cast back at the end (``apply_rotary_pos_emb``)."""
    cos, sin = tables(context)
    q_dtype, k_dtype = q.dtype, k.dtype
    q_embed = rope(q, cos, sin)
    k_embed = rope(k, cos, sin)
    return ops.to(q_embed, q_dtype), ops.to(k_embed, k_dtype)


def layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    before = hidden
    hidden, _ = attention(m, hidden, context, _project, _rotate)
    hidden = m["post_attention_layernorm"](hidden)
    hidden = residual(before, hidden)
    before = hidden
    hidden = mlp(m, hidden, context)
    hidden = m["post_feedforward_layernorm"](hidden)
    hidden = residual(before, hidden)
    return hidden


FAMILY = Family(
    config=Config(
        architecture="Olmo2ForCausalLM",
        defaults={**COMMON, "max_position_embeddings": 2048},
        layers=full,
        nullable=("num_key_value_heads",),
    ),
    modules=modules,
    layer=layer,
    norm=LateCastNorm,
    cos_sin=partial(cos_sin, cast=False),
)
