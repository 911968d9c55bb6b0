"""``memplan fit MODEL --gpu G``: does it fit? The exit status says so too."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from memplan.commands.arguments import (
    Parser,
    UsageError,
    add_gpus,
    add_host_memory,
    add_json,
    add_lengths,
    add_recipe,
    add_run_file,
    add_switch,
    add_verbose,
    check_host,
    given_lengths,
    given_options,
)
from memplan.errors import MemplanError
from memplan.streams import remark

if TYPE_CHECKING:
    from memplan.device.fit import Fit
    from memplan.planning.frontier import What
    from memplan.planning.plan import Plan
    from memplan.planning.records import HowMany
    from memplan.planning.study import Asked

STATUS_FITS, STATUS_DOES_NOT_FIT = 0, 1

EXAMPLES = """\
exit status: 0 if it fits on every card named (tight counts as fits), 1 if it
does not, 2 for a bad question; of several GPUs whose card is not named, some
cards are judged, and 0 is that it fits on one of them

examples:
  memplan fit llama-8b --mode lora --gradient-checkpointing --gpu 4090
  memplan fit llama-70b --gpu a6000 && ./train.sh
  memplan fit llama-8b --gpu 4090 --maximize seq-len
  memplan fit llama-70b --mode full --gpu h100 --how-many
"""


def parser() -> Parser:
    """The arguments that ``memplan fit`` takes."""
    result = Parser(
        "fit",
        "Says whether a run fits on a card, and if not, what would make it fit.",
        "MODEL --gpu NAME [options]",
        EXAMPLES,
    )
    add_run_file(result)
    add_gpus(result)
    add_lengths(result)
    add_host_memory(result)
    result.add_argument(
        "--maximize",
        choices=("batch-size", "seq-len"),
        default=None,
        help="find the largest that fits, with the allocator simulated",
    )
    add_switch(
        result,
        "--how-many",
        "find the fewest GPUs of this kind that are enough, by each way of sharing a step",
    )
    add_switch(result, "--eval", "judge the run with an evaluation in it, which else is said beside")
    result.add_argument(
        "--advise",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="say what to change, each change priced by planning it (default: where it does not fit)",
    )
    add_json(result)
    add_verbose(result)
    add_recipe(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the verdicts; 0 if it fits on every card, else 1."""
    from memplan.asked.recipe import Recipe
    from memplan.planning.plan import plan_of
    from memplan.planning.study import Prediction, ask

    recipe = Recipe(**given_options(arguments))
    lengths = given_lengths(arguments)
    if lengths is not None and arguments.maximize is not None:
        raise UsageError("--maximize looks for one length or batch, --lengths plays many: ask one of them")
    if arguments.how_many and arguments.maximize is not None:
        raise UsageError("--how-many and --maximize each look for a number: ask one of them")
    by = replicas = None
    if arguments.how_many and recipe.gpus == 1:
        said = _said(arguments)
        by = recipe.parallel or said.get("parallel")
        replicas = recipe.dp_replicate or (said.get("dp_replicate") if recipe.parallel is None else None)
    if by is not None:  # on how many is yet to be found
        recipe = Recipe(**{**recipe.model_dump(exclude_unset=True), "gpus": 2 * (replicas or 1)})
    asked = ask(arguments.model, recipe, arguments.gpu, arguments.config, lengths)
    if not asked.named and (asked.recipe.gpus == 1 or by is not None):
        raise UsageError("the following arguments are required: --gpu (see memplan fit --help)")
    counts: tuple[HowMany, ...] = ()
    if arguments.how_many:
        counts, asked = _counted(asked, by)
    given = asked.given.model_dump(exclude_unset=True)
    what: What | None = None
    if arguments.maximize is not None:
        what = "seq_len" if arguments.maximize == "seq-len" else "batch_size"
        found = _maximized(asked, what)
        if found is None:
            return STATUS_DOES_NOT_FIT
        asked = found
    study = Prediction(asked)
    answer = plan_of(study)
    check_host(answer, arguments)
    answer = answer.telling(evaluation=study.judged_evaluation, how_many=counts)
    if arguments.eval and answer.evaluation is None:
        raise UsageError("an evaluation under ZeRO-3 or FSDP1 is not planned: leave out --eval")
    if arguments.eval:
        answer = answer.telling(fits=_evaluated(answer))
    enough = all if asked.named else any
    fits = enough(fit.verdict != "does not fit" for fit in answer.fits)
    wanted = arguments.advise is None and not fits and arguments.maximize is None and asked.named
    if arguments.advise or wanted:
        from memplan.planning.advise import advise

        try:
            of_longest = study if lengths is None else Prediction(replace(asked, lengths=None))
            answer = answer.telling(
                advice=tuple(
                    advise(of_longest, gpu.name, arguments.host_memory, evaluates=arguments.eval)
                    for gpu in asked.gpus
                )
            )
        except MemplanError as error:
            if arguments.advise:
                raise
            remark(str(error))
    _show(answer, arguments, given, what)
    return STATUS_FITS if fits else STATUS_DOES_NOT_FIT


