"""``memplan MODEL``: the memory of one training step."""

from __future__ import annotations

import argparse

from memplan.commands.arguments import (
    Parser,
    add_gpus,
    add_json,
    add_model,
    add_pictures,
    add_recipe,
    add_tape,
    recipe_options,
)

EXAMPLES = """\
examples:
  memplan llama-70b --mode qlora --r 8
  memplan llama-8b --mode full --timeline --html llama.html
  memplan plan ./models --mode full   (a folder called like a command)
"""


def parser() -> Parser:
    """The arguments that ``memplan plan`` takes."""
    result = Parser("plan", "The memory of one training step, byte by byte.", "MODEL [options]", EXAMPLES)
    add_model(result)
    add_gpus(result)
    add_json(result)
    result.add_argument(
        "--trace",
        action="store_true",
        default=False,
        help="run the libraries' own code instead of memplan's model of it, as memplan trace does",
    )
    add_tape(result)
    add_pictures(result)
    add_recipe(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0."""
    from memplan.commands import pictures, trace

    pictures.check(arguments)
    if arguments.trace:
        return trace.run(arguments)
    from memplan.asked.recipe import make_recipe
    from memplan.planning.plan import plan
    from memplan.planning.predicted import predicted_tape

    options = recipe_options(arguments)
    recipe = make_recipe(**options)
    answer = plan(arguments.model, recipe, gpus=arguments.gpu)
    tape = predicted_tape(arguments.model, recipe) if pictures.asked(arguments) else None
    if arguments.html is not None and arguments.gpu:
        from memplan.planning.advise import advise

        answer = answer.advised(advise(arguments.model, recipe, name) for name in arguments.gpu)
    trace.answer(answer, tape, arguments, options)
    return 0
