"""A config.json means to memplan what it means to transformers; what makes no sense is one clear sentence."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_specs import SPECS, config

from memplan import Recipe, plan
from memplan.asked.spec import ModelSpec, Quantization, Vision
from memplan.errors import MemplanError, RecipeError, SpecError, UnsupportedArchitecture
from memplan.importers.hf import spec_from_config, supported_architectures
from memplan.importers.resolve import resolve, resolve_config
from memplan.predict.parameters import resolve_recipe
from memplan.resources import data_file

ENTRIES = json.loads(data_file("model_specs.json").read_bytes())["models"]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "Olmo2ForCausalLM": "olmo2",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "GptOssForCausalLM": "gpt_oss",
    "GemmaForCausalLM": "gemma",
    "Olmo3ForCausalLM": "olmo3",
    "SmolLM3ForCausalLM": "smollm3",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "GraniteForCausalLM": "granite",
    "Glm4MoeForCausalLM": "glm4_moe",
    "SeedOssForCausalLM": "seed_oss",
    "Gemma4ForCausalLM": "gemma4_text",
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere2",
    "StableLmForCausalLM": "stablelm",
    "Qwen2MoeForCausalLM": "qwen2_moe",
}
NEEDS = {"Gemma4ForCausalLM": {"hidden_size_per_layer_input": 0}}  # whose default is not predicted
LINEAR = ("qwen3_5_text", "qwen3_5_moe_text")
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
}


def family(architecture: str, **fields: object) -> dict[str, Any]:
    """The smallest configuration of a family: sizes only, everything else left to the defaults."""
    needs = NEEDS.get(architecture, {})
    return {
        "architectures": [architecture], "model_type": MODEL_TYPES[architecture], **SIZES, **needs, **fields
    }  # fmt: skip


def read(config: object) -> ModelSpec:
    return spec_from_config(config, "a model")  # type: ignore[arg-type]


# -- published models ------------------------------------------------------------------------------------


WITH_BIASES = ("stablelm",)  # their norms


def parameters(spec: ModelSpec) -> int:
    """Parameters by the shapes of transformers' modules, tied weights counted once."""
    if spec.model_type == "gemma4_text":
        return gemma4(spec)
    h, q, kv = (
        spec.hidden_size,
        spec.num_attention_heads * spec.head_dim,
        spec.num_key_value_heads * spec.head_dim,
    )
    attention = 2 * h * q + 2 * h * kv
    if spec.attention_bias:
        attention += (
            q
            + 2 * kv
            + (0 if spec.model_type in ("qwen2", "qwen2_moe", "glm4_moe", "seed_oss", "stablelm") else h)
        )
    attention += spec.attention_out_bias * h
    if spec.model_type in LINEAR:
        attention += h * q  # gates
    if spec.model_type in ("qwen3", "qwen3_moe", "qwen3_vl", "gemma3_text", *LINEAR):
        attention += 2 * spec.head_dim  # q and k norms
    if spec.model_type in ("olmo2", "olmo3"):
        attention += q + kv
    if spec.model_type == "glm4_moe":
        attention += 2 * spec.head_dim * spec.use_qk_norm
    if spec.model_type == "cohere":
        attention += spec.use_qk_norm * (q + kv)
    norms = {"gemma2": 4, "gemma3_text": 4, "cohere": 1, "cohere2": 1}.get(spec.model_type, 2)
    norms -= spec.use_parallel_residual
    norm = 2 * h if spec.model_type in WITH_BIASES else h
    dense = 3 * h * spec.intermediate_size + spec.mlp_bias * (2 * spec.intermediate_size + h)
    sparse = spec.num_experts * (h + 3 * h * spec.moe_intermediate_size)
    sparse += 3 * h * spec.shared_expert_intermediate_size + (spec.model_type == "qwen2_moe") * h
    if spec.model_type == "gpt_oss":
        attention += spec.num_attention_heads  # sinks
        sparse += spec.num_experts * (1 + 2 * spec.moe_intermediate_size + h)  # biases
    if spec.model_type in LINEAR:
        sparse += h * bool(spec.shared_expert_intermediate_size)  # its gate
    linear = spec.layer_types.count("linear_attention")
    experts = sum(spec.sparse_layers)
    return (
        (1 if spec.tie_word_embeddings else 2) * spec.vocab_size * h
        + (spec.num_hidden_layers - linear) * attention
        + linear * linear_attention(spec)
        + spec.num_hidden_layers * norms * norm
        + experts * sparse
        + (spec.num_hidden_layers - experts) * dense
        + norm
        + (0 if spec.vision is None else tower(spec.vision))
    )


