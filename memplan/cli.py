"""The command ``memplan``: finds the subcommand, runs it, and turns what goes wrong into exit statuses.

Each subcommand is a module of memplan.commands with ``parser()`` and ``run(arguments) -> status``. Only the
one asked for is imported: a plan has 0.2 s from a cold start, and every import is part of it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from memplan import __version__, streams
from memplan.commands import COMMANDS, module_of
from memplan.errors import MemplanError, UnknownName, reason, shown

STATUS_BAD_QUESTION = 2
STATUS_BUG = 70  # EX_SOFTWARE of sysexits.h
STATUS_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
STATUS_BROKEN_PIPE = 141  # 128 + SIGPIPE

LONGEST_COMPLAINT = 400  # characters

HELP = """\
Usage: memplan MODEL [options]
       memplan COMMAND ...

Will this fine-tuning run fit on my GPU, and where does every byte go?
MODEL is an alias (llama-70b), a Hub id, a path to a config.json or folder, or
the file of a trainer (axolotl.yaml, what `trl sft --config` takes).

Commands:
  plan MODEL          memory of one training step; the same as memplan MODEL
  fit MODEL --gpu G   exit status 0: fits on G; 1: does not fit; 2: bad question
  frontier MODEL      the longest sequences that a card has room for
  compare MODEL       the modes full, lora and qlora side by side
  trace MODEL         the same by running the libraries' own code
  dry-run -- COMMAND  your own program, unmodified, on a card that is not there
  stub MODEL FOLDER   a checkpoint that takes no disk, to be dry-run with
  verify MODEL        train a few steps for real, and compare
  campaign PLAN       many such runs within a budget of time
  report [FOLDER]     all measurements against the plan
  diff A B            where two plans or traces differ; exit status 0: nowhere
  models [FILTER]     the models that have an alias
  gpus [FILTER]       the cards that --gpu knows
  completion SHELL    completion script for bash, zsh or fish

Options that most questions need (all of them: memplan help plan):
  --mode MODE         full, lora or qlora (the default)
  --r N               rank of the adapters (8)
  --batch-size N      sequences a step (1)
  --seq-len N         tokens a sequence (2048)
  --optimizer NAME    as the Hugging Face Trainer names it (adamw_torch_fused)
  --gradient-checkpointing, --no-gradient-checkpointing
  --gpu NAME          a card to judge; may be given several times
  --json              the answer as JSON; every command takes it

Examples:
  memplan llama-70b --mode qlora --r 8
  memplan fit meta-llama/Llama-3.1-8B --mode lora --seq-len 4096 --gpu 4090
  memplan compare qwen2.5-7b --modes lora,qlora --gpu a6000
  memplan ./my-model/config.json --mode full --optimizer adamw_bnb_8bit --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    streams.drop_remarks()
    # pydantic looks through all installed packages for plugins: a tenth of a cold start, for nothing here.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # Collecting cycles while modules load is another part of it (7 %), and a plan ends before it would help.
    gc.set_threshold(100_000)
    if not streams.ready():  # before anything is planned, trained or saved whose answer nobody would get
        return _complain(
            "standard output is closed; where the exit status alone is wanted, send it to /dev/null"
        )
    try:
        return _status(arguments)
    finally:
        streams.settle()


def _status(arguments: list[str]) -> int:
    """The exit status. Every way in which a command can end has its own: Python's for an exception is 1,
    which means "does not fit"."""
    try:
        status = _ended(arguments)
        with streams.writing():
            sys.stdout.flush()
        return status
    except MemplanError as error:
        return _complain(str(error))
    except BrokenPipeError:  # whoever read our output has closed it (`| head`)
        return STATUS_BROKEN_PIPE
    except OSError as error:
        where = f"{shown(str(error.filename))}: " if error.filename is not None else ""
        return _complain(f"{where}{reason(error)}")
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
    except MemoryError:
        return _complain("this machine has too little memory to answer that")
    except RecursionError:
        return _complain("something in what was read is nested too deeply")
    except Exception as error:
        if os.environ.get("MEMPLAN_TRACEBACK"):
            import traceback

            streams.aside(traceback.format_exc())
        _complain(
            f"a bug in memplan ({type(error).__name__}: {error}); please report it with the command and what "
            "MEMPLAN_TRACEBACK=1 prints"
        )
        return STATUS_BUG


def _ended(arguments: list[str]) -> int:
    try:
        return _run(arguments)
    except SystemExit as end:  # argparse after --help; SIGTERM while a child process trains
        return end.code if isinstance(end.code, int) else 0


def _run(arguments: list[str]) -> int:
    if not arguments:
        streams.aside(HELP)
        return STATUS_BAD_QUESTION
    first, *rest = arguments
    if first == "help" and rest:
        return _help(rest[0])
    if first in ("-h", "--help", "help"):
        streams.say(HELP)
        return 0
    if first in ("-V", "--version") or arguments == ["version"]:
        streams.say(f"memplan {__version__}\n")
        return 0
    if first in COMMANDS:
        return _run_command(first, rest)
    try:
        return _run_command("plan", arguments)
    except UnknownName as error:
        raise _misspelt_command(first, error) or error from None


def _help(command: str) -> int:
    if command in COMMANDS:
        return _run_command(command, ["--help"])
    close = _close_command(command)
    meant = f"did you mean `memplan help {close}`?" if close else "`memplan help` lists them"
    raise MemplanError(f"no command is called {shown(command)}; {meant}")


def _run_command(name: str, arguments: list[str]) -> int:
    from memplan.commands.arguments import parse

    command = import_module(module_of(name))
    status: int = command.run(parse(command.parser(), arguments))
    return status


def _misspelt_command(word: str, error: UnknownName) -> MemplanError | None:
    """The error for `memplan modles`, which is more likely a command than a model."""
    close = _close_command(word)
    if error.kind != "model" or close is None:
        return None
    return MemplanError(f"no command or model is called {word!r}; did you mean `memplan {close}`?")


def _close_command(word: str) -> str | None:
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, COMMANDS, n=1, cutoff=0.7)), None)


def _complain(sentence: str) -> int:
    line = " ".join(sentence.split())
    if len(line) > LONGEST_COMPLAINT:  # it quotes something long that was typed or read
        line = line[: LONGEST_COMPLAINT - 1] + "…"
    streams.drop_remarks()
    streams.remark(line)
    return STATUS_BAD_QUESTION
