"""Writes the docs that are made from code and results: cli.md, claims.md, accuracy.md, architectures.md,
kernels.md, dry-run.md, files.md, trainers.md, the table in recipe.md and the four schemas.

Run it after a change of options or of the plan's records; tests/test_docs.py fails while they are behind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from enum import Enum
from functools import partial
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import accuracy
import architectures
import claims
import dry_runs
import files
import json_answers
import kernels_page
import trainers
from pydantic import BaseModel

from memplan.asked.recipe import Recipe, recipe_options
from memplan.cli import HELP
from memplan.commands import COMMANDS, module_of
from memplan.commands.arguments import Parser
from memplan.emulate.answer import DryRun
from memplan.planning.plan import Plan
from memplan.verify.measurement import Measurement

DOCS = Path(__file__).parent

HEAD = """\
# Command line

Made by `python docs/generate.py` from the parsers; do not edit.

Exit statuses: 0 the question is answered (for `fit`: it fits), 1 it does not fit (`fit` only), 2 a bad
question, with one sentence on standard error. An answer that can't be written, since standard output is
closed or its disk is full, is 2 as well; a standard error that is closed changes nothing. `MODEL` is an
alias, a Hub id, or a path to a `config.json` or its folder; a folder that is called like a command is
written `./models`. Output has no colour when it is piped or `NO_COLOR` is set.
"""


def command_line() -> str:
    """docs/cli.md."""
    parts = [HEAD, "## memplan\n", f"```text\n{HELP}```\n"]
    parts += [_command(import_module(module_of(name)).parser()) for name in COMMANDS]
    return "\n".join(parts)


def recipe() -> str:
    """docs/recipe.md, whose table is what the recipe's fields tell; the rest stays as it is."""
    text = (DOCS / "recipe.md").read_text(encoding="utf-8")
    head, _, rest = text.partition("| --- | --- | --- |\n")
    resolved = Recipe().resolved()
    rows = "".join(
        f"| `{name}` | `{_shown(getattr(resolved, name))}` | {option.source} |\n"
        for name, option in recipe_options().items()
    )
    return f"{head}| --- | --- | --- |\n{rows}\n{rest.partition(chr(10) * 2)[2]}"


def _shown(value: object) -> str:
    return str(value.value if isinstance(value, Enum) else value)


def schema(record: type[BaseModel]) -> str:
    """A schema page: what a record is in JSON."""
    return json.dumps(record.model_json_schema(mode="serialization"), indent=2) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "accuracy.md": accuracy.page,
    "answers.schema.json": json_answers.page,
    "architectures.md": architectures.page,
    "cli.md": command_line,
    "claims.md": claims.page,
    "dry-run.md": dry_runs.page,
    "files.md": files.page,
    "kernels.md": kernels_page.page,
    "dry-run.schema.json": partial(schema, DryRun),
    "measurement.schema.json": partial(schema, Measurement),
    "plan.schema.json": partial(schema, Plan),
    "recipe.md": recipe,
    "trainers.md": trainers.page,
}


def _command(parser: Parser) -> str:
    lines = [f"## {parser.prog}", "", parser.description or "", "", f"    {parser.usage}"]
    for group in parser._action_groups:
        if group._group_actions:
            lines += ["", f"**{group.title}**", "", "| argument | meaning |", "| --- | --- |"]
            lines += [f"| {_names(action)} | {_meaning(action)} |" for action in group._group_actions]
    if parser.epilog:
        lines += ["", "```text", parser.epilog.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _names(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 or not action.option_strings else f" {_metavar(action)}"
    names = action.option_strings or [_metavar(action)]
    return ", ".join(f"`{name}{value}`" for name in names)


def _metavar(action: argparse.Action) -> str:
    if action.metavar:
        return str(action.metavar)
    return "{" + ",".join(str(choice) for choice in action.choices) + "}" if action.choices else ""


def _meaning(action: argparse.Action) -> str:
    return (action.help or "").replace("|", "\\|")


if __name__ == "__main__":
    for page, text in PAGES.items():
        (DOCS / page).write_text(text(), encoding="utf-8")
        print(f"wrote {DOCS / page}")
