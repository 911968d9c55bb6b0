"""Command R and Aya: attention and MLP side by side behind one norm without a bias, and scaled logits
(transformers 5.23, models/cohere)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.families import Family, _cohere
from memplan.parts.config import Config, full
from memplan.parts.layer import project_all_and_norm
from memplan.parts.module import Modules, attention, mlp, norm, norms
from memplan.parts.norms import CenteredNorm


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    return {
        "logit_scale": fields.number("logit_scale", "a number", lambda value: True),
        "use_qk_norm": fields.flag("use_qk_norm"),
    }


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    made = attention(spec)
    if spec.use_qk_norm:  # each head has weights of its own
        made["self_attn.q_norm"] = norm(spec.num_attention_heads, spec.head_dim)
        made["self_attn.k_norm"] = norm(spec.num_key_value_heads, spec.head_dim)
    return {**made, **mlp(spec), **norms(spec, "input_layernorm")}


FAMILY = Family(
    config=Config(
        architecture="CohereForCausalLM",
        defaults={**_cohere.DEFAULTS, "use_qk_norm": False},
        layers=full,
        nullable=("num_key_value_heads",),
        experts=_more,
    ),
    modules=_modules,
    layer=_cohere.side_by_side(project_all_and_norm),
    norm=CenteredNorm,
    several=False,
    liger=False,
)
