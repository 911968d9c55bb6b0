"""What Cohere's families have in common: attention and MLP side by side behind one norm."""

from __future__ import annotations

from memplan.parts.config import COMMON
from memplan.parts.context import Context, Layer, Leaves
from memplan.parts.layer import Project, attention, mlp, project, residual
from memplan.parts.rotary import rotate_pairs
from memplan.shadow.tensor import Tensor

DEFAULTS = {
    **COMMON,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "logit_scale": 0.0625,
}


def side_by_side(project: Project = project) -> Layer:
    """``residual + hidden_states_attention + hidden_states_mlp``."""

    def layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
        before = hidden
        hidden = m["input_layernorm"](hidden)
        attended, _ = attention(m, hidden, context, project, rotate_pairs)
        inner = mlp(m, hidden, context)
        hidden = residual(residual(before, attended), inner)
        return hidden

    return layer
