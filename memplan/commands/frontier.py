"""``memplan frontier MODEL --gpu G``: the longest sequence for each batch, mode, optimizer, checkpointing."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from memplan.commands.arguments import (
    Parser,
    UsageError,
    add_json,
    add_recipe,
    add_run_file,
    applicable,
    given_options,
    modes,
    possible,
)
from memplan.streams import remark

if TYPE_CHECKING:
    from memplan.asked.recipe import Recipe
    from memplan.runfiles import Reading

BATCHES = "1,2,4,8"
MODES = "full,lora,qlora"
MOST_POINTS = 2000

EXAMPLES = """\
Each number is what memplan fit --maximize seq-len says: the allocator is
simulated. --no-exact takes less than a second for any table and says what no
run can do without, the tensors at the peak; the allocator's losses come off it.

examples:
  memplan frontier llama-8b --gpu 4090
  memplan frontier llama-8b --gpu a6000 --optimizers adamw_torch,adamw_8bit
  memplan frontier llama-70b --gpu h100 --modes qlora --batch-sizes 1,2
"""


def parser() -> Parser:
    """The arguments that ``memplan frontier`` takes."""
    result = Parser(
        "frontier", "The longest sequences that a card has room for.", "MODEL --gpu NAME [options]", EXAMPLES
    )
    add_run_file(result)
    result.add_argument(
        "--gpu", metavar="NAME", required=True, help="the card, such as a6000 or 24GB (memplan gpus), or auto"
    )
    for options, default, what in (
        (("--batch-sizes",), BATCHES, "batch sizes"),
        (("--modes", "--mode"), MODES, "modes"),
        (("--optimizers",), "the recipe's", "optimizers, as the Trainer names them"),
    ):
        result.add_argument(
            *options,
            metavar="X,X",
            default=None,
            help=f"{what}, with commas between them (default: {default})",
        )
    result.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="simulate the allocator for each point (default: on)",
    )
    add_json(result)
    add_recipe(result, mode=False)
    for action in result._actions:
        if action.dest in ("batch_size", "seq_len"):
            action.help = argparse.SUPPRESS  # refused: they are what the table is about
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 0."""
    from memplan.device.here import find_card
    from memplan.importers.resolve import resolve
    from memplan.planning.apart import processes
    from memplan.planning.frontier import frontier
    from memplan.planning.study import opened
    from memplan.report.progress import points

    gpu = find_card(arguments.gpu)
    batches = _batches(BATCHES if arguments.batch_sizes is None else arguments.batch_sizes)
    named, read = opened(arguments.model, arguments.config)
    recipes = _recipes(arguments, read)
    if len(batches) * len(recipes) > MOST_POINTS:
        raise UsageError(
            f"{len(batches) * len(recipes):,} points are more than the {MOST_POINTS:,} of a table: give "
            "fewer --batch-sizes, --modes or --optimizers"
        )
    spec = resolve(named).spec
    if arguments.modes is None and read is None:
        kept = possible(list(dict.fromkeys(recipe.mode.value for recipe in recipes)), spec)
        recipes = [recipe for recipe in recipes if recipe.mode in kept]
    if read is not None:
        remark(read.told)
        recipes = [read.suited(read.recipe(given), spec, given) for given in recipes]
    workers = processes()
    with points(len(batches) * len(recipes), shown=arguments.exact) as progress:
        answer = frontier(
            spec, recipes, gpu, batches, simulated=arguments.exact, workers=workers, progress=progress
        )
    if arguments.json:
        from memplan.report.machine import print_record

        print_record(answer)
    else:
        from memplan.report.console import terminal
        from memplan.report.frontier import show_frontier

        show_frontier(answer, terminal())
    return 0


def _recipes(arguments: argparse.Namespace, read: Reading | None) -> list[Recipe]:
    """Every mode with and without checkpointing and with each optimizer, as far as they were not given; of a
    trainer's file its own mode."""
    from memplan.asked.recipe import Recipe

    options = given_options(arguments)
    for option in ("batch_size", "seq_len"):
        if option in options:
            raise UsageError(
                "the frontier looks for the longest sequences itself; leave out --seq-len"
                if option == "seq_len"
                else "the frontier has a column for each batch size: use --batch-sizes"
            )
    if "optimizer" in options and arguments.optimizers is not None:
        raise UsageError("--optimizer and --optimizers say the same; give one")
    if arguments.optimizers is None:
        optimizers = [{"optimizer": options.pop("optimizer")} if "optimizer" in options else {}]
    else:
        optimizers = [{"optimizer": name} for name in _words(arguments.optimizers)]
    checkpointing = (
        [options.pop("gradient_checkpointing")] if "gradient_checkpointing" in options else [True, False]
    )
    reentrant: dict[str, Any] = {}
    if "use_reentrant" in options:
        reentrant = {"use_reentrant": options.pop("use_reentrant")}
    own = MODES if read is None else read.recipe().mode.value
    return [
        Recipe(
            mode=mode,
            **optimizer,
            gradient_checkpointing=on,
            **(reentrant if on else {}),
            **applicable(options, mode),
        )
        for mode in modes(own if arguments.modes is None else arguments.modes)
        for on in checkpointing
        for optimizer in optimizers
    ]


def _words(text: str) -> list[str]:
    found = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not found:
        raise UsageError("--optimizers names none")
    return found


def _batches(text: str) -> list[int]:
    numbers = set()
    for word in text.split(","):
        digits = word.strip()
        number = int(digits) if digits.isdecimal() and len(digits) <= 18 else 0
        if not 0 < number <= 1 << 20:
            raise UsageError(
                f"--batch-sizes takes whole numbers from 1 to {1 << 20} with commas between them, not "
                f"{digits[:60]!r}"
            )
        numbers.add(number)
    return sorted(numbers)
