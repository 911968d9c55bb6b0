"""The options that draw a plan: --timeline, --html, --trace-json, --snapshot."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome
from small_specs import config

from memplan.planning.plan import plan
from memplan.snapshot import Action, load_snapshot
from memplan.tape.file import load

Run = Callable[..., Outcome]

FILES = ("--tape", "--html", "--trace-json", "--snapshot")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config("llama", 5)), encoding="utf-8")
    return folder


def test_each_file_tells_the_same_step(memplan: Run, model: Path, tmp_path: Path) -> None:
    names = {option: tmp_path / f"{option[2:]}.out" for option in FILES}
    asked = [word for option, path in names.items() for word in (option, path)]
    outcome = memplan(model, "--mode", "lora", "--seq-len", 256, *asked)
    assert outcome.status == 0
    assert outcome.err == ""
    assert outcome.out == memplan(model, "--mode", "lora", "--seq-len", 256).out
    tape, about = load(names["--tape"])
    assert about.recipe["seq_len"] == 256
    snapshot = load_snapshot(names["--snapshot"])
    assert snapshot.origin == "predicted by memplan, not recorded by PyTorch"
    assert sum(1 for entry in snapshot.trace if entry.action is Action.ALLOC) == sum(
        1 for event in tape.events if event >= 0 and tape.sizes[event]
    )
    trace = json.loads(names["--trace-json"].read_bytes())
    peak = plan(model, about_recipe(about.recipe)).peak.tensor_bytes
    assert [e["args"]["bytes"] for e in trace["traceEvents"] if e["ph"] == "i"] == [peak]
    page = names["--html"].read_text(encoding="utf-8")
    assert f"<h1>{model.name}</h1>" in page
    assert "Asked: lora, 1 × 256 tokens" in page
    assert {path.name for path in tmp_path.iterdir()} == {"model", *(path.name for path in names.values())}


def about_recipe(recipe: dict[str, object]) -> object:
    from memplan.asked.recipe import Recipe

    return Recipe(**recipe)


def test_a_trace_is_compressed_if_its_name_says_so(memplan: Run, model: Path, tmp_path: Path) -> None:
    for name in ("a.json", "a.json.gz"):
        assert memplan(model, "--trace-json", tmp_path / name).status == 0
    assert gzip.decompress((tmp_path / "a.json.gz").read_bytes()) == (tmp_path / "a.json").read_bytes()


def test_the_timeline_follows_the_plan(memplan: Run, model: Path) -> None:
    plain = memplan(model).out
    outcome = memplan(model, "--timeline")
    assert outcome.status == 0
    assert outcome.out.startswith(plain + "\nTimeline\n")
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_pictures_of_data_are_refused(memplan: Run, model: Path) -> None:
    outcome = memplan(model, "--timeline", "--json")
    assert outcome == (
        2,
        "",
        "memplan: --timeline draws and --json prints data: ask for one, or for --html beside --json\n",
    )


def test_files_beside_json(memplan: Run, model: Path, tmp_path: Path) -> None:
    outcome = memplan(model, "--json", "--html", tmp_path / "a.html")
    assert json.loads(outcome.out)["model"]["name"] == model.name
    assert (tmp_path / "a.html").is_file()


@pytest.mark.parametrize("option", FILES)
def test_what_cannot_be_written_is_one_sentence(
    option: str, memplan: Run, model: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    for path in (tmp_path / "none" / "file", tmp_path):
        outcome = memplan(model, option, path)
        assert outcome.status == 2
        assert outcome.out == ""
        assert "can't be written to" in outcome.err
        assert len(outcome.err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_two_pictures_in_one_file_are_refused(memplan: Run, model: Path, tmp_path: Path) -> None:
    outcome = memplan(model, "--html", tmp_path / "a", "--snapshot", tmp_path / "a")
    assert outcome.status == 2
    assert "two files can't both be written to" in outcome.err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("asked", ["model", "model/config.json"])
def test_nor_is_the_model_written_over(
    asked: str, memplan: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (model / "config.json").read_bytes()
    outcome = memplan(asked, "--tape", "./model/./config.json")
    assert (outcome.status, outcome.out) == (2, "")
    assert "is the model's configuration, which would be written over" in outcome.err
    assert (model / "config.json").read_bytes() == before


@pytest.mark.parametrize("command", ["plan", "trace"])
def test_nor_under_two_names_of_one_file(
    command: str, memplan: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = memplan(command, model, "--html", "x", "--tape", "./x")
    assert outcome == (
        2,
        "",
        "memplan: two files can't both be written to './x' and 'x', which are one place\n",
    )
    assert not Path("x").exists()


@pytest.mark.parametrize("command", [["trace"], ["plan", "--trace"]])
def test_a_trace_is_drawn_as_well(command: list[str], memplan: Run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    names = {option: tmp_path / f"{option[2:]}.out" for option in FILES}
    asked = [word for option, path in names.items() for word in (option, path)]
    outcome = memplan(command[0], model, *command[1:], "--seq-len", 64, "--timeline", "--gpu", "h100", *asked)
    assert outcome.status == 0, outcome.err
    assert "\nTimeline\n" in outcome.out
    assert load_snapshot(names["--snapshot"]).origin == "traced by memplan, not recorded by PyTorch"
    assert json.loads(names["--trace-json"].read_bytes())["otherData"]["provenance"] == "traced"
    page = names["--html"].read_text(encoding="utf-8")
    assert "allocated (traced)" in page
    assert "traced with torch 2." in page
