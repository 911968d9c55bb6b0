"""``memplan MODEL``: the memory of one training step."""

from __future__ import annotations

import argparse

from memplan.commands.arguments import Parser, add_gpus, add_json, add_model, add_recipe, recipe_options

EXAMPLES = """\
examples:
  memplan llama-70b --mode qlora --r 8
  memplan plan ./models --mode full --optimizer adamw_bnb_8bit   (a folder that is called like a command)
"""


def parser() -> Parser:
    """The arguments that ``memplan plan`` takes."""
    result = Parser("plan", "The memory of one training step, byte by byte.", "MODEL [options]", EXAMPLES)
    add_model(result)
    add_gpus(result)
    add_json(result)
    add_recipe(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0."""
    from memplan.planner import plan
    from memplan.recipe import make_recipe

    options = recipe_options(arguments)
    answer = plan(arguments.model, make_recipe(**options), gpus=arguments.gpu)
    if arguments.json:
        from memplan.report.machine import print_plan

        print_plan(answer)
    else:
        from memplan.report.console import terminal
        from memplan.report.plan import show_plan

        show_plan(answer, terminal(), given=options)
    return 0