def tower(sees: Vision) -> int:
    """Of ``Qwen3VLVisionModel``."""
    width, inner, wide = sees.hidden_size, sees.intermediate_size, sees.hidden_size * sees.merge_size**2
    patch = sees.channels * sees.temporal_patch_size * sees.patch_size**2
    block = 4 * width * (width + 1) + inner * (width + 1) + width * (inner + 1) + 4 * width
    merger = wide * (wide + 1) + sees.out_hidden_size * (wide + 1)
    found = width * (patch + 1) + sees.num_positions * width + sees.depth * block + merger + 2 * width
    return found + len(sees.deepstack) * (merger + 2 * wide)


def gemma4(spec: ModelSpec) -> int:
    """Of ``Gemma4ForCausalLM``."""
    h, heads, count = spec.hidden_size, spec.num_attention_heads, spec.num_experts
    found = spec.vocab_size * h + h
    for kind in spec.layer_types:
        wide = kind == "full_attention"
        head = (spec.global_head_dim or 0) if wide else spec.head_dim
        shared = (spec.num_global_key_value_heads if wide else None) or spec.num_key_value_heads
        projections = 1 if wide and spec.attention_k_eq_v else 2  # beside queries
        found += 2 * h * heads * head + projections * h * shared * head + 2 * head
        found += 3 * h * spec.intermediate_size + 4 * h
        if count:
            found += count * 3 * h * spec.moe_intermediate_size + 3 * h + h + count + h * count
    return found


def linear_attention(spec: ModelSpec) -> int:
    """Of ``Qwen3_5GatedDeltaNet``."""
    heads = spec.linear_value_heads
    key, value = spec.linear_key_heads * spec.linear_key_dim, heads * spec.linear_value_dim
    channels = 2 * key + value
    projections = spec.hidden_size * (channels + value + 2 * heads) + value * spec.hidden_size
    return projections + channels * spec.linear_conv_kernel + 2 * heads + spec.linear_value_dim


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["alias"])
def test_shapes_add_up_to_the_published_parameter_count(entry: dict[str, Any]) -> None:
    spec = spec_from_config(entry["config"], entry["alias"], entry["hub_id"], entry["parameters"])
    assert parameters(spec) == entry["parameters"] == spec.published_parameters
    assert (spec.name, spec.hub_id) == (entry["alias"], entry["hub_id"])


BIAS = {"stablelm": "use_qkv_bias", "qwen2_moe": "qkv_bias"}
_NO_WINDOW = (
    "llama", "olmo2", "gemma", "granite", "glm4_moe", "seed_oss", "cohere", "stablelm", "qwen3_vl_text",
)  # fmt: skip

# -- against transformers --------------------------------------------------------------------------------


