"""Checkpoints that take no disk, as the Hub has them, and as a program that is dry-run is served them."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Outcome
from fake_hub import hub

from memplan.emulate.launch import HOOK
from memplan.emulate.rows import length, write_rows
from memplan.errors import MemplanError

Memplan = Callable[..., Outcome]
NAME = "somebody/small"
HEADER = {
    "w.weight": {"dtype": "F8_E4M3", "shape": [4, 1 << 20], "data_offsets": [0, 4 << 20]},
    "w.scale": {"dtype": "F32", "shape": [4], "data_offsets": [4 << 20, (4 << 20) + 16]},
}


def safetensors(header: dict[str, Any], size: int) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return struct.pack("<Q", len(text)) + text + bytes([1]) * size


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "sub/model.safetensors": safetensors(HEADER, (4 << 20) + 16),
    "pytorch_model.bin": b"\1" * 1000,
}


def header(path: Path) -> dict[str, Any]:
    """What a file of safetensors, or a folder's only one, says of its tensors."""
    path = path / "model.safetensors" if path.is_dir() else path
    with path.open("rb") as file:
        found: dict[str, Any] = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: value for name, value in found.items() if name != "__metadata__"}


@pytest.fixture
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stub_of(
    memplan: Memplan, empty_home: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], list[str]]:
    """Makes tmp_path/made of a Hub id, where the Hub has somebody/small; what was asked for."""
    pytest.importorskip("transformers")

    def make(hub_id: str) -> list[str]:
        with hub(NAME, FILES) as (address, asked):
            monkeypatch.setenv("HF_ENDPOINT", address)
            outcome = memplan("stub", hub_id, tmp_path / "made", "--python", sys.executable)
        assert (outcome.status, outcome.err) == (0, "")
        return asked

    return make


def test_of_a_hub_id_only_the_headers_of_its_weights_are_read(
    stub_of: Callable[[str], list[str]], tmp_path: Path
) -> None:
    asked = stub_of(NAME)
    made = tmp_path / "made"
    assert {str(file.relative_to(made)) for file in made.rglob("*") if file.is_file()} == {
        "config.json",
        "sub/model.safetensors",
    }
    shard = made / "sub" / "model.safetensors"
    assert header(shard) == HEADER
    assert shard.stat().st_size >= 4 << 20 > 512 * shard.stat().st_blocks
    assert sorted(asked) == ["config.json", "sub/model.safetensors bytes=0-100000"]


def test_a_hub_that_does_not_know_it_leaves_the_registry(
    stub_of: Callable[[str], list[str]], tmp_path: Path
) -> None:
    stub_of("HuggingFaceTB/SmolLM2-135M")
    assert "model.embed_tokens.weight" in header(tmp_path / "made")


# -- of a configuration ----------------------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 320,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.mark.slow
def test_a_checkpoint_of_holes_is_loaded_as_any_other(memplan: Memplan, config: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    outcome = memplan("stub", config, tmp_path / "made", "--layers", "1")
    assert (outcome.status, outcome.err) == (0, "")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert model.config.num_hidden_layers == 1
    assert not any(parameter.any() for parameter in model.parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    assert len(tokenizer("w1 w2 unknown")["input_ids"]) == 3
    assert len(tokenizer) == CONFIG["vocab_size"]  # a program may cut the embeddings to it
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "made"}


@pytest.mark.slow
def test_a_pipeline_of_several_components(memplan: Memplan, config: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    config.unlink()
    given = {
        "model_index.json": {
            "text_encoder": ["transformers", "CLIPTextModel"], "none": [None, None],
            "tokenizer": ["transformers", "CLIPTokenizer"], "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "DDPMScheduler"],
        },
        "tokenizer/tokenizer_config.json": {"model_max_length": 77},
        "scheduler/scheduler_config.json": {"_class_name": "DDPMScheduler"},
        "vae/config.json": {"_class_name": "AutoencoderKL", "block_out_channels": [32]},
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 32,
            "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 300,
        },
    }  # fmt: skip
    for name, content in given.items():
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "given" / name).write_text(json.dumps(content))
    assert memplan("stub", tmp_path / "given", tmp_path / "made", "--layers", "1").status == 2
    outcome = memplan("stub", tmp_path / "given", tmp_path / "made")
    assert (outcome.status, outcome.err) == (0, "")
    (words,) = (
        tensor
        for name, tensor in header(tmp_path / "made/text_encoder").items()
        if name.endswith("token_embedding.weight")
    )
    assert (words["dtype"], words["shape"]) == ("F32", [300, 32])
    assert header(tmp_path / "made/vae/diffusion_pytorch_model.safetensors")
    assert (
        json.loads((tmp_path / "made/tokenizer/tokenizer_config.json").read_text())["model_max_length"] == 77
    )
    assert (tmp_path / "made/scheduler/scheduler_config.json").exists()


