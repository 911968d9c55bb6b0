"""Command lines: every command with the options that its parser has."""

from __future__ import annotations

import io
import json
import os
from argparse import Action
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from example_measurements import example
from example_tapes import example_tape
from small_specs import config

from memplan.cli import COMMANDS, main
from memplan.errors import MemplanError
from memplan.tapefile import save

from .harness import sentence
from .mutate import TEXTS
from .sense import holds, plain, strict_json

SHARE = 0.05

LIBRARIES = ("trace", "verify")  # run torch, so they are only asked about models that there are not
MODELS = ("small.json", "./small.json", "llama-3.2-1b", "qwen2.5-0.5b", "gemma-2-2b")
FILES = ("tape.json", "campaign.yaml", "measurements", "page.md", ".", "no/such/file", "", "/dev/null")
NUMBERS = (
    "0",
    "1",
    "2",
    "8",
    "64",
    "-1",
    "4294967296",
    "0.5",
    "nan",
    "inf",
    "0x10",
    "1_0",
    "٣",
    "9" * 400,
    "",
)
WORDS: dict[str, tuple[str, ...]] = {
    "model": MODELS,
    "a": ("plan:small.json", "tape.json", "plan:llama-3.2-1b"),
    "b": ("plan:small.json", "tape.json", "plan:qwen2.5-0.5b"),
    "plan": ("campaign.yaml",),
    "folder": ("measurements",),
    "gpu": ("a6000", "t4", "h100", "mi300x", "2080"),
    "optimizer": ("adamw_torch", "sgd", "adafactor", "paged_adamw_8bit"),
    "target_modules": ("q,v", "attention", "q_proj", ".*(", ","),
    "alloc_conf": ("expandable_segments:True", "max_split_size_mb:64", "x"),
    "modes": ("lora,qlora", "full", ","),
}
NUMERIC = ("batch_size", "seq_len", "batch_sizes", "seq_lens")
# what a shell can pass on: no null, and surrogates only for bytes that are no text
ODD = tuple(text for text in TEXTS if "\0" not in text and "\ud800" not in text)


@cache
def actions(command: str) -> list[Action]:
    """The arguments of a command, without those that run torch or say themselves that they take long."""
    parser = import_module(f"memplan.commands.{command}").parser()
    return [action for action in parser._actions if action.dest not in ("trace", "exact")]


def make(random: Random) -> dict[str, Any]:
    """A command line, the terminal's width and its encoding."""
    command = random.choice(COMMANDS)
    argv = [command]
    share = random.choice((0.02, 0.1, 0.2))
    for action in actions(command):
        if not action.option_strings:
            argv += [_word(random, action)] if random.random() < 0.95 else []
        elif action.required or random.random() < share:
            option = random.choice(action.option_strings)
            argv += [option] if action.nargs == 0 else [option, _word(random, action)]
    if command in LIBRARIES:
        argv = [word if word not in (*MODELS, ".") else "nosuch" for word in argv]
    if command == "campaign":
        argv.append("--dry-run")
    if random.random() < 0.1:
        odd = random.choice((*ODD, "--", "--no-such-option", "--r=8", "-x"))
        argv.insert(random.randrange(len(argv) + 1), odd)
    if random.random() < 0.05:
        del argv[random.randrange(len(argv))]
    columns = random.choice(("80", "80", "", "0", "1", "x", "100000"))
    encoding = random.choice(("utf-8", "utf-8", "ascii"))
    return {"argv": argv, "columns": columns, "encoding": encoding}


def _word(random: Random, action: Action) -> str:
    if random.random() < 0.12:
        return random.choice(ODD)
    if action.choices is not None:
        return random.choice(list(action.choices))
    if action.dest in WORDS:
        return random.choice(WORDS[action.dest])
    if action.type in (int, float) or action.dest in NUMERIC:
        return random.choice(NUMBERS)
    return random.choice(FILES)


def check(value: dict[str, Any]) -> None:
    """Run it in this process."""
    argv = value["argv"]
    if _trains(argv):
        return
    _prepare()
    os.environ["COLUMNS"] = value["columns"]
    status, out, err = _run(argv, value["encoding"])
    asked = {"-h", "--help", "help", "-V", "--version"} & {*argv}
    holds(status in (0, 1, 2), f"exit status {status}", err)
    holds(status != 1 or argv[0] in ("fit", "diff"), "exit status 1 of a command that has none", err)
    plain(out + err)
    if status == 2 and argv:
        holds(not out, "an answer with a refusal", out[:200])
        one_line = err.startswith("memplan: ") and err.find("\n") == len(err) - 1
        holds(one_line, "a refusal of no one line", err)
        sentence(err.strip())
        raise MemplanError(err.strip())
    if status != 2 and not asked:
        holds(bool(out), "no answer")
        if "--json" in argv:
            answer = strict_json(out)
            if argv[0] == "fit" and not {"--maximize", "--advise", "--no-advise"} & {*argv}:
                _agrees(argv, status, answer)


def _trains(argv: list[str]) -> bool:
    """Whether it would run torch: smaller forms of inputs may."""
    if "campaign" in argv:
        return "--dry-run" not in argv
    libraries = bool({*LIBRARIES} & {*argv}) or any(word.startswith("trace:") for word in argv)
    return libraries and any(model in word for word in argv for model in (*MODELS, "small"))


def _agrees(argv: list[str], status: int, answer: Any) -> None:
    """What fit says is what plan says."""
    verdicts = {fit["verdict"] for fit in answer["fits"]}
    holds(status == int("does not fit" in verdicts), "the exit status is not the verdict", verdicts)
    again, out, _ = _run(["plan", *argv[1:]], "utf-8")
    holds(again == 0 and json.loads(out)["fits"] == answer["fits"], "plan and fit disagree", out[:200])


def _run(argv: list[str], encoding: str) -> tuple[int, str, str]:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, errors) for errors in ("strict", "backslashreplace"))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(argv)
        except SystemExit as end:  # argparse has printed its help
            status = int(end.code or 0)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding, "replace"))  # type: ignore[attr-defined]
    return status, texts[0], texts[1]


def _prepare() -> None:
    Path("small.json").write_text(json.dumps(config("llama", 2)))
    Path("measurements").mkdir()
    Path("measurements", "m.json").write_text(example().model_dump_json())
    Path("page.md").write_text("<!-- measured -->\n<!-- /measured -->\n")
    Path("campaign.yaml").write_text(
        "runs: [{name: a, model: qwen2.5-0.5b, layers: 1, device: cpu, recipe: {seq_len: 8}}]"
    )
    save(example_tape(2), "tape.json")