def _said(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """The recipe's options that a file says, whatever number of GPUs it says among them."""
    from memplan.planning.study import opened

    _, read = opened(arguments.model, arguments.config)
    return {} if read is None else read.options


def _evaluated(answer: Plan) -> tuple[Fit, ...]:
    """The verdicts of the run with an evaluation in it, where that makes them others."""
    found = answer.evaluation
    assert found is not None
    higher = {fit.gpu: fit for fit in found.fits}
    told = f"with an evaluation of {found.batch_size} sequences"
    return tuple(
        higher[fit.gpu].model_copy(update={"note": "; ".join(filter(None, (told, higher[fit.gpu].note)))})
        if fit.gpu in higher
        else fit
        for fit in answer.fits
    )


def _counted(asked: Asked, by: str | None) -> tuple[tuple[HowMany, ...], Asked]:
    """The fewest cards by each strategy, or by the one that was named, and the question on the fewest."""
    from memplan.planning.how_many import how_many, on_the_fewest
    from memplan.predict.parameters import check_several

    if len(asked.gpus) > 1:
        raise UsageError("--how-many asks about one kind of card: give one --gpu")
    if by is None and asked.recipe.gpus > 1:
        raise UsageError(
            f"--how-many looks for a number of GPUs, which is said to be {asked.recipe.gpus}: leave that out"
        )
    check_several(asked.spec)
    counts = how_many(asked, asked.gpus[0], by)
    return counts, on_the_fewest(asked, counts)


def _maximized(asked: Asked, what: What) -> Asked | None:
    """The question with the largest batch or sequence that fits; None, which is said, if not even 1 does."""
    from memplan.planning.frontier import Peaks, largest

    if len(asked.gpus) > 1:
        raise UsageError("--maximize asks about one card: give one --gpu")
    gpu, recipe = asked.gpus[0], asked.given
    other = recipe.batch_size if what == "seq_len" else recipe.seq_len
    value = largest(Peaks(asked.spec, asked.recipe, gpu), what, other)
    if not value:
        kept = f"batch size {other}" if what == "seq_len" else f"{other} tokens a sequence"
        remark(
            f"not even 1 {'token' if what == 'seq_len' else 'sequence'} fits on the {gpu.name} with {kept} "
            "and some to spare; ask without --maximize what would make it fit"
        )
        return None
    return asked.otherwise(recipe.model_copy(update={what: value}))


def _show(answer: Plan, arguments: argparse.Namespace, given: Collection[str], what: What | None) -> None:
    if arguments.json:
        from memplan.report.machine import print_plan

        print_plan(answer)
    else:
        from memplan.report.console import terminal
        from memplan.report.fit import show_fit
        from memplan.report.headline import largest

        found = None if what is None else largest(answer, what, getattr(answer.recipe, what))
        show_fit(answer, terminal(), given, found=found, verbose=arguments.verbose)
