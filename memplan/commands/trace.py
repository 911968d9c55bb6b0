"""``memplan trace MODEL``: the memory of one training step, by running the libraries' code without data."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from memplan.commands.arguments import (
    Parser,
    add_gpus,
    add_json,
    add_model,
    add_recipe,
    add_tape,
    recipe_options,
)

if TYPE_CHECKING:
    from memplan.planner import Plan
    from memplan.tape import Tape

EXAMPLES = """\
Needs pip install 'memplan[verify]' and no GPU: tensors have shapes but no data.
It answers for every causal language model that transformers has, also for those
that have no predicted plan (docs/architectures.md).

examples:
  memplan trace llama-8b --mode qlora --r 8
  memplan trace ./falcon/config.json --mode lora --tape falcon.json.gz
"""


def parser() -> Parser:
    """The arguments that ``memplan trace`` takes."""
    result = Parser(
        "trace", "The memory of one training step of the real libraries.", "MODEL [options]", EXAMPLES
    )
    add_model(result)
    add_gpus(result)
    add_json(result)
    add_tape(result)
    add_recipe(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the traced plan; 0."""
    options = recipe_options(arguments)
    answer, tape = traced(arguments.model, options, arguments.gpu)
    keep(tape, answer, arguments)
    show(answer, arguments, options)
    return 0


def traced(model: str, options: dict[str, Any], gpus: list[str] | None) -> tuple[Plan, Tape]:
    """The answer and its tape, with progress and warnings on standard error."""
    from memplan import stack
    from memplan.recipe import make_recipe
    from memplan.report.progress import tracing
    from memplan.resolve import resolve_config
    from memplan.traced import layers, trace_plan

    recipe = make_recipe(**options)
    found = resolve_config(model)
    for warning in stack.untested(stack.installed(recipe.loss.value)):
        sys.stderr.write(f"memplan: warning: {warning}\n")
    with tracing(layers(found.config)) as progress:
        return trace_plan(found, recipe, gpus=gpus, progress=progress)


def keep(tape: Tape, answer: Plan, arguments: argparse.Namespace) -> None:
    """Write the tape if --tape asks for it."""
    if arguments.tape is None:
        return
    from memplan.tapefile import TapeInfo, save

    info = TapeInfo(
        memplan_version=answer.memplan_version,
        model=answer.model.hub_id or answer.model.name,
        recipe=answer.recipe.model_dump(mode="json"),
        libraries=answer.libraries,
    )
    save(tape, arguments.tape, info)


def show(answer: Plan, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Print the answer as ``memplan plan`` does."""
    if arguments.json:
        from memplan.report.machine import print_plan

        print_plan(answer)
    else:
        from memplan.report.console import terminal
        from memplan.report.plan import show_plan

        show_plan(answer, terminal(), given=options, simulated=arguments.gpu is not None)
