"""Causal language models without a predicted plan, traced: docs/architectures.md says which can be.

The configurations are small and have the shape of published ones: what makes each architecture different is
switched on.
"""

from __future__ import annotations

import json
import re
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from programs import load

from memplan import families, libraries
from memplan.asked.recipe import Recipe
from memplan.errors import TraceError, UnsupportedArchitecture
from memplan.importers.hf import spec_from_config
from memplan.tape import Phase, replay, static_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in libraries.TESTED:
        pytest.importorskip(package)
    from memplan.trace import Traced, trace_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' warnings are theirs

BASE = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 999,
    "max_position_embeddings": 512,
}
GPT2 = {"n_embd": 256, "n_layer": 2, "n_head": 8, "vocab_size": 999, "n_positions": 512}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 999, "state_size": 16}
MAMBA2 = {
    "mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_n_groups": 1,
    "mamba_chunk_size": 32,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "bamba": BASE | MAMBA2 | {"attn_layer_indices": [1]},
    "biogpt": BASE,
    "bloom": {"hidden_size": 256, "n_layer": 2, "n_head": 8, "vocab_size": 999},
    "codegen": GPT2 | {"rotary_dim": 16},
    "dbrx": {
        "d_model": 256, "n_heads": 8, "n_layers": 2, "max_seq_len": 512, "vocab_size": 999,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 5e5},
        "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "exaone4": BASE | {"head_dim": 32},
    "falcon": {
        "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_kv_heads": 2,
        "new_decoder_architecture": True, "vocab_size": 999,
    },
    "glm4": BASE | {"head_dim": 32, "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {
        "hidden_size": 256, "num_layers": 2, "num_heads": 8, "vocab_size": 999, "window_size": 16,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt_neox": BASE | {"rotary_pct": 0.25},
    "gptj": GPT2 | {"rotary_dim": 16},
    "granitemoe": BASE | EXPERTS,
    "jamba": BASE | {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "jetmoe": BASE | {"kv_channels": 32, "num_local_experts": 4},
    "llama4_text": BASE | EXPERTS | {"head_dim": 32, "intermediate_size_mlp": 640},
    "mamba": MAMBA,
    "mamba2": MAMBA | {"num_heads": 16, "head_dim": 32, "n_groups": 1, "chunk_size": 32},
    "mpt": {"d_model": 256, "n_heads": 8, "n_layers": 2, "vocab_size": 999, "max_seq_len": 512},
    "nemotron": BASE,
    "olmo": BASE,
    "olmoe": BASE | {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": BASE | {"ffn_dim": 640, "word_embed_proj_dim": 256},
    "phi": BASE | {"partial_rotary_factor": 0.5},
    "phimoe": BASE | EXPERTS,
    "qwen3_next": BASE | {
        "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128, "linear_num_value_heads": 8, "linear_num_key_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": BASE | {
        "lru_width": 256, "attention_window_size": 16, "head_dim": 32, "num_hidden_layers": 3,
    },
    "starcoder2": BASE | {"sliding_window": 16},
}  # fmt: skip

# Steps token by token in Python, which the tracer has to follow: short sequences keep the tests fast.
_SEQUENTIAL = ("mamba", "jamba", "recurrent_gemma")

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architectures.md"
MODES = ("full", "lora", "qlora")
ROW = re.compile(r"^\| [^|]+ \| `(\w+)` \| (yes|no) \| (yes|no) \| (yes|no) \| ([^|]*) \|$", re.MULTILINE)
TOLD = {
    model_type: dict(zip((*MODES, "why"), cells, strict=True))
    for model_type, *cells in ROW.findall(PAGE.read_text(encoding="utf-8"))
}


def traced(model_type: str, **options: Any) -> Traced:
    tokens = 12 if model_type in _SEQUENTIAL else 48
    config = {"model_type": model_type, **CONFIGS[model_type]}
    return trace_model(config, Recipe(trainer="peft", seq_len=tokens, **options))


def test_the_page_has_a_row_for_each() -> None:
    assert set(TOLD) == set(CONFIGS)
    assert list(TOLD) == sorted(TOLD)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_none_has_a_predicted_plan(model_type: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=f"{model_type}.*--trace"):
        spec_from_config({"model_type": model_type, **CONFIGS[model_type]}, "it")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_page_says_which_can_be_traced(model_type: str, mode: str) -> None:
    if TOLD[model_type][mode] == "no":
        with pytest.raises(TraceError) as caught:
            traced(model_type, mode=mode)
        reasons = re.findall(r"`([^`]+)`", TOLD[model_type]["why"])
        assert any(reason in str(caught.value) for reason in reasons)
        return
    found = traced(model_type, mode=mode)
    tape = found.tape
    left = sum(tape.deltas) - sum(static_bytes(tape).values())
    assert 0 < left < 100_000 if model_type == "recurrent_gemma" else left == 0  # its layers keep their state
    layers = {segment.layer for segment in tape.segments if segment.phase is Phase.BACKWARD} - {None}
    assert layers == set(range(3 if model_type == "recurrent_gemma" else 2))
    assert replay(tape).allocated_bytes > sum(static_bytes(tape).values())
    assert 0 < found.trainable <= found.parameters
    assert (found.trainable == found.parameters) is (mode == "full")


@cache
def benchmark() -> ModuleType:
    return load("benchmarks_architectures", ROOT / "benchmarks" / "architectures.py")


def test_every_model_type_of_transformers_was_asked_about() -> None:
    rows = json.loads((ROOT / "data" / "architectures.json").read_text(encoding="utf-8"))["types"]
    assert [row["model_type"] for row in rows] == benchmark().types()
    assert {row["model_type"] for row in rows if row.get("predicted")} == set(families.names())


@pytest.mark.parametrize("model_type", ["apertus", "ctrl", "bert", "t5"])
def test_what_was_answered_is_so(model_type: str) -> None:
    rows = json.loads((ROOT / "data" / "architectures.json").read_text(encoding="utf-8"))["types"]
    assert benchmark().answer(model_type) == next(row for row in rows if row["model_type"] == model_type)


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [("mamba", ("in_proj", "x_proj")), ("mamba2", ("in_proj",)), ("llama4_text", "attention")],
)
def test_adapters_elsewhere(model_type: str, targets: Any) -> None:
    # what the page recommends where all-linear can't be
    assert traced(model_type, mode="lora", target_modules=targets).trainable > 0


def test_labels_of_classifiers_make_no_difference() -> None:
    """transformers makes a name for each, and a causal language model has none."""
    many = {"num_labels": 1 << 31, "id2label": {"0": "a"}, "problem_type": "regression"}
    recipe = Recipe(trainer="peft", seq_len=48)
    assert trace_model({"model_type": "gpt2"} | GPT2 | many, recipe).tape.sizes == traced("gpt2").tape.sizes


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "gpt2"} | GPT2 | {"n_layer": 1_000_000}, "n_layer is 1000000, .* 320 at most"),
        ({"model_type": "mpt", "n_layers": 1 << 40}, "n_layers is 1099511627776"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 321}}, "num_hidden_layers is 321"),
        ({"model_type": "llama", "num_key_value_heads": 1 << 30}, "num_key_value_heads is 1073741824"),
        ({"model_type": "llama", "hidden_size": 1 << 50}, "hidden_size is 1125899906842624"),
    ],
)
def test_counts_that_no_model_has_are_refused_before_anything_is_made(
    config: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(TraceError, match=complaint):
        trace_model(config, Recipe(trainer="peft", seq_len=32))


def test_a_model_of_modules_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("memplan.trace.modules"), "_MAX_MODULES", 30)
    with pytest.raises(TraceError, match="more than 30 modules"):
        traced("gpt2")


def test_gpt2_layers_are_quantised_though_they_are_no_linear_layers() -> None:
    # transformers 5 integrations/bitsandbytes.py replaces Conv1D, too
    found = traced("gpt2", mode="qlora", kbit_prep=False)
    assert sum(name == "quant_state.offset" for name in found.tape.operations) == 8
    assert found.parameters - found.trainable == sum(
        (999 * 256, 512 * 256, 2 * (12 * 256 * 256 + 13 * 256), 2 * 256)
    )
