"""Command lines: every command with the options that its parser has."""

from __future__ import annotations

import json
import os
from argparse import Action
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from example_measurements import example
from example_tapes import example_tape
from small_specs import config

from memplan.commands import COMMANDS, module_of
from memplan.tape.file import save

from .command import command
from .mutate import TEXTS
from .sense import holds

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
# what a shell can pass on: no null, and surrogates only for bytes that are no text; and no name of a file
# elsewhere, which would be written, as asked
ODD = tuple(text for text in TEXTS if not {"\0", "\ud800", "/"} & {*text} or text == "/dev/null")


@cache
def actions(command: str) -> list[Action]:
    """The arguments of a command, without those that run torch or say themselves that they take long."""
    parser = import_module(module_of(command)).parser()
    return [action for action in parser._actions if action.dest not in ("trace", "exact")]


def make(random: Random) -> dict[str, Any]:
    """A command line, the terminal's width and its encoding."""
    command = random.choice([name for name in COMMANDS if name not in ("dry-run", "stub")])  # run programs
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
    if command == "frontier":  # a table is as many questions as it has points, each of which has its seconds
        argv += ["--batch-sizes", "2"] if "--batch-sizes" not in argv else []
        argv += ["--modes", "qlora"] if not {"--modes", "--mode"} & {*argv} else []
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
    if not argv or _trains(argv):
        return
    if argv[0] == "report" and (len(argv) == 1 or argv[1].startswith("-")):
        return  # of all that the repository has measured, which takes its time
    _prepare()
    os.environ["COLUMNS"] = value["columns"]
    status, out = command(*argv, encoding=value["encoding"])
    if argv[0] == "fit" and out.startswith("{") and not {"--maximize", "--advise", "--no-advise"} & {*argv}:
        judged = json.loads(out)["fits"]
        verdicts = {fit["verdict"] for fit in judged}
        holds(status == int("does not fit" in verdicts), "the exit status is not the verdict", verdicts)
        planned = json.loads(command("plan", *argv[1:])[1])["fits"]
        holds(planned == judged, "plan and fit disagree", out[:200])


def _trains(argv: list[str]) -> bool:
    """Whether it would run torch: smaller forms of inputs may."""
    if "campaign" in argv:
        return "--dry-run" not in argv
    libraries = bool({*LIBRARIES} & {*argv}) or any(word.startswith("trace:") for word in argv)
    return libraries and any(model in word for word in argv for model in (*MODELS, "small"))


def _prepare() -> None:
    Path("small.json").write_text(json.dumps(config("llama", 2)))
    Path("measurements").mkdir()
    Path("measurements", "m.json").write_text(example().model_dump_json())
    Path("page.md").write_text("<!-- measured -->\n<!-- /measured -->\n")
    Path("campaign.yaml").write_text(
        "runs: [{name: a, model: qwen2.5-0.5b, layers: 1, device: cpu, recipe: {seq_len: 8}}]"
    )
    save(example_tape(2), "tape.json")