def transformers_facts(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers' own configuration object and modelling code make of a config.json."""
    transformers = pytest.importorskip("transformers")

    fields = {
        key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "model_type")
    }
    theirs = transformers.AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(fields)))
    whole, theirs = theirs, theirs.get_text_config()
    model_type, layers = theirs.model_type, theirs.num_hidden_layers
    window = getattr(theirs, "sliding_window", None)
    if model_type in LINEAR or (model_type == "smollm3" and not theirs.use_sliding_window):
        window = None
    gemmas = ("gemma2", "gemma3_text", "gemma4_text")
    lists = ("qwen2", "qwen3", "gpt_oss", "olmo3", "smollm3", "cohere2", "qwen2_moe", *gemmas, *LINEAR)
    if model_type in lists:
        kinds = theirs.layer_types
    else:  # one mask for all layers; llama and olmo2 have no windows at all
        window = None if model_type in _NO_WINDOW else window
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    derived = theirs.hidden_size // theirs.num_attention_heads
    if model_type == "gemma4_text":  # of those that slide
        theirs.allow_global_per_layer_attribute_access = True

    rope = theirs.rope_parameters
    per_kind = [kind for kind in sorted(set(kinds)) if model_type in (*gemmas[1:], "olmo3")] or [None]
    longrope = any((rope if kind is None else rope[kind])["rope_type"] == "longrope" for kind in per_kind)

    facts = {
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "intermediate_size": getattr(
            theirs, "moe_intermediate_size" if model_type == "qwen3_5_moe_text" else "intermediate_size"
        ),
        "num_hidden_layers": layers,
        "num_attention_heads": theirs.num_attention_heads,
        "num_key_value_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or derived,
        "max_position_embeddings": theirs.max_position_embeddings,
        "tie_word_embeddings": whole.tie_word_embeddings,
        "hidden_act": (theirs.hidden_activation if model_type in gemmas else theirs.hidden_act),
        "attention_dropout": theirs.attention_dropout,
        "sliding_window": window,
        "layer_types": tuple(kinds),
        "longrope": longrope,
        "attention_bias": {"qwen2": True, "mistral": False, "mixtral": False, "phi3": False}.get(
            model_type, getattr(theirs, BIAS.get(model_type, "attention_bias"), None)
        ),
    }
    if model_type in ("llama", "smollm3", "granite", "seed_oss"):
        facts["mlp_bias"] = theirs.mlp_bias
    if model_type == "seed_oss":
        facts["residual_dropout"] = theirs.residual_dropout
        facts["attention_out_bias"] = theirs.attention_out_bias
    if model_type in ("cohere", "cohere2"):
        facts["logit_scale"] = theirs.logit_scale
    if model_type == "cohere":
        facts["use_qk_norm"] = theirs.use_qk_norm
    if model_type == "cohere2":
        facts["rotated_layers"] = tuple(kind == "sliding_attention" for kind in kinds)
    if model_type == "granite":
        facts["logits_scaling"] = theirs.logits_scaling
    if model_type == "smollm3":
        facts["rotated_layers"] = tuple(map(bool, theirs.no_rope_layers[:layers]))
    if model_type in LINEAR:
        facts["partial_rotary_factor"] = rope["partial_rotary_factor"]
        facts["linear_key_heads"] = theirs.linear_num_key_heads
        facts["linear_value_heads"] = theirs.linear_num_value_heads
        facts["linear_key_dim"] = theirs.linear_key_head_dim
        facts["linear_value_dim"] = theirs.linear_value_head_dim
        facts["linear_conv_kernel"] = theirs.linear_conv_kernel_dim
    if model_type == "qwen3_5_moe_text":
        facts["shared_expert_intermediate_size"] = theirs.shared_expert_intermediate_size
        facts["router_aux_loss_coef"] = theirs.router_aux_loss_coef
        facts["sparse_layers"] = (True,) * layers
    if model_type == "stablelm":
        facts["partial_rotary_factor"] = rope["partial_rotary_factor"]
        facts["resid_dropout"] = theirs.hidden_dropout
        facts["use_parallel_residual"] = theirs.use_parallel_residual
        facts["head_dim"] = derived
    if model_type == "glm4_moe":
        facts["partial_rotary_factor"] = rope["partial_rotary_factor"]
        facts["use_qk_norm"] = theirs.use_qk_norm
        facts["num_experts"] = theirs.n_routed_experts
        facts["num_experts_per_tok"] = theirs.num_experts_per_tok
        facts["moe_intermediate_size"] = theirs.moe_intermediate_size
        facts["shared_expert_intermediate_size"] = theirs.moe_intermediate_size * theirs.n_shared_experts
        facts["norm_topk_prob"] = theirs.norm_topk_prob
        facts["n_group"], facts["topk_group"] = theirs.n_group, theirs.topk_group
        facts["sparse_layers"] = tuple(layer >= theirs.first_k_dense_replace for layer in range(layers))
    if model_type == "phi3":
        facts["resid_dropout"] = theirs.resid_pdrop
        facts["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if model_type in gemmas:
        facts["final_logit_softcapping"] = theirs.final_logit_softcapping
    if model_type in ("gemma2", "gemma3_text"):
        facts["attn_logit_softcapping"] = theirs.attn_logit_softcapping
    if model_type == "gemma4_text":
        wide = theirs.per_layer_config[layers - 1]
        facts["global_head_dim"] = wide.head_dim
        facts["attention_k_eq_v"] = theirs.attention_k_eq_v
        facts["num_experts"] = theirs.num_experts if theirs.enable_moe_block else 0
        facts["num_experts_per_tok"] = theirs.top_k_experts if theirs.enable_moe_block else 0
    if model_type in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "qwen3_5_moe_text"):
        facts["num_experts"] = theirs.num_experts
        facts["num_experts_per_tok"] = theirs.num_experts_per_tok
    if model_type == "qwen2_moe":
        facts["shared_expert_intermediate_size"] = theirs.shared_expert_intermediate_size
    if model_type in ("qwen2_moe", "qwen3_moe"):
        facts["moe_intermediate_size"] = theirs.moe_intermediate_size
        facts["norm_topk_prob"] = theirs.norm_topk_prob
        facts["sparse_layers"] = tuple(  # Qwen3MoeDecoderLayer.__init__
            layer not in theirs.mlp_only_layers
            and theirs.num_experts > 0
            and (layer + 1) % theirs.decoder_sparse_step == 0
            for layer in range(layers)
        )
    return facts