@pytest.mark.slow
def test_text_is_tokens_whatever_class_a_model_has_its_tokenizer_made_by(
    memplan: Memplan, config: Path, tmp_path: Path
) -> None:
    """transformers 5 makes Qwen2's by a class of its own, which saw no words that it did not know."""
    transformers = pytest.importorskip("transformers")
    few = {**CONFIG, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    config.write_text(json.dumps(few))
    assert memplan("stub", config, tmp_path / "made", "--layers", "1").status == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    assert len(tokenizer("some words")["input_ids"]) >= 2
    assert max(tokenizer("Any words, in bytes: é")["input_ids"]) < CONFIG["vocab_size"]


@pytest.mark.slow
def test_experts_are_as_published_and_not_as_loaded(memplan: Memplan, config: Path, tmp_path: Path) -> None:
    """One by one in Qwen3's files, and in MXFP4's blocks and scales in gpt-oss': 32 numbers in 16 bytes."""
    pytest.importorskip("transformers", minversion="5.0")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    few = {**CONFIG, **experts, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    config.write_text(json.dumps(few))
    assert memplan("stub", config, tmp_path / "qwen").status == 0
    assert header(tmp_path / "qwen")["model.layers.0.mlp.experts.3.up_proj.weight"]["shape"] == [64, 64]
    assert memplan("stub", config, tmp_path / "merged", "--merged").status == 0
    assert header(tmp_path / "merged")["model.layers.0.mlp.experts.down_proj"]["shape"] == [4, 64, 64]
    few = {
        **CONFIG, "num_local_experts": 4, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    config.write_text(json.dumps(few))
    assert memplan("stub", config, tmp_path / "oss").status == 0
    found = header(tmp_path / "oss")
    assert found["model.layers.1.mlp.experts.gate_up_proj_blocks"]["shape"] == [4, 256, 2, 16]
    assert found["model.layers.1.mlp.experts.down_proj_scales"]["shape"] == [4, 64, 4]
    assert found["model.layers.1.mlp.experts.down_proj_scales"]["dtype"] == "U8"
    assert found["model.layers.1.mlp.experts.down_proj_bias"]["dtype"] == "BF16"


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False])
def test_a_checkpoint_in_4_bits_is_loaded_as_one(
    nested: bool, memplan: Memplan, config: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
           "bnb_4bit_use_double_quant": nested}  # fmt: skip
    config.write_text(json.dumps({**CONFIG, "quantization_config": how}))
    assert memplan("stub", config, tmp_path / "made").status == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", device_map="cpu")
    layer = model.model.layers[1].mlp.down_proj
    state = layer.weight.quant_state
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert (tuple(state.shape), state.quant_type, state.nested) == ((64, 128), "nf4", nested)
    assert layer.weight.shape == (64 * 128 // 2, 1)
    assert not isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)


@pytest.mark.slow
def test_a_checkpoint_that_takes_pictures(memplan: Memplan, config: Path, tmp_path: Path) -> None:
    """Its processor puts as many tokens for a picture as the model has patches of it."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    sees = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 64, "model_type": "qwen3_vl",
    }  # fmt: skip
    few = {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": 310,
        "text_config": {**CONFIG, "model_type": "qwen3_vl_text"}, "vision_config": sees,
    }  # fmt: skip
    config.write_text(json.dumps(few))
    outcome = memplan("stub", config, tmp_path / "made", "--layers", "1")
    assert (outcome.status, outcome.err) == (0, "")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "made")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}]
    text = processor.apply_chat_template(said)
    ids = processor(text=[text], images=[image.new("RGB", (320, 160))], return_tensors="pt")["input_ids"]
    assert int((ids == 310).sum()) == (320 // 32) * (160 // 32)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "made")
    assert model.config.text_config.num_hidden_layers == 1


def test_other_quantized_checkpoints_are_refused(memplan: Memplan, config: Path, tmp_path: Path) -> None:
    config.write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}}))
    outcome = memplan("stub", config, tmp_path / "made")
    assert outcome.status == 2
    assert "checkpoints quantized by 'bitsandbytes' can't be made" in outcome.err


def test_a_folder_with_something_in_it_is_left_alone(memplan: Memplan, config: Path, tmp_path: Path) -> None:
    outcome = memplan("stub", config, tmp_path)
    assert outcome.status == 2
    assert "is no empty folder" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_nothing_is_left_of_a_checkpoint_that_can_t_be_made(
    memplan: Memplan, config: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    config.write_text(json.dumps({**CONFIG, "model_type": "nonesuch"}))
    outcome = memplan("stub", config, tmp_path / "made", "--python", sys.executable)
    assert outcome.status == 2
    assert "transformers can't make this model" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# -- rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "least", "most", "mean"),
    [("2048", 2048, 2048, 2048), ("100-300", 100, 300, 200), ("lognormal:600,400,4096", 30, 4096, 600)],
)
def test_rows_have_the_lengths_that_were_asked_for(
    tmp_path: Path, text: str, least: int, most: int, mean: int
) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 320}')
    file = write_rows(tmp_path / "rows", 400, length(text), tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = [len(row["input_ids"]) for row in rows]
    assert len(rows) == 400 and least <= min(found) and max(found) <= most
    assert abs(sum(found) / 400 - mean) < mean / 10
    assert all(row["labels"] == row["input_ids"] and set(row["attention_mask"]) == {1} for row in rows)
    assert min(min(row["input_ids"]) for row in rows) > 0 and max(max(row["input_ids"]) for row in rows) < 320
    with pytest.raises(MemplanError, match="is there already"):
        write_rows(tmp_path / "rows", 1, length(text), tmp_path)


@pytest.mark.parametrize(
    "text", ["", "0", "9-3", "-5", "lognormal:600,400", "lognormal:0,1,9", "9999999", "2k"]
)
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(MemplanError, match="lengths are given as 2048, 100-1200 or lognormal:MEAN,SD,MAX"):
        length(text)


def test_rows_without_a_place_are_refused(memplan: Memplan, tmp_path: Path) -> None:
    outcome = memplan("stub", "llama-8b", tmp_path / "made", "--lengths", "5")
    assert outcome.status == 2 and "give it a folder" in outcome.err


# -- what serves them ------------------------------------------------------------------------------------


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """One with a checkpoint of somebody/small, and of nothing else."""
    monkeypatch.syspath_prepend(str(HOOK))
    serve = importlib.import_module("memplan_serve")
    made = serve.Shelf(str(tmp_path), "memplan")

    def make(repo_id: str) -> str | None:
        if repo_id != NAME:
            return None
        (tmp_path / "small").mkdir()
        (tmp_path / "small" / "config.json").write_text("{}")
        return str(tmp_path / "small")

    monkeypatch.setattr(made, "_make", make)
    yield made
    del sys.modules["memplan_serve"]


def hub_library(cached: dict[str, str]) -> SimpleNamespace:
    """What huggingface_hub does, without a network: it has what is cached."""
    return SimpleNamespace(
        _CACHED_NO_EXIST=object(),
        try_to_load_from_cache=lambda repo_id, filename, cache_dir=None, **_: cached.get(
            f"{repo_id}/{filename}"
        ),
        hf_hub_download=lambda repo_id, filename, **_: f"downloaded {repo_id}/{filename}",
        snapshot_download=lambda repo_id, **_: f"downloaded {repo_id}",
    )


def test_models_without_weights_are_served(shelf: Any, tmp_path: Path) -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    library = hub_library({})
    shelf.prepare_files(library)
    shelf.prepare_snapshots(library)
    place = str(tmp_path / "small")
    assert library.hf_hub_download(NAME, "config.json") == f"{place}/config.json"
    assert library.try_to_load_from_cache(NAME, "config.json") == f"{place}/config.json"
    assert library.try_to_load_from_cache(NAME, "none.json") is library._CACHED_NO_EXIST
    assert library.snapshot_download(NAME, allow_patterns=["*.json"]) == place
    with pytest.raises(errors.EntryNotFoundError, match="has no generation_config"):
        library.hf_hub_download(NAME, "generation_config.json")


def test_what_is_no_model_or_can_t_be_made_is_not_served(shelf: Any, tmp_path: Path) -> None:
    library = hub_library({})
    shelf.prepare_files(library)
    assert library.hf_hub_download(NAME, "x", repo_type="dataset") == f"downloaded {NAME}/x"
    assert library.hf_hub_download("other/one", "config.json") == "downloaded other/one/config.json"
    assert library.try_to_load_from_cache("other/one", "config.json") is None
    assert not (tmp_path / "small").exists()


def test_what_is_cached_with_its_weights_is_not_served(shelf: Any, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").touch()
    library = hub_library({f"{NAME}/config.json": str(snapshot / "config.json")})
    shelf.prepare_files(library)
    assert library.hf_hub_download(NAME, "config.json") == f"downloaded {NAME}/config.json"
    (snapshot / "model.safetensors").unlink()
    shelf.places.clear()
    assert library.hf_hub_download(NAME, "config.json") == str(tmp_path / "small" / "config.json")


def test_a_folder_without_weights_is_served(
    shelf: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.setattr(shelf, "_make", lambda name: f"made of {name}")
    library = SimpleNamespace(_get_resolved_checkpoint_files=lambda place, variant: (place, variant))
    shelf.prepare_transformers(library)
    resolve = library._get_resolved_checkpoint_files
    assert resolve(str(folder), None) == (str(folder), None)
    (folder / "config.json").touch()
    assert resolve(str(folder), None) == (f"made of {folder}", None)
    (folder / "model.safetensors.index.json").touch()
    assert resolve(str(folder), None) == (str(folder), None)
    assert resolve(NAME, "fp16") == (NAME, "fp16")


def test_questions_to_the_hub_about_what_is_served_stay_here(shelf: Any) -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    library = hub_library({})
    shelf.prepare_files(library)
    library.HfApi = type("HfApi", (), {"model_info": lambda self, repo_id, **_: f"asked {repo_id}"})
    shelf.prepare_api(library)
    assert library.HfApi().model_info(NAME) == f"asked {NAME}"
    library.hf_hub_download(NAME, "config.json")
    with pytest.raises(errors.OfflineModeIsEnabled):
        library.HfApi().model_info(NAME)
    assert library.HfApi().model_info("other/one") == "asked other/one"
