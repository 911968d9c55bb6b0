"""Tapes in files: what is written is read back, and a bad file is one sentence."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from small_specs import SPECS

from memplan.asked.recipe import Recipe
from memplan.errors import MemplanError
from memplan.planning.plan import plan
from memplan.predict.step import write_tape
from memplan.tape import Category, Part, Phase, Tape, replay, static_bytes
from memplan.tape.file import TapeInfo, encode, load, save

Run = Callable[..., Outcome]


def toy() -> Tape:
    tape = Tape(provenance="traced")
    tape.begin(Phase.SETUP, "weights", part=Part.LOADED)
    tape.alloc(1000, "weight", Category.WEIGHTS)
    tape.begin(Phase.FORWARD, "layer", 0)
    tape.module = "mlp"
    tape.free(tape.alloc(5000, "mm", Category.ACTIVATIONS))
    tape.finish()
    return tape


def columns(tape: Tape) -> tuple[Any, ...]:
    return tuple(getattr(tape, name) for name in Tape.__slots__ if name != "module")


@pytest.mark.parametrize("name", ["tape.json", "tape.json.gz"])
@pytest.mark.parametrize("folded", [False, True])
def test_what_is_written_is_read_back(name: str, folded: bool, tmp_path: Path) -> None:
    recipe = Recipe(trainer="peft", mode="qlora", autocast=True).resolved()
    tape = write_tape(SPECS["llama"](12), recipe, folded=folded)
    info = TapeInfo(
        memplan_version="1", model="m", recipe=recipe.model_dump(mode="json"), libraries={"torch": "2"}
    )
    save(tape, tmp_path / name, info)
    back, about = load(tmp_path / name)
    assert columns(back) == columns(tape)
    assert about == info
    assert replay(back) == replay(tape)
    assert static_bytes(back) == static_bytes(tape)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_tape_of_version_1_tells_parts_by_names(tmp_path: Path) -> None:
    recipe = Recipe(trainer="peft", mode="qlora").resolved()
    tape = write_tape(SPECS["llama"](3), recipe)
    document = json.loads(encode(tape))
    for name in ("workspaces", "streams", "rank"):
        del document[name]
    document |= {"version": 1, "segments": [row[:-1] for row in document["segments"]]}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert columns(load(path)[0]) == columns(tape)


def test_the_name_decides_about_compression(tmp_path: Path) -> None:
    for name, magic in (("a.json", b"{"), ("a.json.gz", b"\x1f\x8b")):
        save(toy(), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(magic)
    save(toy(), tmp_path / "b.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    (tmp_path / "moved").write_bytes((tmp_path / "a.json.gz").read_bytes())
    assert columns(load(tmp_path / "moved")[0]) == columns(toy())


def test_an_older_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tape.json"
    save(toy(), path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MemplanError, match="No space left"):
        save(write_tape(SPECS["llama"](1), Recipe(trainer="peft").resolved()), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MemplanError, match=r"can't be written to 'no/such/tape.json': No such file"):
        save(toy(), "no/such/tape.json")


def changed(**changes: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save(toy(), path)
        document = json.loads(path.read_bytes()) | changes
        path.write_text(json.dumps({key: value for key, value in document.items() if value != "gone"}))

    return write


def cut(path: Path) -> None:
    save(toy(), path)
    path.write_bytes(path.read_bytes()[:-40])


def cut_gzip(path: Path) -> None:
    save(toy(), path)
    path.write_bytes(gzip.compress(path.read_bytes())[:-40])


def broken_gzip(path: Path) -> None:
    path.write_bytes(b"\x1f\x8b" + b"nonsense" * 10)


BAD = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "directory"),
    "empty": (lambda path: path.write_bytes(b""), "no valid JSON"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "no valid JSON"),
    "truncated": (cut, "cut short"),
    "truncated gzip": (cut_gzip, "cut short"),
    "broken gzip": (broken_gzip, "compression is broken"),
    "nested": (lambda path: path.write_text("[" * 100_000), "no valid JSON"),
    "a list": (lambda path: path.write_text("[1]"), "memplan trace MODEL --tape"),
    "another file": (lambda path: path.write_text('{"hidden_size": 64}'), "is no tape"),
    "another version": (changed(version=99), "version 99"),
    "no sizes": (changed(sizes="gone"), "sizes is missing"),
    "sizes are text": (changed(sizes=["512", "5120"]), "sizes are no numbers"),
    "sizes are not rounded": (changed(sizes=[1024, 5000]), "not rounded"),
    "a size too few": (changed(sizes=[1024]), "numbers of categories"),
    "negative": (changed(sizes=[-1024, 5120]), "negative"),
    "unknown category": (changed(categories=[3, 3]), "not a valid Category"),
    "number of no string": (changed(operations=[99, 99]), "out of range"),
    "released first": (changed(events=[0, ~1, 1]), "before it is allocated"),
    "released twice": (changed(events=[0, ~0, ~0]), "before it is allocated"),
    "no storage": (changed(events=[0, 7, ~7]), "no storage"),
    "segments overlap": (
        changed(
            segments=[
                ["setup", "", None, 0, 2, 1, [], 1, "loaded"],
                ["forward", "", 0, 1, 3, 1, [], 1, "step"],
            ]
        ),
        "follow",
    ),
    "no segments": (changed(segments=[]), "segments"),
    "repeated for ever": (
        changed(segments=[["setup", "", None, 0, 3, 10**15, [], 1, "loaded"]], deltas=[1024, 512, -512]),
        "repeated more than 1,024 times",
    ),
    "repeated by many": (
        changed(
            **{name: [0] * 3000 for name in ("categories", "operations", "modules")},
            sizes=[512] * 3000,
            events=[event for index in range(3000) for event in (index, ~index)],
            deltas=[512, -512] * 3000,
            segments=[["setup", "", None, 0, 6000, 1024, [], 1, "loaded"]],
        ),
        "more than 4,194,304 events",
    ),
    "no such sizes": (changed(sizes=[1024, 512 << 70]), "beyond any card"),
    "unpacks to more than it may": (
        lambda path: path.write_bytes(gzip.compress(b'{"a": "' + b" " * (65 << 20) + b'"}')),
        "larger than 64 MiB",
    ),
    "nothing but lists": (
        lambda path: path.write_bytes(b"[" + b"[]," * (1 << 17) + b"1]"),
        "more than 131,072 lists and objects",
    ),
    "nothing but texts": (
        lambda path: path.write_bytes(b"[" + b'"",' * (1 << 20 | 1) + b"1]"),
        "more than 1,048,576 texts",
    ),
    "a segment without marks": (
        changed(segments=[["setup", "", None, 0, 3, 1, None, 1, "loaded"]]),
        "no list",
    ),
    "a part of another phase": (
        changed(segments=[["setup", "", None, 0, 3, 1, [], 1, "update"]]),
        "does not belong to its phase",
    ),
    "a workspace that is not there": (changed(workspaces=[9]), "has no storage"),
    "streams of nothing": (changed(streams=[[0, -1]]), "streams are no numbers"),
    "short segment": (changed(segments=[["setup"]]), "no list of nine"),
    "unknown phase": (changed(segments=[["nap", "", None, 0, 3, 1, [], 1, "step"]]), "Phase"),
    "folded without changes": (changed(deltas=[1]), "more events"),
    "more goes than there is": (changed(deltas=[1024, 5120, -5632]), "go than there are"),
    "more goes with each repetition": (
        changed(segments=[["setup", "", None, 0, 3, 3, [], 1, "loaded"]], deltas=[1024, 512, -2048]),
        "go than there are",
    ),
    "repeated without saying what that changes": (
        changed(
            segments=[
                ["setup", "", None, 0, 2, 1, [], 1, "loaded"],
                ["setup", "", None, 2, 3, 9, [], 1, "loaded"],
            ],
            deltas=None,
        ),
        "go than there are",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_sentence(
    kind: str, memplan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, fragment = BAD[kind]
    path = Path("tape.json")
    make(path)
    with pytest.raises(MemplanError) as caught:
        load(path)
    assert fragment in str(caught.value)
    assert "tape.json" in str(caught.value)
    outcome = memplan("diff", path, path)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("memplan: ")


def test_plan_writes_its_tape_with_every_layer(memplan: Run, tmp_path: Path) -> None:
    path = tmp_path / "tape.json.gz"
    outcome = memplan("llama-3.2-1b", "--mode", "lora", "--tape", path)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == memplan("llama-3.2-1b", "--mode", "lora").out
    tape, info = load(path)
    assert tape.provenance == "predicted"
    assert info.model == "meta-llama/Llama-3.2-1B"
    assert Recipe(**info.recipe).mode.value == "lora"
    assert info.libraries == {}
    assert all(segment.repeat == 1 for segment in tape.segments)
    answer = plan("llama-3.2-1b", Recipe(mode="lora"))
    assert replay(tape).allocated_bytes == answer.peak.tensor_bytes