def ours(spec: ModelSpec, names: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in names}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["alias"])
def test_a_published_configuration_means_what_it_means_to_transformers(entry: dict[str, Any]) -> None:
    theirs = transformers_facts(entry["config"])
    assert ours(read(entry["config"]), theirs) == theirs


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    config = family(architecture)
    theirs = transformers_facts(config)
    assert ours(read(config), theirs) == theirs


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_attention_bias_is_what_the_q_projection_has(architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for asked in (False, True):
        layers = 4 if MODEL_TYPES[architecture] in LINEAR else 1  # of which the last is no linear one
        sizes = {"num_key_value_heads": 4, "num_hidden_layers": layers, "pad_token_id": None}
        config = family(architecture, attention_bias=asked, **sizes)
        theirs = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(theirs)
        attention = model.model.layers[-1].self_attn
        projection = attention.qkv_proj if architecture == "Phi3ForCausalLM" else attention.q_proj
        assert read(config).attention_bias == (projection.bias is not None)


OPTIONS: dict[str, list[Any]] = {
    "num_key_value_heads": [1, 4, 8, 32, None],
    "head_dim": [8, 64, 256, None],
    "max_position_embeddings": [4096, 1 << 20],
    "tie_word_embeddings": [True, False],
    "attention_dropout": [0.0, 0.1, 0],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "resid_pdrop": [0.0, 0.1],
    "sliding_window": [16, 4096, None],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 3, 28],
    "sliding_window_pattern": [1, 2, 6],
    "layer_types": [
        None,
        ["full_attention"] * 7,
        ["sliding_attention", "full_attention", "attention"] * 2 + ["full_attention"],
        ["linear_attention"] * 5 + ["full_attention", "linear_attention"],
    ],
    "full_attention_interval": [1, 2, 4],
    "linear_num_value_heads": [16, 32, 48],
    "attn_logit_softcapping": [None, 20.0],
    "final_logit_softcapping": [None, 20.0],
    "num_experts": [2, 4],
    "num_local_experts": [2, 4],
    "num_experts_per_tok": [1, 2],
    "moe_intermediate_size": [64],
    "logits_scaling": [1, 8.0],
    "use_qkv_bias": [True, False],
    "use_parallel_residual": [True, False],
    "hidden_dropout": [0.0, 0.1],
    "logit_scale": [0.0625, 0.25],
    "residual_dropout": [0.0, 0.2],
    "attention_out_bias": [True, False],
    "n_routed_experts": [4, 16],
    "shared_expert_intermediate_size": [32, 96],
    "qkv_bias": [True, False],
    "n_shared_experts": [1, 2],
    "n_group": [1, 2],
    "topk_group": [1, 2],
    "first_k_dense_replace": [0, 1, 3],
    "use_qk_norm": [True, False],
    "norm_topk_prob": [True, False],
    "decoder_sparse_step": [1, 2, 3],
    "mlp_only_layers": [None, [], [0, 5]],
    "partial_rotary_factor": [0.5, 0.75, 1.0],
    "original_max_position_embeddings": [2048, 4096],
    "rope_theta": [10000.0, 1e6],
    "rope_scaling": [
        None,
        {"rope_type": "linear", "factor": 8.0},
        {"type": "dynamic", "factor": 2.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {"rope_type": "yarn", "factor": 1.0},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0},
        {"type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        {"type": "su", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
    ],
    "rope_parameters": [
        None,
        {"full_attention": {"rope_type": "yarn", "factor": 4.0}, "sliding_attention": None},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "yarn", "factor": 4.0},
    ],
}


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    architecture=st.sampled_from(list(MODEL_TYPES)),
    changes=st.dictionaries(st.sampled_from(list(OPTIONS)), st.integers(0, 10), max_size=6),
)
def test_whatever_both_accept_means_the_same_to_both(architecture: str, changes: dict[str, int]) -> None:
    config = family(architecture)
    config.update({key: OPTIONS[key][choice % len(OPTIONS[key])] for key, choice in changes.items()})
    try:
        spec = read(config)
    except MemplanError:
        return
    logging.disable(logging.WARNING)
    try:
        theirs = transformers_facts(config)
    except pytest.skip.Exception:
        raise
    except Exception:  # transformers refuses it, or its model would fail when built: nothing to plan
        return
    finally:
        logging.disable(logging.NOTSET)
    assert ours(spec, theirs) == theirs


