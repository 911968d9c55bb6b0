"""Every way to name a model, and one clear sentence for every way to get it wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import MemplanError, SpecError, UnknownName, UnsupportedArchitecture
from memplan.importers.resolve import registry, resolve

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty Hub cache, an empty working directory, no network."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)


def write(path: Path, content: object = TINY) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def sentence(model: Any) -> str:
    with pytest.raises(SpecError) as caught:
        resolve(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- aliases and Hub ids ---------------------------------------------------------------------------------


def test_llama_70b_is_llama_3_3_and_the_note_names_the_others() -> None:
    found = resolve("llama-70b")
    assert found.spec.hub_id == "meta-llama/Llama-3.3-70B-Instruct"
    assert found.note == (
        "llama-70b means llama-3.3-70b (meta-llama/Llama-3.3-70B-Instruct); "
        "other versions are llama-2-70b, llama-3-70b and llama-3.1-70b"
    )


@pytest.mark.parametrize("entry", registry(), ids=lambda entry: entry.alias)
def test_every_name_of_a_registered_model_finds_it(entry: Any) -> None:
    for name in (entry.alias, *entry.aliases, entry.hub_id, entry.alias.upper(), entry.hub_id.lower()):
        spec = resolve(name).spec
        assert (spec.name, spec.hub_id) == (entry.alias, entry.hub_id)
        assert spec.published_parameters == entry.parameters
    assert resolve(entry.alias).note is None
    assert resolve(entry.hub_id).note is None


def test_no_two_models_share_a_name() -> None:
    names = [name.lower() for entry in registry() for name in (entry.alias, *entry.aliases)]
    names += [entry.hub_id.lower() for entry in registry()]
    assert len(names) == len(set(names))


def test_a_name_spelled_otherwise_needs_no_note() -> None:
    assert resolve("llama2-7b").note is None
    assert resolve("Llama-2-7b-hf").note is None


def test_a_variant_of_the_same_organisation_has_the_same_shapes() -> None:
    found = resolve("meta-llama/Llama-3.1-8B-Instruct")
    assert found.spec.hub_id == "meta-llama/Llama-3.1-8B-Instruct"
    assert found.spec.hidden_size == resolve("llama-3.1-8b").spec.hidden_size
    assert found.note is not None
    assert "configuration of meta-llama/Llama-3.1-8B" in found.note
    assert "neither in memplan's list" in sentence("somebody/Llama-3.1-8B-Instruct")


def test_a_model_is_read_once() -> None:
    assert resolve("qwen3-8b").spec is resolve("Qwen/Qwen3-8B").spec


def test_a_spec_is_itself() -> None:
    spec = resolve("qwen3-8b").spec
    assert resolve(spec).spec is spec


def test_an_unknown_name_brings_three_close_ones() -> None:
    with pytest.raises(UnknownName) as caught:
        resolve("lama-70b")
    assert "llama-70b" in caught.value.close
    assert len(caught.value.close) == 3
    assert "memplan models" in str(caught.value)


# -- files -----------------------------------------------------------------------------------------------


def test_a_file_a_folder_and_a_path_are_the_same(tmp_path: Path) -> None:
    config = write(tmp_path / "my-model" / "config.json")
    for model in (config, str(config), config.parent, str(config.parent), f"{config.parent}/"):
        found = resolve(model)
        assert (found.spec.name, found.spec.hidden_size, found.note) == ("my-model", 64, None)


def test_relative_paths_and_other_names(tmp_path: Path) -> None:
    write(tmp_path / "here" / "config.json")
    assert resolve(".").spec.name == "here"
    assert resolve("config.json").spec.name == "here"
    write(tmp_path / "here" / "tiny.json")
    assert resolve("tiny.json").spec.name == "tiny"
    write(tmp_path / "here" / "outputs" / "run" / "config.json")
    assert resolve("outputs/run").spec.name == "run"


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "m" / "config.json")
    assert resolve("~/m").spec.name == "m"
    assert "there is no '~nobody-of-this-name/m'" in sentence("~nobody-of-this-name/m")


def test_a_folder_of_weights_called_like_an_alias_comes_first_but_an_empty_one_does_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "here" / "llama-70b").mkdir()
    assert resolve("llama-70b").spec.num_hidden_layers == 80
    write(tmp_path / "here" / "llama-70b" / "config.json")
    assert resolve("llama-70b").spec.num_hidden_layers == 2


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    config = write(tmp_path / "config.json")
    resolve(config)
    write(config, {**TINY, "hidden_size": 128})
    assert resolve(config).spec.hidden_size == 128


def test_images_are_said_to_be_left_out(tmp_path: Path) -> None:
    text = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type")}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
    }
    note = resolve(write(tmp_path / "g" / "config.json", config)).note
    assert note == "g is planned as its language model; its vision tower is not counted"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert "there is no './nothing'" in sentence("./nothing")
    assert "there is no" in sentence(tmp_path / "nothing")
    assert "there is no" in sentence("a/b/c")
    assert "has no config.json" in sentence(tmp_path)
    assert "is empty" in sentence("")
    assert "is empty" in sentence(" ")
    assert "neither a file nor a folder" in sentence("/dev/null")
    assert "there is no" in sentence("/" + "x" * 5000)
    write(tmp_path / "lora" / "adapter_config.json")
    assert "holds an adapter; give the model that it was trained on" in sentence(tmp_path / "lora")


BROKEN = {
    "empty": (b"", "no valid JSON (line 1, column 1"),
    "truncated": (json.dumps(TINY).encode()[:50], "cut short"),
    "not UTF-8": ("{}".encode("utf-16"), "no UTF-8 text"),
    "binary": (bytes(range(256)), "no UTF-8 text"),
    "a list": (b"[]", "must be a JSON object"),
    "a string": (b'"llama"', "must be a JSON object"),
    "too deep": (b"[" * 100_000, "nested too deeply"),
    "a long number": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "too long to be read"),
    "huge": (b" " * (17 << 20), "larger than 16 MiB"),
    "all lists": (b"[" + b"[]," * (1 << 17) + b"1]", "more than 131,072 lists and objects"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_clear_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert said in sentence(path)


def test_a_byte_order_mark_does_not_hurt(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TINY).encode())
    assert resolve(path).spec.hidden_size == 64


def test_an_unreadable_file_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "config.json")
    monkeypatch.setattr(Path, "open", refuse)
    assert "can't be read: Permission denied" in sentence(path)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bert" / "config.json", {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    )
    with pytest.raises(
        UnsupportedArchitecture, match=r"'bert', which is of the architecture 'BertForMaskedLM'"
    ):
        resolve(path)


# -- the Hub's cache, and the Hub ------------------------------------------------------------------------


def cached(cache: Path, hub_id: str, revision: str = "0123abc") -> Path:
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    return write(folder / "snapshots" / revision / "config.json")


@pytest.mark.parametrize(
    ("variable", "folder", "cache"),
    [
        ("HF_HUB_CACHE", "c", "c"),
        ("HUGGINGFACE_HUB_CACHE", "c", "c"),
        ("HF_HOME", "h", "h/hub"),
        ("XDG_CACHE_HOME", "x", "x/huggingface/hub"),
        ("HOME", ".", ".cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, folder: str, cache: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / folder))
    cached(tmp_path / cache, "some-body/My--Model")
    found = resolve("some-body/My--Model").spec
    assert (found.name, found.hub_id, found.hidden_size) == ("some-body/My--Model", "some-body/My--Model", 64)


def test_a_snapshot_knows_its_hub_id(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub", "some-body/model").parent
    assert resolve(snapshot).spec.hub_id == "some-body/model"


def test_a_cached_file_of_a_variant_comes_before_the_registry_s_guess(tmp_path: Path) -> None:
    cached(tmp_path / "hub", "meta-llama/Llama-3.1-8B-Instruct")
    assert resolve("meta-llama/Llama-3.1-8B-Instruct").spec.hidden_size == 64


def test_offline_says_how_to_go_on() -> None:
    assert "HF_HUB_OFFLINE is set: unset it, or give the path of its config.json" in sentence("some/model")


def test_without_huggingface_hub_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in sentence("some/model")


class HubError(Exception):
    """Stands in for huggingface_hub.errors, whose classes want an HTTP response."""


class NotFound(HubError):
    pass


class Gated(NotFound):
    pass


class NoEntry(HubError):
    pass


class NoLocalEntry(NoEntry):
    pass


def hub(monkeypatch: pytest.MonkeyPatch, answer: Exception | Path) -> None:
    def ask(*_: object, **options: float) -> str:
        assert 0 < min(options.values()) <= 10  # seconds
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    module = SimpleNamespace(
        errors=SimpleNamespace(
            RepositoryNotFoundError=NotFound,
            GatedRepoError=Gated,
            EntryNotFoundError=NoEntry,
            LocalEntryNotFoundError=NoLocalEntry,
        ),
        hf_hub_url=lambda *_: "url",
        get_hf_file_metadata=ask,
        hf_hub_download=ask,
    )
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Gated(), "some/model is gated: accept its licence"),
        (NotFound(), "the Hub shows no model some/model"),
        (NoEntry(), "some/model has no config.json on the Hub"),
        (NoLocalEntry(), "could not be fetched from the Hub: check the network"),
        (OSError("resolve\nhost"), "could not be fetched from the Hub: check the network"),
    ],
)
def test_a_hub_that_refuses_is_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    hub(monkeypatch, error)
    assert said in sentence("some/model")


def test_the_real_errors_of_huggingface_hub_are_those_we_name() -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    assert issubclass(errors.GatedRepoError, errors.RepositoryNotFoundError)
    assert issubclass(errors.RemoteEntryNotFoundError, errors.EntryNotFoundError)
    assert issubclass(errors.LocalEntryNotFoundError, errors.EntryNotFoundError)


def test_a_model_of_the_hub_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, write(tmp_path / "downloaded" / "config.json"))
    found = resolve("some/model").spec
    assert (found.name, found.hub_id, found.hidden_size) == ("some/model", "some/model", 64)


# -- any text, and the cost ------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=30)
    | st.text(alphabet="~./\\abc-70\0", max_size=12)
    | st.binary(max_size=12).map(os.fsdecode)
)
def test_any_text_is_a_model_or_a_memplan_error(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        try:
            said = resolve(text).spec.name
        except MemplanError as error:
            said = str(error)
    assert said


def test_nothing_heavy_is_imported_to_resolve_a_model(tmp_path: Path) -> None:
    config = write(tmp_path / "config.json")
    code = f"""
import sys
from memplan.importers.resolve import registry, resolve
resolve("llama-70b"), resolve({str(config)!r}), registry()
print([name for name in ("torch", "transformers", "huggingface_hub", "numpy") if name in sys.modules])
"""
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.stdout.strip() == "[]"
