"""``memplan trace MODEL``: the memory of one training step, by running the libraries' code without data."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from memplan.commands.arguments import (
    Parser,
    add_gpus,
    add_json,
    add_pictures,
    add_recipe,
    add_run_file,
    add_tape,
    add_verbose,
    given_options,
)
from memplan.errors import UnsupportedArchitecture
from memplan.streams import remark

if TYPE_CHECKING:
    from memplan.planning.plan import Plan
    from memplan.tape import Tape

EXAMPLES = """\
Needs torch, transformers, peft, bitsandbytes and accelerate, and no GPU:
tensors have shapes but no data. It answers for every causal language model that
transformers has, also for those that have no predicted plan.

examples:
  memplan trace llama-8b --mode qlora --r 8
  memplan trace ./falcon/config.json --mode lora --tape falcon.json.gz
"""


def parser() -> Parser:
    """The arguments that ``memplan trace`` takes."""
    result = Parser(
        "trace", "The memory of one training step of the real libraries.", "MODEL [options]", EXAMPLES
    )
    add_run_file(result)
    add_gpus(result)
    add_json(result)
    add_verbose(result)
    add_tape(result)
    add_pictures(result)
    add_recipe(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the traced plan; 0."""
    from memplan.commands import pictures

    pictures.check(arguments)
    options = given_options(arguments)
    plan, tape = traced(arguments.model, options, arguments.gpu, arguments.config)
    if plan.read is not None:
        options = plan.recipe.model_dump(exclude_unset=True)
    answer(plan, tape, arguments, options)
    return 0


def traced(
    model: str,
    options: dict[str, Any],
    gpus: list[str] | None,
    config: str | None = None,
    *,
    looped: bool = True,
) -> tuple[Plan, Tape]:
    """The answer and its tape, with progress and warnings on standard error; ``looped`` as
    :func:`memplan.planning.traced.trace_plan` has it."""
    from memplan import libraries, losses
    from memplan.asked.recipe import Recipe
    from memplan.importers.hf import spec_from_config
    from memplan.importers.resolve import resolve_config
    from memplan.planning.study import opened, read_from
    from memplan.planning.traced import layers, trace_plan
    from memplan.report.progress import tracing

    given = recipe = Recipe(**options)
    named, read = opened(model, config)
    if read is not None:
        recipe = read.recipe(given)
    found = resolve_config(str(named))
    if read is not None:
        with suppress(UnsupportedArchitecture):  # of a model that memplan does not know, the file is all
            spec = spec_from_config(found.config, found.name, found.hub_id)
            recipe = read.suited(recipe, spec, given)
    library = losses.find(recipe.loss).library
    for warning in libraries.untested(libraries.installed(library), library):
        remark(f"warning: {warning}")
    with tracing(layers(found.config)) as progress:
        plan, tape = trace_plan(found, recipe, gpus=gpus, progress=progress, looped=looped)
    return plan.model_copy(update={"read": read_from(read, plan.recipe)}), tape


def answer(plan: Plan, tape: Tape | None, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Write the files that are asked for, then print the plan. ``tape`` is there if anything needs it."""
    from memplan.commands import pictures

    if tape is not None:
        pictures.write(plan, tape, arguments, options)
    if arguments.json:
        from memplan.report.machine import print_plan

        print_plan(plan)
        return
    from memplan.report.console import terminal
    from memplan.report.plan import show_plan

    console = terminal()
    show_plan(plan, console, given=options, simulated=arguments.gpu is not None, verbose=arguments.verbose)
    if tape is not None and arguments.timeline:
        from memplan.report.timeline import show_timeline

        console.print()
        show_timeline(tape, console, plan.recipe)
