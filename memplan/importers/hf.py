"""A Hugging Face ``config.json`` -> ModelSpec.

The defaults of missing fields, and which fields count at all, are those of transformers 5.23; the
tests compare the two. Sizes that every published configuration of a family states have no default
here: a ``config.json`` without ``hidden_size`` is a broken file, not a model of 4096.

What differs between families stands in :mod:`memplan.families`; ``attention_bias`` of a specification is the
bias of the q, k and v projections. A checkpoint with images is read as its language model (``text_config``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from memplan import families, towers
from memplan.asked.fields import MAX_LAYERS, MAX_POSITIONS, Fields
from memplan.asked.spec import ModelSpec
from memplan.errors import SpecError, UnsupportedArchitecture, shown
from memplan.families import Family
from memplan.importers.quantization import MXFP4, method_of, quantization_of
from memplan.parts.config import Config

# Activations whose memory is known: element-wise, and each saves its input only.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}


def supported_architectures() -> tuple[str, ...]:
    """Those of every family, and of its checkpoints with images."""
    configs = [family.config for _, family in families.everyone()]
    return tuple(name for one in configs for name in (one.architecture, *(one.images or ())[:1]))


def _few(names: tuple[str, ...]) -> str:
    """A sentence's worth of names."""
    return (
        f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more (`memplan models` lists models of them)"
    )


_NAMED = 5


def has_vision_tower(config: Mapping[str, Any]) -> bool:
    """Whether a configuration that :func:`spec_from_config` reads is of a checkpoint with images."""
    model_type, named = config.get("model_type"), config.get("architectures") or []
    if isinstance(model_type, str) and model_type in families.names():  # the rest need not be imported
        return False
    return any(
        named[0] == one.images[0] if named else model_type == one.images[1]
        for one in (family.config for _, family in families.everyone())
        if one.images is not None
    )


