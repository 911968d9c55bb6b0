"""How commands end where their output can't be written, and what of strangers' text reaches a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memplan.streams import visible

FITS = ("fit", "llama-3.2-1b", "--gpu", "h100")
DOES_NOT = ("fit", "llama-3.3-70b", "--mode", "full", "--gpu", "t4", "--no-advise")


def status(
    arguments: tuple[str, ...], redirection: str = ">/dev/null", **environment: str
) -> tuple[int, str]:
    command = f'"$0" -m memplan "$@" {redirection}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, *arguments],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(("arguments", "answer"), [(FITS, 0), (DOES_NOT, 1), (("gpus",), 0)])
def test_one_is_said_of_what_does_not_fit_and_of_nothing_else(
    arguments: tuple[str, ...], answer: int
) -> None:
    assert status(arguments)[0] == answer
    assert status(arguments, ">/dev/null 2>&-")[0] == answer  # what is said beside the answer is no answer
    assert status(arguments, COLUMNS="0")[0] == answer
    assert status(arguments, PYTHONIOENCODING="ascii")[0] == answer
    for closed in (">&-", ">/dev/full", ">&- 2>&-"):
        assert status(arguments, closed)[0] == 2


def test_a_bad_question_without_an_error_stream_is_still_one() -> None:
    assert status(("fit", "nosuch"), "2>&-")[0] == 2


@pytest.mark.parametrize("option", ["--r", "--seq-len", "--batch-size"])
def test_a_number_of_400_digits_is_a_bad_question(option: str) -> None:
    code, said = status(("llama-3.2-1b", option, "9" * 400))
    assert code == 2
    assert said.count("\n") == 1


def test_a_name_can_not_command_a_terminal(tmp_path: Path) -> None:
    code, said = status((str(tmp_path / "\x1b]0;owned\x07"),))
    assert code == 2
    assert said.strip().isprintable()
    assert visible("a\x1b[2Jb\n\u202e") == "a\u241b[2Jb\u240a\ufffd"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "runs: [{name: a, model: llama-3.2-1b, seconds: .inf}]",
        "runs: [{name: a, model: llama-3.2-1b, recipe: {self: 1}}]",
        "runs: [{name: a, model: llama-3.2-1b, recipe: {r: 0x" + "f" * 5000 + "}}]",
    ],
)
def test_a_campaign_that_is_none_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "campaign.yaml"
    path.write_text(text, encoding="utf-8")
    code, said = status(("campaign", str(path), "--dry-run", "--out", str(tmp_path / "out")))
    assert code == 2, said
    assert said.count("\n") == 1
    assert "bug" not in said
