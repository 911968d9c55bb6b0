"""``memplan diff A B``: two tapes lined up."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.commands.arguments import Parser, UsageError, add_json, add_recipe, add_switch, given_options
from memplan.errors import shown
from memplan.streams import say

if TYPE_CHECKING:
    from memplan.tape import Tape

STATUS_EQUAL, STATUS_DIFFERENT = 0, 1

EXAMPLES = """\
exit status: 0 if the tapes are equal (the same peak, the same sizes in the same
order), 1 if not, 2 for a bad question. Differences in names alone are printed
and make no tapes unequal.

examples:
  memplan diff plan:llama-8b trace:llama-8b --mode qlora --r 8
  memplan plan llama-8b --r 8 --tape r8.json.gz
  memplan diff r8.json.gz plan:llama-8b --r 16
"""


def parser() -> Parser:
    """The arguments that ``memplan diff`` takes."""
    result = Parser("diff", "Where two steps differ, tensor by tensor.", "A B [options]", EXAMPLES)
    for name in ("a", "b"):
        result.add_argument(
            name,
            metavar=name.upper(),
            help="a file that --tape wrote, or plan:MODEL or trace:MODEL, run with the options given; MODEL "
            "may be the file of a trainer",
        )
    formats = result.add_mutually_exclusive_group()
    add_json(formats)
    add_switch(formats, "--markdown", "print Markdown")
    add_recipe(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the difference; 0 if there is none, else 1. What a Trainer's loop keeps is left out of what is
    held against a record of memplan's own, which has none of it."""
    from memplan.parts.loop import MODULE
    from memplan.tape.diff import diff

    options = given_options(arguments)
    names = (arguments.a, arguments.b)
    if options and not any(_asked(name) for name in names):
        raise UsageError("options say how to run plan:MODEL or trace:MODEL; both tapes here are files")
    files = {name: _file(name) for name in names if not _asked(name)}
    looped = all(tape.provenance != "measured" or MODULE in tape.modules for tape in files.values())
    a, b = (files[name] if name in files else _written(name, options, looped) for name in names)
    found = diff(a, b)
    if arguments.json:
        from memplan.report.machine import print_answer

        print_answer({"tapes": names, **found.model_dump(mode="json")})
    elif arguments.markdown:
        from memplan.report.diff import markdown

        say(markdown(found, names))
    else:
        from memplan.report.console import terminal
        from memplan.report.diff import show_diff

        show_diff(found, names, terminal())
    return STATUS_EQUAL if found.equal else STATUS_DIFFERENT


def _asked(name: str) -> bool:
    return name.startswith(("plan:", "trace:"))


def _check_file(name: str) -> None:
    """Raise UsageError where what can be planned stands for a tape."""
    if name.endswith((".yaml", ".yml")):
        raise UsageError(f"{shown(name)} is no tape; the plan of a trainer's file is plan:{name}")
    if Path(name).exists():
        return
    from memplan.importers.registry import by_name

    if by_name(name) is not None:
        raise UsageError(f"there is no file {shown(name)}; the plan of the model is plan:{name}")


def _file(name: str) -> Tape:
    _check_file(name)
    from memplan.tape.file import load
    from memplan.verify.measurement import FORMAT, tape_of

    return load(name, {FORMAT: tape_of})[0]


def _written(name: str, options: dict[str, Any], looped: bool) -> Tape:
    writer, _, model = name.partition(":")
    if writer == "trace":
        from memplan.commands.trace import traced

        return traced(model, options, [], looped=looped)[1]
    from memplan.asked.recipe import Recipe
    from memplan.planning.predicted import predicted_tape

    return predicted_tape(model, Recipe(**options), looped=looped)
