"""``memplan compare MODEL``: the modes side by side."""

from __future__ import annotations

import argparse

from memplan.commands.arguments import (
    Parser,
    add_gpus,
    add_json,
    add_recipe,
    add_run_file,
    applicable,
    given_options,
    modes,
)

ALL_MODES = "full,lora,qlora"

EXAMPLES = """\
An option that a mode has no use for (--r in full, --kbit-prep in lora) is left
out there.

examples:
  memplan compare llama-70b
  memplan compare qwen2.5-7b --modes lora,qlora --seq-len 8192 --gpu a6000
"""


def parser() -> Parser:
    """The arguments that ``memplan compare`` takes."""
    result = Parser("compare", "Plans of several modes side by side.", "MODEL [options]", EXAMPLES)
    add_run_file(result)
    result.add_argument(
        "--modes",
        "--mode",
        metavar="M,M",
        default=ALL_MODES,
        help=f"which modes, with commas between them (default: {ALL_MODES})",
    )
    add_gpus(result)
    add_json(result)
    add_recipe(result, mode=False)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the plans side by side; 0."""
    from memplan.asked.recipe import Recipe
    from memplan.planning.cards import able
    from memplan.planning.plan import plan

    options = given_options(arguments)
    if options.get("kernels") == "memplan":  # the cards on which they run, for all modes alike
        arguments.gpu = [card.name for card in able(Recipe(kernels="memplan"), arguments.gpu)]
    plans = [
        plan(
            arguments.model,
            Recipe(mode=mode, **applicable(options, mode)),
            gpus=arguments.gpu,
            config=arguments.config,
        )
        for mode in modes(arguments.modes)
    ]
    if arguments.json:
        from memplan.report.machine import print_list

        print_list("plans", [one.model_dump(mode="json") for one in plans])
    else:
        from memplan.report.compare import show_comparison
        from memplan.report.console import terminal

        show_comparison(plans, terminal())
    return 0