# -- what published files look like ----------------------------------------------------------------------


def test_both_spellings_of_rope_are_read() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    plain = read({**LLAMA, "rope_scaling": None})
    assert read({**LLAMA, "rope_scaling": scaling, "rope_theta": 1e6}) == plain
    assert read({**LLAMA, "rope_parameters": {**scaling, "rope_theta": 1e6}}) == plain


def test_both_names_of_longrope_are_read() -> None:
    # type "su" in Phi-3's first published files, "longrope" since
    for kind in ("su", "longrope"):
        config = family(
            "Phi3ForCausalLM",
            max_position_embeddings=131072,
            rope_scaling={"type": kind, "long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        )
        assert read(config).longrope


def test_gemma_3_with_images_is_read_as_its_language_model() -> None:
    # google/gemma-3-4b-it as published: everything else is left to the defaults of the class
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152},
    }
    spec = read(config)
    assert spec.architecture == "Gemma3ForCausalLM"
    assert (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim) == (8, 4, 256)
    assert (spec.vocab_size, spec.tie_word_embeddings) == (262208, True)
    assert spec.layer_types[4:6] == ("sliding_attention", "full_attention")
    assert parameters(spec) == 3_880_263_168
    del config["architectures"]
    assert read(config) == spec


FOUR_BITS = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "vision_tower.layers.0.self_attn"],
}


def test_a_quantised_checkpoint_has_the_shapes_of_the_original_and_its_own_settings() -> None:
    spec = read({**LLAMA, "quantization_config": FOUR_BITS})
    assert spec.model_copy(update={"quantization": None}) == read(LLAMA)
    assert spec.quantization == Quantization(quant_type="nf4", double_quant=True, compute_dtype="bfloat16")
    bare = read({**LLAMA, "quantization_config": {"_load_in_4bit": True}}).quantization
    assert bare == Quantization(quant_type="fp4", double_quant=False, compute_dtype="float32")


def test_the_settings_of_a_checkpoint_in_four_bits_are_those_of_the_plan() -> None:
    given = {**FOUR_BITS, "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "torch.float32"}
    small = {**LLAMA, "num_hidden_layers": 2}
    answer = plan(read({**small, "quantization_config": given}), Recipe(seq_len=64), gpus=[])
    said = Recipe(seq_len=64, double_quant=False, compute_dtype="float32")
    assert answer.peak.by_category == plan(read(small), said, gpus=[]).peak.by_category
    assert answer.recipe == plan(read(small), said, gpus=[]).recipe
    resolved = resolve_recipe(read({**small, "quantization_config": given}), answer.recipe)
    assert resolved == answer.recipe


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "lora"}, "adapters on them are QLoRA: give --mode qlora"),
        ({"mode": "full"}, "nothing trains them in full: give --mode qlora"),
        (
            {"double_quant": False},
            "quantised already, with double_quant True, and transformers keeps to that",
        ),
        ({"quant_type": "fp4"}, "with quant_type nf4"),
        ({"compute_dtype": "float32"}, "with compute_dtype bfloat16"),
    ],
)
def test_what_contradicts_a_checkpoint_in_four_bits_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        plan(read({**LLAMA, "quantization_config": FOUR_BITS}), Recipe(**options), gpus=[])


