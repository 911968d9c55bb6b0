"""StableLM: norms that take the mean off and have biases, and a part of each head is rotated (transformers
5.23, models/stablelm)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.errors import UnsupportedArchitecture, shown
from memplan.families import Family
from memplan.families._rotated_part import attention
from memplan.parts.config import COMMON, Config, full
from memplan.parts.context import Context, Leaves
from memplan.parts.layer import heads, mlp, residual
from memplan.parts.module import Modules, norms
from memplan.parts.module import attention as projections
from memplan.parts.module import mlp as mlp_modules
from memplan.parts.norms import LayerNorm
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    if fields.flag("qk_layernorm"):
        raise UnsupportedArchitecture(
            f"{shown(fields.name)} norms each head by itself (qk_layernorm), which memplan doesn't predict; "
            "add --trace to have its own code traced"
        )
    return {"use_parallel_residual": fields.flag("use_parallel_residual")}


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    names = ("input_layernorm",) if spec.use_parallel_residual else ()
    return {**projections(spec, output_bias=False), **mlp_modules(spec), **norms(spec, *names, bias=True)}


def _project(m: Leaves, x: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """All three, before any is split into heads."""
    q, k, v = m["self_attn.q_proj"](x), m["self_attn.k_proj"](x), m["self_attn.v_proj"](x)
    q = heads(q, spec.head_dim)
    k = heads(k, spec.head_dim)
    v = heads(v, spec.head_dim)
    return q, k, v


def _layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    """The normed hidden states keep their name to the end."""
    before, p = hidden, context.spec.resid_dropout
    hidden = m["input_layernorm"](hidden)
    attended, _ = attention(m, hidden, context, _project, "self_attn.o_proj")
    if context.spec.use_parallel_residual:
        inner = mlp(m, hidden, context)
        inner = ops.dropout(inner, p)
        hidden = residual(residual(before, attended), inner)
    else:
        before = residual(before, attended)
        inner = mlp(m, m["post_attention_layernorm"](before), context)
        inner = ops.dropout(inner, p)
        hidden = residual(before, inner)
    return hidden


FAMILY = Family(
    config=Config(
        architecture="StableLmForCausalLM",
        head=None,
        defaults={
            **COMMON,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "partial_rotary_factor": 0.25,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
            "hidden_dropout": 0.0,
        },
        layers=full,
        bias="use_qkv_bias",
        dropout="hidden_dropout",
        heads_divide_hidden=True,
        experts=_more,
        rotates_part=True,
    ),
    modules=_modules,
    layer=_layer,
    norm=LayerNorm,
    norm_bias=True,
    several=False,
    liger=False,
)
