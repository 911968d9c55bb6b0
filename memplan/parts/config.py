"""The families of decoders whose ``config.json`` memplan reads, and what transformers 5.23 makes of each.

Defaults are those of ``models/*/configuration_*.py``; which layers slide is decided in ``modeling_*.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from memplan.asked.fields import MAX_POSITIONS, Fields
from memplan.asked.spec import LayerKind
from memplan.errors import UnsupportedArchitecture, shown

FULL: LayerKind = "full_attention"
SLIDING: LayerKind = "sliding_attention"
_KINDS = {
    "full_attention": FULL,
    "sliding_attention": SLIDING,
    "attention": FULL,
}  # the last is a legacy name

Layers = tuple[int | None, tuple[LayerKind, ...]]  # the window, and the kind of each layer

# -- which layers attend within a window -----------------------------------------------------------------


def _window(fields: Fields) -> int | None:
    return fields.size_or_none("sliding_window", most=MAX_POSITIONS)


def _full(fields: Fields, layers: int) -> Layers:
    return None, (FULL,) * layers


def _all_or_none(fields: Fields, layers: int) -> Layers:
    """One mask for all layers: ``create_causal_mask if self.config.sliding_window is None else ...``."""
    window = _window(fields)
    return window, (FULL if window is None else SLIDING,) * layers


def _all_if_switched_on(fields: Fields, layers: int) -> Layers:
    return _all_or_none(fields, layers) if fields.flag("use_sliding_window") else _full(fields, layers)


def _above_max_window_layers(fields: Fields, layers: int) -> Layers:
    window = _window(fields) if fields.flag("use_sliding_window") else None
    first = layers if window is None else fields.size("max_window_layers", least=0)
    return _as_listed(fields, layers, window, lambda layer: layer >= first)


def _every_second(fields: Fields, layers: int) -> Layers:
    return _as_listed(fields, layers, _window(fields), lambda layer: layer % 2 == 0)


def _all_but_every_sixth(fields: Fields, layers: int) -> Layers:
    """Five layers slide, the sixth does not, unless ``sliding_window_pattern`` says another number."""
    pattern = 1 if fields.get("layer_types") else fields.size("sliding_window_pattern")
    return _as_listed(fields, layers, _window(fields), lambda layer: (layer + 1) % pattern > 0)


def _as_listed(fields: Fields, layers: int, window: int | None, slides: Callable[[int], bool]) -> Layers:
    """``layer_types`` if the configuration lists them, else what the family's rule makes."""
    listed = fields.strings("layer_types")
    if listed is None:
        kinds = tuple(SLIDING if slides(layer) else FULL for layer in range(layers))
    else:
        if len(listed) != layers:
            fields.fail(f"layer_types has {len(listed)} entries, but num_hidden_layers is {layers}")
        for kind in listed:
            if kind not in _KINDS:
                raise UnsupportedArchitecture(
                    f"{shown(fields.name)} has layers of the type {shown(kind)}, but memplan predicts only "
                    f"{FULL} and {SLIDING}"
                )
        kinds = tuple(_KINDS[kind] for kind in listed)
    if window is None and SLIDING in kinds:
        fields.fail(f"it has {SLIDING} layers but no sliding_window, which must be a number of tokens")
    return window, kinds


# -- the families ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Family:
    """What one configuration class does with a ``config.json``."""

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    layers: Callable[[Fields, int], Layers]
    nullable: tuple[str, ...] = ()  # fields declared ``... | None`` in the configuration class
    attention_bias: bool | None = None  # None: the configuration says
    activation: str = "hidden_act"
    heads_divide_hidden: bool = False  # ``validate_architecture`` asks for it even where head_dim is given


_COMMON = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "num_key_value_heads": None,
    "head_dim": None,
}
_QWEN2 = {
    **_COMMON,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = {
    **_COMMON,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_GEMMA_NULLABLE = ("sliding_window", "layer_types", "final_logit_softcapping", "attn_logit_softcapping")

FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "llama",
        {**_COMMON, "max_position_embeddings": 2048, "mlp_bias": False},
        _full,
        nullable=("num_key_value_heads", "head_dim"),
        heads_divide_hidden=True,
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        {**_COMMON, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
        _all_or_none,
        nullable=("head_dim", "sliding_window"),
        attention_bias=False,
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        _QWEN2,
        _above_max_window_layers,
        nullable=("num_key_value_heads", "sliding_window", "layer_types"),
        attention_bias=True,
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        {**_QWEN2, "head_dim": 128},
        _above_max_window_layers,
        nullable=("num_key_value_heads", "sliding_window", "layer_types"),
    ),
    Family(
        "Gemma2ForCausalLM",
        "gemma2",
        {
            **_GEMMA,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        _every_second,
        nullable=_GEMMA_NULLABLE,
        activation="hidden_activation",
        heads_divide_hidden=True,
    ),
    Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {
            **_GEMMA,
            # The published text_config of the checkpoints with images leaves these two out.
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "sliding_window_pattern": 6,
        },
        _all_but_every_sixth,
        nullable=_GEMMA_NULLABLE,
        activation="hidden_activation",
        heads_divide_hidden=True,
    ),
    Family(
        "Phi3ForCausalLM",
        "phi3",
        {
            **_COMMON,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "resid_pdrop": 0.0,
            "sliding_window": None,
        },
        _all_or_none,
        nullable=("num_key_value_heads", "sliding_window"),
        attention_bias=False,
    ),
    Family(
        "Olmo2ForCausalLM",
        "olmo2",
        {**_COMMON, "max_position_embeddings": 2048},
        _full,
        nullable=("num_key_value_heads",),
    ),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        {
            **_COMMON,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096 * 32,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        _all_or_none,
        nullable=("head_dim", "sliding_window"),
        attention_bias=False,
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {
            **_COMMON,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        _all_if_switched_on,
        nullable=("sliding_window", "mlp_only_layers"),
    ),
)
