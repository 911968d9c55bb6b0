"""Gemma 3, of a checkpoint with images its language model: five layers slide, the sixth does not, and each
kind has its rotary embedding (transformers 5.23, models/gemma3)."""

from __future__ import annotations

from memplan.asked.spec import ModelSpec
from memplan.families import Family, _gemma, _rope_by_kind
from memplan.parts.config import Config, by_pattern
from memplan.parts.context import Leaves
from memplan.parts.layer import gemma_like, project
from memplan.parts.module import Modules, attention, head_norms, mlp
from memplan.parts.norms import GemmaNorm
from memplan.shadow.tensor import Tensor


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    heads = head_norms(spec.head_dim, spec.head_dim)
    return {**attention(spec), **heads, **mlp(spec), **_gemma.four_norms(spec)}


def _project(m: Leaves, x: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Norms over each head after the heads are transposed."""
    q, k, v = project(m, x, spec)
    q = m["self_attn.q_norm"](q)
    k = m["self_attn.k_norm"](k)
    return q, k, v


FAMILY = Family(
    config=Config(
        architecture="Gemma3ForCausalLM",
        defaults={
            **_gemma.DEFAULTS,
            # The published text_config of the checkpoints with images leaves these two out.
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "sliding_window_pattern": 6,
        },
        layers=by_pattern,
        nullable=_gemma.NULLABLE,
        activation="hidden_activation",
        heads_divide_hidden=True,
        images=("Gemma3ForConditionalGeneration", "gemma3"),
        rope=_rope_by_kind.entries,
    ),
    modules=_modules,
    layer=gemma_like(_project),
    norm=GemmaNorm,
    scaled_embedding=True,
    rotates_by_layer=True,
    makes_both_masks=True,
)
