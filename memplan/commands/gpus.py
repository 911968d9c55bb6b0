"""``memplan gpus``: the cards that ``--gpu`` knows."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from memplan.commands.arguments import Parser, UsageError, add_json
from memplan.errors import printable

if TYPE_CHECKING:
    from memplan.asked.gpus import Gpu

EXAMPLES = """\
examples:
  memplan gpus
  memplan gpus h100
  memplan gpus 24GB
"""


def parser() -> Parser:
    """The arguments that ``memplan gpus`` takes."""
    result = Parser("gpus", "The cards that --gpu knows, with their memory.", "[FILTER] [--json]", EXAMPLES)
    result.add_argument(
        "filter",
        metavar="FILTER",
        nargs="?",
        default="",
        help="a size, such as 24GB, or part of a name, alias, vendor or kind (consumer, workstation, "
        "datacenter, slice, shared)",
    )
    add_json(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the cards; 0."""
    from memplan.asked.gpus import load_gpus, of_size, size_of

    wanted = arguments.filter.strip().lower()
    size = size_of(wanted)

    def matches(gpu: Gpu) -> bool:
        return any(wanted in text.lower() for text in (gpu.name, *gpu.aliases, gpu.vendor, gpu.kind))

    cards = (of_size(size) if size is not None else []) or [gpu for gpu in load_gpus() if matches(gpu)]
    if not cards:
        what = f"{size:g} GB" if size is not None else f"{printable(arguments.filter)!r} in its name"
        raise UsageError(f"no card has {what}; `memplan gpus` lists all")
    if arguments.json:
        from memplan.report.machine import print_list

        print_list(
            "gpus",
            [
                card.model_dump(mode="json", exclude={"assumed"}) | {"usable_bytes": card.visible_bytes}
                for card in cards
            ],
        )
    else:
        from memplan.report.console import terminal
        from memplan.report.gpus import show_gpus

        show_gpus(cards, terminal())
    return 0