def test_experts_in_four_bits_are_left_to_a_dry_run() -> None:
    spec = read({**config("qwen3_moe", 2), "quantization_config": FOUR_BITS})
    with pytest.raises(RecipeError, match=r"holds experts in 4 bits.*memplan dry-run"):
        plan(spec, gpus=[])


def test_an_architecture_may_be_known_by_its_model_type_alone() -> None:
    assert read({**LLAMA, "architectures": None}) == read(LLAMA)
    assert read({key: value for key, value in LLAMA.items() if key != "model_type"}) == read(LLAMA)


# -- what makes no sense ---------------------------------------------------------------------------------

BAD = {
    "missing size": ({"hidden_size": None}, "hidden_size is null"),
    "zero": ({"num_hidden_layers": 0}, "whole number from 1"),
    "negative": ({"vocab_size": -1}, "vocab_size is -1"),
    "a fraction": ({"intermediate_size": 14336.5}, "intermediate_size is 14336.5"),
    "a float": ({"hidden_size": 4096.0}, "hidden_size is 4096.0, but it must be a whole number"),
    "a bool": ({"num_attention_heads": True}, "num_attention_heads is true"),
    "a string": ({"hidden_size": "4096"}, "hidden_size is '4096'"),
    "NaN": ({"hidden_size": math.nan}, "hidden_size is nan"),
    "infinite": ({"attention_dropout": math.inf}, "attention_dropout is inf"),
    "huge": ({"hidden_size": 10**30}, "more than 19 digits"),
    "too deep": (
        {"num_hidden_layers": 321},
        "num_hidden_layers is 321, but it must be a whole number from 1 to 320",
    ),
    "absurd": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "a list": ({"vocab_size": [1]}, "vocab_size is a list"),
    "indivisible": ({"num_attention_heads": 33}, "must be a multiple of num_attention_heads (33)"),
    "uneven groups": ({"num_key_value_heads": 5}, "no multiple of num_key_value_heads (5)"),
    "odd heads": ({"head_dim": 65}, "need an even one"),
    "certain dropout": ({"attention_dropout": 1}, "from 0 to below 1"),
    "a word for a bool": ({"tie_word_embeddings": "yes"}, "must be true or false"),
    "no object": ({"rope_scaling": [1]}, "rope_scaling is a list, but it must be an object"),
    "unknown rope": ({"rope_scaling": {"type": "spiral"}}, "rope_type is 'spiral'"),
    "empty rope range": (
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}},
        "original_max_position_embeddings is 0",
    ),
    "no architecture": ({"architectures": [], "model_type": None}, "neither architectures nor model_type"),
    "two answers": ({"model_type": "mistral"}, "the two agree when model_type is 'llama'"),
    "wrong model type": ({"model_type": 3}, "model_type is 3"),
    "wrong architectures": ({"architectures": "LlamaForCausalLM"}, "must be a list of strings"),
    "wrong activation": ({"hidden_act": 1}, "hidden_act is 1"),
}


@pytest.mark.parametrize(("changes", "said"), BAD.values(), ids=BAD)
def test_a_bad_configuration_is_one_clear_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        read({**LLAMA, **changes})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_every_published_file_states_is_never_guessed(key: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name != key}
    with pytest.raises(SpecError, match=f"{key} is missing"):
        read(config)


