"""``memplan models``: the models that have an alias."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from memplan.commands.arguments import Parser, UsageError, add_json
from memplan.errors import printable

if TYPE_CHECKING:
    from memplan.importers.registry import RegistryEntry

EXAMPLES = """\
Any other model of a known family works too: give its Hub id or the path to its
config.json.

examples:
  memplan models
  memplan models qwen3
  memplan models llama3:8b
"""


def parser() -> Parser:
    """The arguments that ``memplan models`` takes."""
    result = Parser("models", "The models that have an alias.", "[FILTER] [--json]", EXAMPLES)
    result.add_argument(
        "filter", metavar="FILTER", nargs="?", default="", help="part of an alias, Hub id or architecture"
    )
    add_json(result)
    return result


def _within(wanted: tuple[str, ...], there: tuple[str, ...]) -> bool:
    """Whether a name begins with these words, however both are spelled."""
    return bool(wanted) and there[: len(wanted)] == wanted


def run(arguments: argparse.Namespace) -> int:
    """Print the models; 0."""
    from memplan.importers.names import words
    from memplan.importers.registry import registry

    wanted = arguments.filter.strip().lower()

    def matches(entry: RegistryEntry) -> bool:
        names = (entry.alias, *entry.aliases, entry.hub_id, entry.architecture)
        return any(wanted in name.lower() or _within(words(wanted), words(name)) for name in names)

    models = [entry for entry in registry() if matches(entry)]
    if not models:
        raise UsageError(
            f"no model has {printable(arguments.filter)!r} in its name; `memplan models` lists all"
        )
    if arguments.json:
        from dataclasses import asdict

        from memplan.report.machine import print_list

        print_list("models", [asdict(model) for model in models])
    else:
        from memplan.report.console import terminal
        from memplan.report.models import show_models

        show_models(models, terminal())
    return 0