def spec_from_config(
    config: dict[str, Any],
    name: str,
    hub_id: str | None = None,
    published_parameters: int | None = None,
) -> ModelSpec:
    """Read a ``config.json``, of transformers 4 or 5, as published on the Hub.

    Raises SpecError (unreadable, incomplete or contradictory) or UnsupportedArchitecture, for whatever
    JSON value it is given.
    """
    if not isinstance(config, dict):
        raise SpecError(
            f"the configuration of {shown(name)} is {shown(config)}, but it must be a JSON object"
        )
    published = config
    model_type, family, config = _family(config, name)
    vision = towers.read(model_type, published, name)
    fields = Fields(config, family.defaults, frozenset(family.nullable), name)
    _refuse_variants(fields)

    layers = fields.size("num_hidden_layers", most=MAX_LAYERS)
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = fields.size_or_none("head_dim")
    if hidden % heads and (head_dim is None or family.heads_divide_hidden):
        fields.fail(f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})")
    if head_dim is None:
        head_dim = hidden // heads
    key_value_heads = fields.size_or_none("num_key_value_heads") or heads
    activation = fields.get(family.activation)
    if not isinstance(activation, str):
        fields.fail(f"{family.activation} is {shown(activation)}, but it must be a string such as 'silu'")
    activation = family.activation_aliases.get(activation, activation)
    if activation not in _ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"{shown(name)} has the activation {shown(activation)}, but memplan predicts only "
            f"{', '.join(_ACTIVATIONS)}; add --trace to have its own code traced"
        )
    partial_rotary_factor, longrope = _rope(fields, family, head_dim)
    whole = {**config, **published}
    mxfp4 = family.mxfp4 and method_of(whole.get("quantization_config")) == MXFP4
    window, layer_types = family.layers(fields, layers)

    try:
        return ModelSpec(
            name=name,
            hub_id=hub_id,
            architecture=family.architecture,
            model_type=model_type,
            published_parameters=published_parameters,
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.size(family.inner),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.size("max_position_embeddings", most=MAX_POSITIONS),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=(
                fields.flag(family.bias) if family.attention_bias is None else family.attention_bias
            ),
            mlp_bias="mlp_bias" in family.defaults and fields.flag("mlp_bias"),
            hidden_act=_ACTIVATIONS[activation],
            partial_rotary_factor=partial_rotary_factor,
            longrope=longrope,
            quantization=None if mxfp4 else quantization_of(whole, name),
            mxfp4=mxfp4,
            vision=vision,
            text_cache=vision is not None and fields.flag("use_cache"),
            attention_dropout=fields.probability("attention_dropout"),
            resid_dropout=fields.probability(family.dropout) if family.dropout in family.defaults else 0.0,
            sliding_window=window,
            layer_types=layer_types,
            **_softcaps(fields, family),
            **family.experts(fields, layers),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        fields.fail(f"{where}: {message}" if where else message)


def _instead(config: dict[str, Any], architecture: str | None) -> str:
    """What answers for a model that has no plan: a trace is of a causal language model of transformers'."""
    dry = "`memplan dry-run -- COMMAND` runs your own program"
    if "vision_config" in config or (architecture or "").endswith("ForConditionalGeneration"):
        return f"{dry} with it"
    if "auto_map" in config:  # its code comes with it, but transformers may have it as well
        return f"`memplan MODEL --trace` traces transformers' code of it, if it has any, and {dry}"
    return "`memplan MODEL --trace` traces its own code"


def _family(config: dict[str, Any], name: str) -> tuple[str, Config, dict[str, Any]]:
    """The family of a configuration, how it reads one, and the object that describes its decoder."""
    fields = Fields(config, {"architectures": None, "model_type": None}, frozenset(config), name)
    architecture = next(iter(fields.strings("architectures") or []), None)
    model_type = fields.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        fields.fail(f"model_type is {shown(model_type)}, but it must be a string such as 'llama'")
    if not architecture and not model_type:
        fields.fail(
            "it has neither architectures nor model_type; is this the config.json of a language model?"
        )

    images = has_vision_tower(config)
    for found, family in _candidates(model_type):
        own = family.config
        if images and own.images is not None:
            names: tuple[str, ...] = own.images
        else:
            names = () if images else (own.architecture, found)
        if (architecture or model_type) in names:
            break
    else:
        kind = f"architecture {shown(architecture)}" if architecture else f"model type {shown(model_type)}"
        raise UnsupportedArchitecture(
            f"memplan has no predicted plan for {shown(name)}, which is of the {kind}: "
            f"{_instead(config, architecture)}; predicted are {_few(supported_architectures())}"
        )
    expected = own.images[1] if images and own.images is not None else found
    if model_type and model_type != expected:
        fields.fail(
            f"architectures says {shown(architecture)} but model_type says {shown(model_type)}; "
            f"the two agree when model_type is {expected!r}"
        )
    if images or found in towers.names():
        text = config.get("text_config")
        if not isinstance(text, dict):
            fields.fail(f"text_config is {shown(text)}, but it must be the object of its language model")
        # The checkpoint ties its embeddings or not as a whole, where the language model does not say.
        tied = {key: config[key] for key in ("tie_word_embeddings",) if config.get(key) is not None}
        config = tied | text if images else text | (tied or {"tie_word_embeddings": False})
    return found, own, config


def _candidates(model_type: str | None) -> Iterator[tuple[str, Family]]:
    """The families to look among: that of the model type first, so that the rest need not be imported."""
    if model_type in families.names():
        yield str(model_type), families.find(str(model_type))
    yield from families.everyone()


def _refuse_variants(fields: Fields) -> None:
    """Switches that change what a training step allocates and that no predicted plan knows, but of a family
    that reads them itself."""
    for key, what in (
        ("is_encoder_decoder", "an encoder-decoder model"),
        ("use_bidirectional_attention", "a model with bidirectional attention"),
        ("output_router_logits", "a model trained with a router loss"),
        ("router_jitter_noise", "a model with router noise"),
        ("per_layer_config", "a model whose layers differ in size"),
    ):
        if key in fields.defaults:
            continue
        if fields.config.get(key) not in (None, False, 0, "vision"):  # of images alone
            raise UnsupportedArchitecture(
                f"{shown(fields.name)} is {what} ({key} is {shown(fields.config[key])}), which memplan "
                f"doesn't predict; it supports decoder-only models without {key}"
            )


def _softcaps(fields: Fields, config: Config) -> dict[str, Any]:
    keys = ("attn_logit_softcapping", "final_logit_softcapping")
    return {key: fields.softcap(key) for key in keys if key in config.defaults}


# -- rotary embeddings -----------------------------------------------------------------------------------


def _rope(fields: Fields, family: Config, head_dim: int) -> tuple[float, bool]:
    """The part of a head that is rotated, and whether the rotation is longrope's.

    transformers 4 writes ``rope_scaling`` (and its type as ``type``), transformers 5 ``rope_parameters``.
    """
    old, parameters = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    entries = family.rope(fields, old, parameters)
    kinds = [_rope_kind(fields, family, entry) for entry in entries]

    partial = 1.0
    if family.rotates_part:
        top = fields.config.get("partial_rotary_factor")
        usual = fields.defaults.get("partial_rotary_factor", 1.0)
        rope = fields.inside(entries[0], {"partial_rotary_factor": usual if top is None else top})
        partial = rope.number("partial_rotary_factor", "a share from 0 to 1", lambda value: 0 < value <= 1)
    rotated = int(head_dim * partial)
    if rotated < 1:
        fields.fail(
            f"partial_rotary_factor is {partial:g}, which rotates nothing of a head_dim of {head_dim}"
        )
    if rotated == head_dim and head_dim % 2:
        fields.fail(f"head_dim is {head_dim}, but rotary embeddings need an even one")
    return partial, "longrope" in kinds


def _rope_kind(fields: Fields, family: Config, entry: Mapping[str, Any]) -> str:
    """The rope type of an entry, with what it needs checked."""
    kinds = [entry[key] for key in ("rope_type", "type") if entry.get(key) is not None]
    kind = kinds[0] if kinds else "default"
    if isinstance(kind, str):
        kind = family.rope_aliases.get(kind, kind)
    if not isinstance(kind, str) or kind not in family.rope_types:
        fields.fail(f"rope_type is {shown(kind)}, but it must be one of {', '.join(family.rope_types)}")
    if kind in ("yarn", "longrope"):
        positions = fields.size("max_position_embeddings", most=MAX_POSITIONS)
        rope = fields.inside(entry, {"original_max_position_embeddings": positions})
        outside = (
            "original_max_position_embeddings"  # where both say, the configuration wins over its rope entry
        )
        within = fields if outside in fields.config or outside in family.defaults else rope
        within.size("original_max_position_embeddings", least=2, most=MAX_POSITIONS)
        for key in ("factor", "attention_factor", "mscale", "mscale_all_dim"):
            if key in rope.config:
                rope.number(key, "a number above 0", lambda value: value > 0)
    return kind
