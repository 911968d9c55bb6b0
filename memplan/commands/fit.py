"""``memplan fit MODEL --gpu G``: does it fit? The exit status says so too."""

from __future__ import annotations

import argparse

from memplan.commands.arguments import Parser, add_gpus, add_json, add_model, add_recipe, recipe_options

STATUS_FITS, STATUS_DOES_NOT_FIT = 0, 1

EXAMPLES = """\
exit status: 0 if it fits on every card named (tight counts as fits), 1 if it
does not, 2 for a bad question

examples:
  memplan fit llama-8b --mode lora --gradient-checkpointing --gpu 4090
  memplan fit llama-70b --gpu a6000 && ./train.sh
"""


def parser() -> Parser:
    """The arguments that ``memplan fit`` takes."""
    result = Parser(
        "fit", "Says whether a training step fits on a card.", "MODEL --gpu NAME [options]", EXAMPLES
    )
    add_model(result)
    add_gpus(result, required=True)
    add_json(result)
    add_recipe(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the verdicts; 0 if it fits on every card, else 1."""
    from memplan.planner import plan
    from memplan.recipe import make_recipe

    answer = plan(arguments.model, make_recipe(**recipe_options(arguments)), gpus=arguments.gpu)
    if arguments.json:
        from memplan.report.machine import print_plan

        print_plan(answer)
    else:
        from memplan.report.console import terminal
        from memplan.report.fit import show_fit

        show_fit(answer, terminal())
    fits = all(fit.verdict != "does not fit" for fit in answer.fits)
    return STATUS_FITS if fits else STATUS_DOES_NOT_FIT
