"""``memplan MODEL``: the memory of one training step."""

from __future__ import annotations

import argparse
from dataclasses import replace

from memplan.commands.arguments import (
    Parser,
    UsageError,
    add_gpus,
    add_host_memory,
    add_json,
    add_lengths,
    add_pictures,
    add_recipe,
    add_run_file,
    add_switch,
    add_tape,
    add_verbose,
    check_host,
    given_lengths,
    given_options,
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
    add_run_file(result)
    add_gpus(result)
    add_lengths(result)
    add_host_memory(result)
    add_json(result)
    add_verbose(result)
    add_switch(
        result,
        "--trace",
        "run the libraries' own code instead of memplan's model of it, as memplan trace does",
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
        if arguments.lengths is not None:
            raise UsageError("a trace plays one step, and --lengths many: ask without one of them")
        return trace.run(arguments)
    from memplan.asked.recipe import Recipe
    from memplan.planning.plan import plan_of
    from memplan.planning.study import Prediction, ask

    given = Recipe(**given_options(arguments))
    study = Prediction(ask(arguments.model, given, arguments.gpu, arguments.config, given_lengths(arguments)))
    options = study.asked.given.model_dump(exclude_unset=True)
    answer = plan_of(study)
    check_host(answer, arguments)
    if arguments.html is not None and arguments.gpu:
        from memplan.planning.advise import advise

        of_longest = Prediction(replace(study.asked, lengths=None)) if arguments.lengths else study
        answer = answer.telling(
            advice=tuple(advise(of_longest, gpu.name, arguments.host_memory) for gpu in study.asked.gpus)
        )
    tape = study.run().tape if pictures.asked(arguments) else None
    trace.answer(answer, tape, arguments, options)
    return 0
