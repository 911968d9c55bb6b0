"""Gemma 2: every second layer slides, and attention caps its logits (transformers 5.23, models/gemma2)."""

from __future__ import annotations

from memplan.asked.spec import ModelSpec
from memplan.errors import RecipeError
from memplan.families import Family, _gemma
from memplan.parts.config import Config, every_second
from memplan.parts.layer import gemma_like
from memplan.parts.module import Modules, attention, mlp
from memplan.parts.norms import GemmaNorm


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    return {**attention(spec), **mlp(spec), **_gemma.four_norms(spec)}


def _attention(asked: str | None) -> str:
    """transformers refuses SDPA for it: soft-capping has no place in the fused kernels."""
    if asked == "sdpa":
        raise RecipeError(
            "Gemma 2 has no sdpa attention in transformers, for it caps its attention logits; "
            "use --attn eager"
        )
    return asked or "eager"


FAMILY = Family(
    config=Config(
        architecture="Gemma2ForCausalLM",
        defaults={
            **_gemma.DEFAULTS,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        layers=every_second,
        nullable=_gemma.NULLABLE,
        activation="hidden_activation",
        heads_divide_hidden=True,
    ),
    modules=_modules,
    layer=gemma_like(),
    norm=GemmaNorm,
    attention=_attention,
    scaled_embedding=True,
    makes_both_masks=True,
)
