"""Granite 3: Llama, with numbers that embeddings, attention, residuals and logits are scaled by
(transformers 5.23, models/granite)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.families import Family
from memplan.parts.config import COMMON, Config, full
from memplan.parts.context import Context, Leaves
from memplan.parts.layer import attention, mlp, residual
from memplan.parts.module import plain
from memplan.shadow import ops
from memplan.shadow.tensor import Tensor, state


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    return {"logits_scaling": fields.number("logits_scaling", "a number", bool)}


def _scaled(hidden: Tensor) -> Tensor:
    """``hidden_states * self.residual_multiplier``."""
    state.tape.module = ""
    return ops.scale(hidden)


def _layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    before = hidden
    hidden = m["input_layernorm"](hidden)
    hidden, _ = attention(m, hidden, context)
    hidden = residual(before, _scaled(hidden))
    before = hidden
    hidden = m["post_attention_layernorm"](hidden)
    hidden = mlp(m, hidden, context)
    hidden = residual(before, _scaled(hidden))
    return hidden


FAMILY = Family(
    config=Config(
        architecture="GraniteForCausalLM",
        defaults={
            **COMMON,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "logits_scaling": 1.0,
        },
        layers=full,
        nullable=("num_key_value_heads",),
        experts=_more,
    ),
    modules=plain,
    layer=_layer,
    multiplied_embedding=True,
    several=False,
    liger=False,
)
