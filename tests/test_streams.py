"""Standard output and error as strangers hand them over: closed, full, ASCII; and what strangers wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome
from small_specs import config

from memplan.asked.recipe import Recipe
from memplan.errors import MemplanError
from memplan.streams import lines, visible
from memplan.verify.job import cap, make_job
from memplan.verify.measurement import Run as Verified

Run = Callable[..., Outcome]

COMMAND = [sys.executable, "-m", "memplan"]
ESCAPE = "\x1b[2J\x1b]0;title\x07"
SHOWN = "\u241b[2J\u241b]0;title"  # rich leaves the bell out before we see it

# Questions with the statuses that they have where the answer can be written.
QUESTIONS = {
    "fits": (("fit", "llama-3.2-1b", "--gpu", "h100"), 0),
    "does not fit": (("fit", "llama-70b", "--mode", "full", "--gpu", "4090"), 1),
    "plan": (("plan", "llama-3.2-1b"), 0),
    "cards": (("gpus",), 0),
    "cards as JSON": (("gpus", "--json"), 0),
    "bad": (("fit", "llama-3.2-1b", "--gpu", "no such card"), 2),
}
CLOSED = "memplan: standard output is closed; "
FULL = "memplan: the answer can't be written to standard output: "


def through_shell(arguments: tuple[str, ...], redirections: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", *COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("question", QUESTIONS)
def test_without_standard_error_all_is_answered_as_with_it(question: str) -> None:
    arguments, status = QUESTIONS[question]
    usual, without = (through_shell(arguments, to) for to in ("", "2>&-"))
    assert usual.returncode == without.returncode == status
    assert without.stdout == usual.stdout
    assert bool(usual.stdout) == (status != 2)
    assert without.stderr == ""


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("redirections", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_where_standard_output_is_closed_nothing_is_answered(question: str, redirections: str) -> None:
    """Status 1 would be an answer: it does not fit. So would be 0."""
    process = through_shell(QUESTIONS[question][0], redirections)
    assert (process.returncode, process.stdout) == (2, "")
    if "2>" in redirections:
        assert process.stderr == ""
    else:
        assert process.stderr.startswith(CLOSED)
        assert process.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk to write to")
@pytest.mark.parametrize("question", [name for name, (_, status) in QUESTIONS.items() if status != 2])
@pytest.mark.parametrize("redirections", [">/dev/full", ">/dev/full 2>&-", ">/dev/full 2>&1"])
def test_an_answer_that_cannot_be_written_is_none(question: str, redirections: str) -> None:
    process = through_shell(QUESTIONS[question][0], redirections)
    assert (process.returncode, process.stdout) == (2, "")
    if "2>" in redirections:
        assert process.stderr == ""
    else:
        assert process.stderr.startswith(FULL)
        assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("columns", ["0", "-1", "1", "", "many"])
def test_a_terminal_of_any_width_is_answered(columns: str) -> None:
    process = subprocess.run(
        [*COMMAND, *QUESTIONS["fits"][0]],
        env=os.environ | {"COLUMNS": columns},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert "llama-3.2-1b" in "".join(process.stdout.split())


@pytest.mark.parametrize("question", QUESTIONS)
def test_ascii_is_enough(question: str) -> None:
    arguments, status = QUESTIONS[question]
    process = subprocess.run(
        [*COMMAND, *arguments],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert process.returncode == status
    assert process.stdout.isascii()
    assert process.stderr.count(b"\n") == (status == 2)


# -- what strangers wrote ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["plan"], ["fit", "--gpu", "h100"], ["compare"], ["plan", "--timeline"]]
)
def test_what_a_folder_is_called_does_not_command_the_terminal(
    arguments: list[str], memplan: Run, tmp_path: Path
) -> None:
    folder = tmp_path / f"m{ESCAPE}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config("llama", 2)), encoding="utf-8")
    command, *options = arguments
    outcome = memplan(command, folder, *options)
    assert outcome.status in (0, 1)
    assert f"m{SHOWN}" in outcome.out
    assert not set("\x1b\x07") & set(outcome.out + outcome.err)


@pytest.mark.parametrize("arguments", [["plan", ESCAPE], ["plan", "llama-3.2-1b", f"--{ESCAPE}"], [ESCAPE]])
def test_nor_does_what_a_complaint_quotes(arguments: list[str], memplan: Run) -> None:
    outcome = memplan(*arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("memplan: ")
    assert outcome.err[:-1].isprintable()


@pytest.mark.parametrize(
    ("raw", "sign"),
    [
        ("a\tb", "a\u2409b"),
        ("\x1b[31m", "\u241b[31m"),
        ("\x7f", "\u2421"),
        ("\x9b", "\ufffd"),  # ESC [ in one character
        ("a\u202eb", "a\ufffdb"),  # turns the rest of the line around
        ("\ud800", "\ufffd"),
        ("×█ é", "×█ é"),
    ],
)
def test_signs_of_what_is_none(raw: str, sign: str) -> None:
    assert visible(raw) == sign
    assert lines(f"{raw}\n{raw}") == f"{sign}\n{sign}"


# -- what is too much --------------------------------------------------------------------------------------


def test_a_number_of_400_digits_is_one_sentence(memplan: Run) -> None:
    outcome = memplan("llama-3.2-1b", "--r", "9" * 400)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("memplan: argument --r: it takes a whole number of at most 18 digits")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("size", ["9" * 400, "1048577"])
def test_a_cap_that_no_card_has_is_one_sentence(size: str) -> None:
    with pytest.raises(MemplanError, match=r"is more than any card has; give at most 1048576GiB$"):
        cap(f"{size}GiB")
    assert cap("1048576GiB") == (1 << 50, "1048576 GiB")


@pytest.mark.parametrize("option", ["--weights", "--text"])
def test_a_name_that_is_no_text_is_one_sentence(option: str) -> None:
    weights, text = ("\udcff", None) if option == "--weights" else (None, "\udcff")
    with pytest.raises(MemplanError, match=rf"^{option} is '.udcff', but the name must be UTF-8 text$"):
        make_job("llama-3.2-1b", Recipe(trainer="peft"), Verified(text=text), weights=weights)


@pytest.mark.parametrize("kind", [(), ("--json",), ("--html", "/dev/null"), ("--tape", "/dev/null")])
def test_a_folder_of_the_hubs_cache_need_not_be_text(
    kind: tuple[str, ...], memplan: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "models--\udcff--x" / "snapshots" / "r"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config("llama", 2)), encoding="utf-8")
    outcome = memplan(folder, *kind)
    assert (outcome.status, outcome.err) == (0, "")
    assert "?/x" in outcome.out


CAMPAIGNS = {
    "nested": ("runs: " + "[" * 5000, "is no campaign: it is nested too deeply"),
    "no time": ("!!timestamp", "a tag in it does not suit what it stands before"),
    "endless": (
        "runs: [{name: a, model: llama-3.2-1b, seconds: .inf}]",
        "is no campaign: runs.0.seconds: Input should be a finite number",
    ),
    "self": (
        "runs: [{name: a, model: llama-3.2-1b, recipe: {self: 1}}]",
        "run 'a': self: Extra inputs are not permitted, got 1",
    ),
    "options": (
        "runs: [{name: a, model: llama-3.2-1b, recipe: {options: 1}}]",
        "run 'a': options: Extra inputs are not permitted, got 1",
    ),
    "numbered": (
        "runs: [{name: a, model: llama-3.2-1b, recipe: {1: 1}}]",
        "is no campaign: runs.0.recipe.1",
    ),
}


@pytest.mark.parametrize("kind", CAMPAIGNS)
def test_a_campaign_that_is_none_is_one_sentence(kind: str, memplan: Run, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    text, sentence = CAMPAIGNS[kind]
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    outcome = memplan("campaign", path, "--dry-run")
    assert (outcome.status, outcome.out) == (2, "")
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1
