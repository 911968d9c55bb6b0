"""Checkpoints that take no disk, as the Hub has them, and as a program that is dry-run is served them."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Outcome
from fake_hub import hub

from memplan.emulate.launch import HOOK
from memplan.emulate.rows import length, write_rows
from memplan.errors import MemplanError

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
    with path.open("rb") as file:
        found: dict[str, Any] = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: value for name, value in found.items() if name != "__metadata__"}


@pytest.fixture
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("empty_home")
def test_of_a_hub_id_only_the_headers_of_its_weights_are_read(
    memplan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    with hub(NAME, FILES) as (address, asked):
        monkeypatch.setenv("HF_ENDPOINT", address)
        outcome: Outcome = memplan("stub", NAME, tmp_path / "made", "--python", sys.executable)
    assert (outcome.status, outcome.err) == (0, "")
    made = tmp_path / "made"
    assert {str(file.relative_to(made)) for file in made.rglob("*") if file.is_file()} == {
        "config.json",
        "sub/model.safetensors",
    }
    shard = made / "sub" / "model.safetensors"
    assert header(shard) == HEADER
    assert shard.stat().st_size >= 4 << 20 > 512 * shard.stat().st_blocks
    assert sorted(asked) == ["config.json", "sub/model.safetensors bytes=0-100000"]


@pytest.mark.usefixtures("empty_home")
def test_a_hub_that_does_not_know_it_leaves_the_registry(
    memplan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    with hub(NAME, FILES) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        outcome: Outcome = memplan(
            "stub", "HuggingFaceTB/SmolLM2-135M", tmp_path / "made", "--python", sys.executable
        )
    assert (outcome.status, outcome.err) == (0, "")
    assert "model.embed_tokens.weight" in header(tmp_path / "made" / "model.safetensors")


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


def test_rows_without_a_place_are_refused(memplan: Any, tmp_path: Path) -> None:
    outcome: Outcome = memplan("stub", "llama-8b", tmp_path / "made", "--lengths", "5")
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