@pytest.mark.parametrize("config", [[LLAMA], "llama", 7, None, True, 1.5])
def test_only_an_object_is_a_configuration(config: object) -> None:
    with pytest.raises(SpecError, match="must be a JSON object"):
        read(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": None, "model_type": "mamba"},
        {"is_encoder_decoder": True},
        {"use_bidirectional_attention": True},
        {"output_router_logits": True},
        {"per_layer_config": {"0": {"head_dim": 64}}},
        {"hidden_act": "relu2"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_is_not_supported_says_what_is(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedArchitecture) as caught:
        read({**LLAMA, **changes})
    assert any(
        word in str(caught.value) for word in (*supported_architectures(), "supports", "predicts only")
    )


def test_sliding_layers_need_a_window_and_one_entry_a_layer() -> None:
    with pytest.raises(SpecError, match="no sliding_window"):
        read(family("Gemma2ForCausalLM", sliding_window=None))
    with pytest.raises(SpecError, match="layer_types has 2 entries, but num_hidden_layers is 7"):
        read(family("Qwen3ForCausalLM", layer_types=["full_attention"] * 2))
    with pytest.raises(UnsupportedArchitecture, match="linear_attention"):
        read(family("Qwen3ForCausalLM", layer_types=["linear_attention"] * 7))


def test_gemma_4_is_read_as_transformers_writes_it() -> None:
    """``save_pretrained`` writes what layers with full attention have by layer (``per_layer_config``)."""
    transformers = pytest.importorskip("transformers")
    for name in ("gemma4", "gemma4_moe"):
        small = config(name, 12)
        written = json.loads(transformers.AutoConfig.for_model(**small).to_json_string())
        assert written["per_layer_config"].keys() == {"05", "11"}
        assert read(written) == read(small)
        alike = read({**small, "per_layer_config": None})  # transformers takes it at its word
        assert (alike.global_head_dim, alike.num_global_key_value_heads) == (alike.head_dim, None)


@pytest.mark.parametrize(
    "per_layer",
    [
        {"0": {"head_dim": 64}},
        {"x": {"head_dim": 64}},
        {"5": {"head_dim": 64}},
        {"5": {"head_dim": 64}, "11": {"head_dim": 128}},
        {"5": {"intermediate_size": 64}, "11": {"intermediate_size": 64}},
        {"5": 64, "11": 64},
        {"5": [], "11": []},
    ],
    ids=str,
)
def test_layers_of_gemma_4_differ_by_kind_alone(per_layer: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedArchitecture, match="says more than"):
        read({**config("gemma4", 12), "per_layer_config": per_layer})


def test_wide_heads_of_gemma_4_are_checked() -> None:
    with pytest.raises(SpecError, match="head_dim is 0"):
        read({**config("gemma4", 6), "per_layer_config": {"5": {"head_dim": 0}}})


def test_a_router_cannot_choose_more_experts_than_there_are() -> None:
    with pytest.raises(SpecError, match=r"num_experts_per_tok \(9\) must lie between 1 and"):
        read(family("MixtralForCausalLM", num_experts_per_tok=9))


# -- anything at all -------------------------------------------------------------------------------------

KEYS = sorted(
    {
        *LLAMA,
        *OPTIONS,
        "hidden_act",
        "hidden_activation",
        "text_config",
        "is_encoder_decoder",
        "factor",
        "type",
    }
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*MODEL_TYPES, *MODEL_TYPES.values(), "yarn", "longrope", "sliding_attention", "gelu"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


def never_anything_else(config: object) -> None:
    try:
        spec = read(config)
    except MemplanError as error:
        sentence = str(error)
    else:
        sentence = spec.name
        assert len(spec.layer_types) == spec.num_hidden_layers
        assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    assert sentence
    assert "\n" not in sentence
    sentence.encode()  # no lone surrogate reaches a terminal


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_json_is_a_spec_or_a_memplan_error(value: object) -> None:
    never_anything_else(value)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    architecture=st.sampled_from(list(supported_architectures())),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON | st.integers(0, 40), max_size=3),
    dropped=st.sets(st.sampled_from(KEYS), max_size=1),
)
def test_any_mutation_is_a_spec_or_a_memplan_error(
    architecture: str, changes: dict[str, Any], dropped: set[str]
) -> None:
    if architecture in MODEL_TYPES:
        config: dict[str, Any] = family(architecture)
    else:
        config = {"architectures": [architecture], "text_config": {**SIZES, **changes}}
    config.update(changes)
    never_anything_else({key: value for key, value in config.items() if key not in dropped})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "holds GPTQ weights, which memplan doesn't plan: `memplan dry-run",
        ),
        ({"quant_method": "awq"}, "holds AWQ weights"),
        ({"quant_method": "fp8"}, "holds FP8 weights"),
        ({"quant_method": "fbgemm_fp8"}, "holds FP8 weights"),
        ({"quant_method": "mxfp4"}, "holds MXFP4 weights"),
        ({"quant_method": "compressed-tensors"}, "holds compressed-tensors weights"),
        ({"quant_method": "of_my_own"}, "holds 'of-my-own' weights"),
        ({}, "holds quantised weights"),
        ({"load_in_8bit": True}, "holds 8-bit bitsandbytes weights"),
        ({**FOUR_BITS, "load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit"),
        ({**FOUR_BITS, "bnb_4bit_quant_type": "nf5"}, "'nf5', but it must be nf4 or fp4"),
        ({**FOUR_BITS, "bnb_4bit_compute_dtype": 8}, "'8', but it must be one of bfloat16"),
        (
            {**FOUR_BITS, "llm_int8_skip_modules": ["lm_head", "model.layers.3.mlp.down_proj"]},
            "but for 1 of its layers",
        ),
        ("gptq", "has a quantization_config that is 'gptq', not an object"),
        ([1], "has a quantization_config that is a list, not an object"),
    ],
)
@pytest.mark.parametrize("command", [resolve, plan])
def test_a_checkpoint_of_another_kind_is_one_clear_sentence(
    command: Callable[..., Any], given: Any, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "quantization_config": given}), encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        command(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trace_says_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "quantization_config": {"quant_method": "mxfp4"}}))
    assert "its quantization_config (MXFP4) is not traced" in str(resolve_config(path).note)


