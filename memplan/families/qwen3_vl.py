"""Qwen3-VL: Qwen3 with three positions a token, and a tower whose features go into the embeddings and past
the first layers (transformers 5.23, models/qwen3_vl)."""

from __future__ import annotations

from memplan.asked.spec import ModelSpec
from memplan.families import Family, Seen, _qwen_vl
from memplan.parts.config import COMMON, Config, full
from memplan.parts.layer import llama_like, project_and_norm_heads
from memplan.parts.module import Modules, attention, head_norms, mlp, norms
from memplan.parts.rotary import of_three_grids
from memplan.shadow import ops
from memplan.shadow.images import Mask, join, put_rows_
from memplan.shadow.indexing import by_mask
from memplan.shadow.tensor import Tensor, state
from memplan.towers import Features, Pictures


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    return {**attention(spec), **head_norms(spec.head_dim, spec.head_dim), **mlp(spec), **norms(spec)}


def _sees(
    features: Features, held: list[Tensor], ids: Tensor, looks: dict[str, Tensor], seen: Pictures
) -> Seen:
    """``Qwen3VLModel.forward`` from the tower to the decoder."""
    state.tape.module = "model"
    tokens = ops.to(join(features.tokens, 0), held[0].dtype)
    image_mask, video_mask = _qwen_vl.placed(held, tokens, seen)
    past = [join(parts, 0) for parts in features.deepstack]
    positions, deltas = _qwen_vl.positions(ids, looks["mm_token_type_ids"], seen)

    def after(layer: int, hidden_states: Tensor) -> Tensor:
        return _deepstack(hidden_states, image_mask, past[layer]) if layer < len(past) else hidden_states

    return Seen(positions, after, {"rope_deltas": deltas}, (features, tokens, video_mask))


def _deepstack(hidden_states: Tensor, mask: Mask, visual_embeds: Tensor) -> Tensor:
    """``_deepstack_process``."""
    state.tape.module = "model.language_model"
    visual_embeds = ops.to(visual_embeds, hidden_states.dtype)
    hidden_states = ops.clone(hidden_states)
    local_this = ops.add(by_mask(hidden_states, *mask), visual_embeds)
    return put_rows_(hidden_states, mask, local_this)


FAMILY = Family(
    config=Config(
        architecture="Qwen3VLForConditionalGeneration",
        defaults={
            **COMMON,
            "num_key_value_heads": 32,
            "max_position_embeddings": 128_000,
            "head_dim": 128,
            "use_cache": True,
        },
        layers=full,
        nullable=("num_key_value_heads",),
    ),
    modules=_modules,
    layer=llama_like(project_and_norm_heads),
    cos_sin=of_three_grids,
    root="model.language_model",
    sees=_sees,
    stays=_qwen_vl.stays,
    counts_items=False,
    several=False,
    liger=False,
)
