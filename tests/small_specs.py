"""Small models of every family, with true proportions; the number of layers is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from memplan import families
from memplan.asked.spec import ModelSpec
from memplan.families import find
from memplan.importers.hf import spec_from_config

_BASE = {
    "vocab_size": 999,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}

# every fourth layer has full attention; sizes that tell keys from values
_LINEAR = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 48,
    "linear_value_head_dim": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
}

# sizes that tell keys from values
_LATENT = {
    "num_key_value_heads": 8, "kv_lora_rank": 72, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16,
    "v_head_dim": 40, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 136,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama-tied": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 100},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64},
    "qwen3_5": {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "head_dim": 64, **_LINEAR,
    },
    "qwen3_5_moe": {
        "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text", "head_dim": 64,
        **_LINEAR, "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
        "text_config": {"head_dim": 64, "model_type": "qwen3_vl_text"},
        "vision_config": {
            "depth": 3, "hidden_size": 144, "intermediate_size": 536, "num_heads": 2, "out_hidden_size": 256,
            "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64, "model_type": "qwen3_vl",
        },
    },
    "gemma": {
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "head_dim": 64, "hidden_act": "gelu",
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 64, "sliding_window": 100,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 64,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 64,
        "sliding_window": 100, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64,
    },
    "gemma4": {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "head_dim": 32,
        "global_head_dim": 64, "num_key_value_heads": 4, "num_global_key_value_heads": 2,
        "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 100,
        "hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": 30.0,
    },
    "gemma4_moe": {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "head_dim": 32,
        "global_head_dim": 64, "hidden_size_per_layer_input": 0, "sliding_window": 100,
        "hidden_activation": "gelu_pytorch_tanh", "enable_moe_block": True, "num_experts": 8,
        "top_k_experts": 3, "moe_intermediate_size": 136,
    },
    "gemma4_e4b": {  # the last third of layers reuses keys and values
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "head_dim": 32,
        "global_head_dim": 64, "sliding_window": 100, "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 24,
        "vocab_size_per_layer_input": 777, "use_double_wide_mlp": True,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": 100, "pad_token_id": 0,
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "num_key_value_heads": 8},
    "olmo3": {
        "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "num_key_value_heads": 8,
        "sliding_window": 100,
    },
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "pad_token_id": 0},
    "seed_oss": {
        "architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "head_dim": 64,
        "attention_dropout": 0.0,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "embedding_multiplier": 12.0,
        "attention_multiplier": 0.02, "residual_multiplier": 0.22, "logits_scaling": 8.0,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
        "num_experts_per_tok": 2, "intermediate_size": 512,
    },
    "stablelm": {
        "architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "use_qkv_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "stablelm-parallel": {
        "architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "use_parallel_residual": True,
        "partial_rotary_factor": 0.5,
    },
    "cohere": {
        "architectures": ["CohereForCausalLM"], "model_type": "cohere", "use_qk_norm": True,
    },
    "cohere2": {"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "sliding_window": 100},
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "head_dim": 64,
        "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 136, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2,
    },
    "glm4_moe_lite": {
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", **_LATENT,
        "q_lora_rank": 96, "v_head_dim": 64, "n_shared_experts": 1,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **_LATENT,
        "q_lora_rank": 96, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", **_LATENT,
        "q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 1,
    },
    "deepseek_v2-grouped": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", **_LATENT,
        "q_lora_rank": 96, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
        "topk_method": "group_limited_greedy",
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "head_dim": 64,
        "sliding_window": 100, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 8,
        "num_experts_per_tok": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 192,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 64, "num_experts": 8,
        "num_experts_per_tok": 4, "moe_intermediate_size": 128, "norm_topk_prob": True,
    },
}  # fmt: skip


def config(family: str, layers: int) -> dict[str, Any]:
    """A config.json of the family."""
    own, sized = CONFIGS[family], {"num_hidden_layers": layers}
    if family == "gemma4_e4b":
        kinds = ["full_attention" if (layers - index) % 2 else "sliding_attention" for index in range(layers)]
        sized |= {"layer_types": kinds, "num_kv_shared_layers": layers // 3}
    if "text_config" in own:
        return {**own, "text_config": {**_BASE, **own["text_config"], **sized}}
    return {**_BASE, **own, **sized}


def _maker(family: str) -> Callable[[int], ModelSpec]:
    return lambda layers: spec_from_config(config(family, layers), family)


def suits(spec: ModelSpec, options: Mapping[str, object]) -> bool:
    """Whether the family runs with these options."""
    return options["loss"] != "liger" or families.find(spec.model_type).liger


SPECS = {family: _maker(family) for family in CONFIGS}


SPECS = {family: _maker(family) for family in CONFIGS}


def without_ligers_loss(spec: ModelSpec, options: dict[str, object]) -> None:
    """Which some families have not."""
    if options["loss"] == "liger" and not find(spec.model_type).liger:
        options["loss"] = "standard"