def test_a_mixture_without_a_layer_of_experts_is_dense() -> None:
    spec = SPECS["qwen3_moe"](3)
    dense = spec_from_config({**config("qwen3_moe", 3), "decoder_sparse_step": 1000}, "dense")
    assert (dense.num_experts, dense.sparse_layers) == (0, (False,) * 3)
    assert (
        plan(dense, Recipe(trainer="peft", mode="lora", seq_len=8)).parameters.total
        < plan(spec).parameters.total
    )


def test_a_factor_that_rotates_nothing() -> None:
    with pytest.raises(SpecError, match=r"partial_rotary_factor is 0\.001, which rotates nothing"):
        spec_from_config({**config("phi3", 2), "partial_rotary_factor": 0.001}, "x")


def test_a_tower_is_as_its_configuration_says() -> None:
    transformers = pytest.importorskip("transformers")
    config = next(entry["config"] for entry in ENTRIES if entry["alias"] == "qwen3-vl-2b")
    bare = {**config, "vision_config": {"out_hidden_size": 2048}}
    for one in (config, bare):
        sees = read(one).vision
        theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(one))).vision_config
        assert sees is not None
        facts = {
            "depth": "depth", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
            "num_heads": "num_heads", "hidden_act": "hidden_act", "channels": "in_channels",
            "patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size",
            "merge_size": "spatial_merge_size", "out_hidden_size": "out_hidden_size",
            "num_positions": "num_position_embeddings",
        }  # fmt: skip
        assert {our: getattr(sees, our) for our in facts} == {
            our: getattr(theirs, their) for our, their in facts.items()
        }
        assert sees.deepstack == tuple(theirs.deepstack_visual_indexes)


@pytest.mark.parametrize(
    ("sees", "told"),
    [
        (None, "vision_config is missing"),
        ({"out_hidden_size": 1024}, "out_hidden_size is 1024, but the decoder's hidden_size is 2048"),
        ({"out_hidden_size": 2048, "hidden_size": 1000}, "must be a multiple of four times num_heads"),
        ({"out_hidden_size": 2048, "deepstack_visual_indexes": [99]}, "must list blocks from 0 to 26"),
        ({"out_hidden_size": 2048, "hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_a_tower_that_is_none(sees: dict[str, Any] | None, told: str) -> None:
    config = next(entry["config"] for entry in ENTRIES if entry["alias"] == "qwen3-vl-2b")
    with pytest.raises(SpecError, match=told):
        read({**config, "vision_config": sees})


@pytest.mark.parametrize("size", [(1024, 1024), (640, 480), (33, 31), (5000, 100), (20_000, 9000), (1, 200)])
def test_patches_are_the_processors(size: tuple[int, int]) -> None:
    """Qwen's ``smart_resize``, whose module needs torchvision: its bounds and what it keeps."""
    from memplan import towers

    sees = read(next(entry["config"] for entry in ENTRIES if entry["alias"] == "qwen3-vl-8b")).vision
    assert sees is not None
    grid = towers.find("qwen3_vl").grid(sees, *size)
    pixels = grid.patches * sees.patch_size**2
    assert 256 * 256 <= pixels <= 4096 * 4096
    assert grid.tokens * sees.merge_size**2 == grid.patches
    if 256 * 256 <= size[0] * size[1] <= 4096 * 4096:
        assert abs(grid.columns * sees.patch_size - size[0]) <= sees.patch_size
        assert abs(grid.rows * sees.patch_size - size[1]) <= sees.patch_size
