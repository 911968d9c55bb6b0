"""Every way to name a model, and one clear sentence for every way to get it wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.asked.recipe import Recipe
from memplan.asked.spec import Quantization
from memplan.errors import MemplanError, SpecError, UnknownName, UnsupportedArchitecture
from memplan.importers.registry import registry
from memplan.importers.resolve import hub_id_of, resolve, resolve_config
from memplan.planning.plan import plan

SEES = (  # published with a vision tower
    "gemma-3-4b", "gemma-3-12b", "gemma-3-27b", "qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3.5-122b-a10b",
    "qwen3.5-397b-a17b", "qwen3.6-27b", "qwen3.6-35b-a3b", "gemma-4-31b", "gemma-4-26b-a4b",
    "gemma-4-e4b", "gemma-4-e2b",
)  # fmt: skip

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


def test_models_are_listed_however_they_are_spelled(memplan: Callable[..., Outcome]) -> None:
    for wanted in ("llama3:8b", "Llama 3 8B", "llama-3-8b"):
        found = json.loads(memplan("models", wanted, "--json").out)["models"]
        assert [one["alias"] for one in found] == ["llama-3-8b"]
    assert memplan("models", "qwen3").out.count("Qwen/Qwen3") > 8
    outcome = memplan("models", "kimi")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("entry", registry(), ids=lambda entry: entry.alias)
def test_every_name_of_a_registered_model_finds_it(entry: Any) -> None:
    for name in (entry.alias, *entry.aliases, entry.hub_id, entry.alias.upper(), entry.hub_id.lower()):
        spec = resolve(name).spec
        assert (spec.name, spec.hub_id) == (entry.alias, entry.hub_id)
        assert spec.published_parameters == entry.parameters
    for name in (entry.alias, entry.hub_id):
        assert (resolve(name).note is not None) is (entry.alias in SEES)


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
    assert "planned as meta-llama/Llama-3.1-8B, " in found.note
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


# -- names as people write them ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("llama70b", "llama-3.3-70b"),
        ("Llama 70B", "llama-3.3-70b"),
        ("llama3:8b", "llama-3-8b"),
        ("Llama-3-8B", "llama-3-8b"),
        ("llama 3.1 8 B", "llama-3.1-8b"),
        ("llama_3.1_8b", "llama-3.1-8b"),
        ("qwen3 8b", "qwen3-8b"),
        ("Qwen3:30b-a3b", "qwen3-30b-a3b"),
        ("qwen2.5:0.5b", "qwen2.5-0.5b"),
        ("mistral-7b-v0.3", "mistral-7b-v0.3"),
        ("mistral 7b 0.3", "mistral-7b-v0.3"),
        ("mixtral:8x7b", "mixtral-8x7b"),
        ("gemma2:9b", "gemma-2-9b"),
        ("phi3:mini", "phi-3-mini-4k"),
        ("PHI4", "phi-4"),
        ("ollama.com/library/llama3.2:1b", "llama-3.2-1b"),
    ],
)
def test_spelling_does_not_matter(name: str, alias: str) -> None:
    found = resolve(name)
    assert found.spec is resolve(alias).spec
    assert found.note is None or found.note.startswith(f"{name.lower()} means {alias} ")


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("Llama-3-8B-Instruct", "llama-3-8b"),
        ("Meta-Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("llama 2 7b chat hf", "llama-2-7b"),
        ("qwen3-8b-base", "qwen3-8b"),
        ("gemma-2-9b-it", "gemma-2-9b"),
        ("gemma2:27b-instruct", "gemma-2-27b"),
        ("mistral-7b-instruct-v0.1", "mistral-7b-v0.1"),
        ("mixtral-8x22b-instruct", "mixtral-8x22b-instruct"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("mistralai/Mistral-Nemo-Base-2407", "mistral-nemo-12b"),
        ("Qwen/Qwen2.5-Coder-14B-Instruct", "qwen2.5-coder-14b"),
        ("unsloth/llama-3-8b", "llama-3-8b"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("unsloth/mistral-7b", "mistral-7b-v0.1"),
        ("unsloth/Qwen2.5-Coder-32B-Instruct", "qwen2.5-coder-32b"),
        ("NousResearch/Hermes-3-Llama-3.1-8B", "llama-3.1-8b"),
        ("unsloth/tinyllama-chat", "tinyllama-1.1b"),
        ("NousResearch/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("NousResearch/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("01-ai/Yi-34B-Chat", "yi-34b"),
        ("https://huggingface.co/unsloth/gemma-2-9b-it", "gemma-2-9b"),
    ],
)
def test_a_copy_of_known_shapes_needs_no_network_and_says_what_it_is_taken_for(name: str, alias: str) -> None:
    found, known = resolve(name), resolve(alias)
    assert found.spec.model_copy(update={"hub_id": known.spec.hub_id}) == known.spec
    called = name.removeprefix("https://huggingface.co/")
    if name != alias:
        assert found.note == f"planned as {known.spec.hub_id}, whose configuration it has"
    if "/" in called:
        assert found.spec.hub_id == called


@pytest.mark.parametrize(
    "name",
    [
        "unsloth/Phi-3-mini-4k-instruct",  # rewritten as Mistral
        "unsloth/phi-4",  # as Llama
        "NousResearch/Hermes-2-Pro-Llama-3-8B",  # 128,288 words
        "codellama/CodeLlama-7b-Python-hf",  # 32,000, where CodeLlama-7b has 32,016
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "google/gemma-3n-E4B-it",
        "somebody/llama-3-8b",
        "Qwen/Qwen-27B",
        "01-ai/Yi-34B-200K",
    ],
)
def test_what_is_not_known_to_have_the_shapes_is_not_taken_for_it(name: str) -> None:
    assert "neither in memplan's list nor in the Hub cache" in sentence(name)


@pytest.mark.parametrize(
    ("name", "near", "far"),
    [
        ("lama-70b", "llama-70b", "llama-8b"),
        ("qwen-27b", "qwen3.5-27b", "qwen2-7b"),
        ("llama3", "llama3-8b", "gemma"),
        ("gemma-3-20b", "gemma-3-27b", "gemma-3-4b"),
        ("mistal-7b", "mistral-7b", "mistral-large"),
        ("qwen3-7b", "qwen3-8b", "qwen3-0.6b"),
        ("deepseek-r1:70b", "deepseek-r1-distill-llama-70b", "qwen"),
    ],
)
def test_neighbours_are_near_in_family_and_size(name: str, near: str, far: str) -> None:
    with pytest.raises(UnknownName) as caught:
        resolve(name)
    assert near in caught.value.close
    assert not any(close.startswith(far) for close in caught.value.close)
    assert len(caught.value.close) <= 3


@pytest.mark.parametrize("name", ["grok-2", "kimi-k2", "bert-large", "llama-4000b", "x"])
def test_what_has_no_neighbour_is_said_to_go_by_other_ways(name: str) -> None:
    with pytest.raises(UnknownName) as caught:
        resolve(name)
    assert caught.value.close == []
    assert "memplan trace or memplan dry-run" in str(caught.value)
    assert "did you mean" not in str(caught.value)


# -- pages of the Hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["https://huggingface.co", "http://www.huggingface.co", "hf.co", "hf:/"])
@pytest.mark.parametrize(
    "rest", ["", "/", "/tree/main", "/blob/main/config.json", "/resolve/main/config.json?download=true", "#x"]
)
def test_a_page_is_its_model(host: str, rest: str) -> None:
    assert resolve(f"{host}/Qwen/Qwen3-8B{rest}").spec is resolve("qwen3-8b").spec


def test_a_page_of_another_revision_is_fetched_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = hub(monkeypatch, write(tmp_path / "downloaded" / "config.json"))
    assert resolve("https://huggingface.co/some/model/blob/v2/config.json").spec.hub_id == "some/model"
    assert asked == ["v2", "v2"]


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("https://huggingface.co/datasets/tatsu-lab/alpaca", "is a data set, not a model"),
        ("huggingface.co/datasets/tatsu-lab/alpaca", "is a data set, not a model"),
        ("https://huggingface.co/spaces/a/b", "is a Space, not a model"),
        ("https://huggingface.co/meta-llama", "shows no one model"),
        ("https://huggingface.co/", "shows no one model"),
        ("https://github.com/meta-llama/llama3", "is no page of the Hub"),
        ("s3://bucket/model", "is no page of the Hub"),
        ("https://me:secret@huggingface.co/a/b", "'https://…@huggingface.co/a/b' is no page of the Hub"),
    ],
)
def test_a_page_of_something_else_is_one_clear_sentence(page: str, said: str) -> None:
    assert said in sentence(page)
    assert "give the page of a model, its Hub id or the path of its config.json" in sentence(page)


# -- copies that are quantised -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["unsloth/llama-3-8b-bnb-4bit", "llama-3-8b-bnb-4bit", "unsloth/llama-3-8b-Instruct-bnb-4bit"]
)
def test_a_copy_in_four_bits_is_planned_so(name: str) -> None:
    found, whole = resolve(name), resolve("llama-3-8b").spec
    assert found.spec.quantization == Quantization(
        quant_type="nf4", double_quant=True, compute_dtype="bfloat16"
    )
    assert found.spec.hidden_size == whole.hidden_size
    assert found.note is not None
    assert "planned as meta-llama/Meta-Llama-3-8B, whose configuration it has" in found.note
    assert "its weights are in 4 bits already (nf4, double-quantised), and planned so" in found.note
    if "/" in name:
        assert hub_id_of(f"https://huggingface.co/{name}") == name
    peaks = [plan(model, Recipe(), gpus=[]).peak.tensor_bytes for model in (name, "llama-3-8b")]
    assert peaks[0] == peaks[1] - 1024  # of the table that quantising leaves on the card


def test_a_dynamic_copy_is_said_to_take_more() -> None:
    note = resolve("unsloth/Qwen3-8B-unsloth-bnb-4bit").note
    assert note is not None and "this is the least that they take" in note


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("TheBloke/Llama-2-7B-GPTQ", "holds GPTQ weights"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "holds AWQ weights"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "holds GPTQ weights"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8", "holds FP8 weights"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "holds compressed-tensors weights"),
        ("unsloth/llama-3-8b-bnb-8bit", "holds 8-bit bitsandbytes weights"),
        ("unsloth/Qwen3-8B-GGUF", "holds GGUF files"),
    ],
)
def test_a_copy_of_another_kind_is_refused_with_what_to_do(name: str, what: str) -> None:
    assert what in sentence(name)
    assert "memplan dry-run" in sentence(name) or "GGUF" in name


def test_a_vision_tower_that_is_left_out_is_named() -> None:
    for name in ("gemma-3-4b", "google/gemma-3-12b-it", "unsloth/gemma-3-27b-it", "gemma3:4b"):
        assert "its vision tower is not counted" in str(resolve(name).note)
        assert "its vision tower is not counted" in str(resolve_config(name).note)
    for name in ("gemma-3-4b-text", "gemma-3-1b"):
        assert "vision" not in str(resolve(name).note)


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


def hub(monkeypatch: pytest.MonkeyPatch, answer: Exception | Path) -> list[str | None]:
    """Put another in the place of huggingface_hub; the revisions that it is asked for."""
    revisions: list[str | None] = []

    def ask(*_: object, revision: str | None = None, **options: float) -> str:
        assert 0 < min(options.values()) <= 10  # seconds
        if revision is not None:
            revisions.append(revision)
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
        hf_hub_url=lambda *_, revision=None: revisions.append(revision),
        get_hf_file_metadata=ask,
        hf_hub_download=ask,
    )
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)  # type: ignore[arg-type]
    return revisions


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
from memplan.importers.registry import registry
from memplan.importers.resolve import resolve
resolve("llama-70b"), resolve("unsloth/Qwen3-8B-bnb-4bit"), resolve("hf.co/google/gemma-2-9b-it"), registry()
resolve({str(config)!r})
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
