"""A layer with latent attention and DeepSeek's experts (transformers 5.23, models/deepseek_v3)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.parts import deepseek_moe, latent
from memplan.parts.context import Context, Leaves
from memplan.parts.layer import residual
from memplan.parts.module import Modules, mlp, norms
from memplan.parts.rotary import rotate, rotate_interleaved
from memplan.shadow.tensor import Tensor

DEFAULTS: dict[str, Any] = {
    "qk_rope_head_dim": 64,
    "kv_lora_rank": 512,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
}


def read(fields: Fields, sparse: tuple[bool, ...]) -> dict[str, Any]:
    """Sizes of attention and of experts, which the layers marked ``sparse`` have."""
    found = deepseek_moe.numbers(fields, sparse)
    return {
        **found,
        **latent.sizes(fields),
        **deepseek_moe.groups(fields, found["num_experts"], 2),
        "norm_topk_prob": fields.flag("norm_topk_prob"),
        "rope_interleave": fields.flag("rope_interleave"),
    }


def modules(spec: ModelSpec, sparse: bool) -> Modules:
    """Of a layer with experts or without."""
    inner = deepseek_moe.modules(spec) if sparse else mlp(spec)
    return {**latent.projections(spec), **inner, **norms(spec)}


def layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    """``DeepseekV3DecoderLayer.forward``."""
    before = hidden
    hidden = m["input_layernorm"](hidden)
    turn = rotate_interleaved if context.spec.rope_interleave else rotate
    hidden, _ = latent.attention(m, hidden, context, turn)
    hidden = residual(before, hidden)
    before = hidden
    hidden = m["post_attention_layernorm"](hidden)
    hidden = deepseek_moe.forward(m, hidden, context.spec)
    hidden = residual(before, hidden)
    return hidden
