"""``memplan compare MODEL...``: plans side by side, of several modes, models, or values of any option."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from memplan.commands.arguments import (
    Parser,
    UsageError,
    add_gpus,
    add_host_memory,
    add_json,
    add_recipe,
    add_run_file,
    add_verbose,
    applicable,
    beyond_host,
    in_all,
    modes,
    parse,
    possible,
    typed_options,
)
from memplan.commands.synonyms import length
from memplan.errors import MemplanError, shown
from memplan.streams import remark

if TYPE_CHECKING:
    from memplan.asked.recipe import Recipe
    from memplan.planning.plan import Plan

ALL_MODES = "full,lora,qlora"
MOST = 200  # plans; each takes some hundredths of a second, and some tenths where cards are named

EXAMPLES = """\
An option that a mode has no use for (--r in full, --kbit-prep in lora) is left
out there. Checkpointing is on in all if one of them has it on, unless it is
asked for. A sweep takes values with commas between them, or from..to, doubling.

examples:
  memplan compare llama-70b
  memplan compare llama-8b qwen2.5-7b mistral-7b --mode lora --gpu 4090
  memplan compare llama-8b --mode qlora --sweep r=8,16,64 seq-len=1k..8k
"""


def parser() -> Parser:
    """The arguments that ``memplan compare`` takes."""
    result = Parser(
        "compare", "Plans of several modes, models or settings side by side.", "MODEL... [options]", EXAMPLES
    )
    add_run_file(result, several=True)
    result.add_argument(
        "--modes",
        "--mode",
        metavar="M,M",
        default=None,
        help=f"which modes, with commas between them (default: {ALL_MODES}; of several models or in a sweep "
        "qlora)",
    )
    result.add_argument(
        "--sweep",
        metavar="OPTION=V,V",
        nargs="+",
        action="extend",
        default=[],
        help="any options of the recipe, each with the values to go through",
    )
    add_gpus(result)
    add_host_memory(result)
    add_json(result)
    add_verbose(result)
    add_recipe(result, mode=False)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the plans side by side; 0."""
    from memplan.asked.recipe import Mode, Recipe
    from memplan.planning.cards import able
    from memplan.planning.plan import plan

    swept = [_swept(text) for text in arguments.sweep]
    by_mode = len(arguments.model) == 1 and not swept
    default = ALL_MODES if by_mode else Mode.QLORA.value
    named = modes(default if arguments.modes is None else arguments.modes)
    if any(name == "mode" for name, _ in swept):
        if arguments.modes is not None:
            raise UsageError("--modes and --sweep mode=... say the same; give one")
        named = []
    count = prod(len(values) for values in (arguments.model, named or [""], *(values for _, values in swept)))
    if count > MOST:
        raise UsageError(
            f"{count:,} plans are more than the {MOST} of a comparison: name fewer models, modes or values "
            "(a sweep FROM..TO takes a value and its doubles)"
        )
    if by_mode and arguments.modes is None:
        from memplan.importers.resolve import resolve
        from memplan.planning.study import opened

        named = possible(named, resolve(opened(arguments.model[0], arguments.config)[0]).spec)
    points = list(product(arguments.model, named or [""], *(values for _, values in swept)))
    options = typed_options(arguments)
    recipes = []
    for _, mode, *values in points:
        own: dict[str, Any] = {**options, **({"mode": mode} if mode else {})}
        for name, value in zip((name for name, _ in swept), values, strict=True):
            own |= _read(name, value)
        told = str(own.pop("mode"))
        recipes.append(Recipe(mode=told, **applicable(in_all(own), told)))
    if options.get("kernels") == "memplan":  # the cards on which they run, for all modes alike
        arguments.gpu = [card.name for card in able(Recipe(kernels="memplan"), arguments.gpu)]
    plans = [
        plan(model, recipe, gpus=arguments.gpu, config=arguments.config)
        for (model, *_), recipe in zip(points, _alike(recipes), strict=True)
    ]
    differing = (arguments.model, named or [""], *(values for _, values in swept))
    named_by = [
        " ".join(value for value, values in zip(point, differing, strict=True) if len(values) > 1)
        for point in points
    ]
    _show(_on_the_host(plans, named_by, arguments), arguments, by_mode)
    return 0


def _on_the_host(plans: list[Plan], named: list[str], arguments: argparse.Namespace) -> list[Plan]:
    """Those whose offloading the host has room for; of the others it is said, by what they are ``named``.
    Raises MemplanError where it has room for none."""
    told = [beyond_host(one, arguments) for one in plans]
    refused = [sentence for sentence in told if sentence is not None]
    if refused and len(refused) == len(plans):
        raise MemplanError(refused[0])
    if refused:
        out = [name for name, sentence in zip(named, told, strict=True) if sentence is not None]
        count = "one plan" if len(out) == 1 else f"{len(out)} plans"
        which = ", ".join(out[:3]) + (", …" if len(out) > 3 else "")
        is_or_are = "is" if len(out) == 1 else "are"
        remark(f"{count} ({which}) {is_or_are} left out, for the host has no room: {refused[0]}")
    return [one for one, sentence in zip(plans, told, strict=True) if sentence is None]


def _alike(recipes: list[Recipe]) -> Iterator[Recipe]:
    """The recipes, all with checkpointing if one of them has it where nothing was said of it."""
    asked = [recipe.gradient_checkpointing for recipe in recipes]
    on = [recipe.resolved().gradient_checkpointing for recipe in recipes]
    if any(said is not None for said in asked) or len(set(on)) == 1:
        yield from recipes
        return
    for recipe, checkpointed in zip(recipes, on, strict=True):
        yield recipe if checkpointed else recipe.model_copy(update={"gradient_checkpointing": True})


def _swept(text: str) -> tuple[str, list[str]]:
    """An option and its values. Raises UsageError."""
    name, _, told = text.lstrip("-").partition("=")
    values = [value for part in _parts(told) for value in _doubling(part.strip()) if value]
    if not name or not values:
        raise UsageError(f"--sweep takes OPTION=VALUE,VALUE such as r=8,16,32, not {shown(text)}")
    (field,) = _read(name, values[0])  # refuses what is no option
    return field, list(dict.fromkeys(values))


def _parts(told: str) -> list[str]:
    """Values between commas; of an option whose values have commas themselves, between semicolons."""
    return told.split(";") if ";" in told else told.split(",")


def _doubling(text: str) -> list[str]:
    """``1k..8k`` as 1024, 2048, 4096, 8192; anything else as it is. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,18}[kK]?)\.\.(\d{1,18}[kK]?)", text)
    if found is None:
        return [text]
    first, last = (int(length(number)) for number in found.groups())
    if not 0 < first <= last:
        raise UsageError(f"a sweep goes from a number above 0 to a larger one, not {shown(text)}")
    values = [first]
    while values[-1] * 2 <= last:
        values.append(values[-1] * 2)
    return [str(value) for value in values]


def _recipe_parser() -> Parser:
    result = Parser("compare", "", "")
    add_recipe(result)
    return result


def _read(name: str, value: str) -> dict[str, Any]:
    """An option's value as a field of the recipe. Raises UsageError."""
    return typed_options(parse(_recipe_parser(), [f"--{name.replace('_', '-')}={value}"], quiet=True))


def _show(plans: list[Plan], arguments: argparse.Namespace, by_mode: bool) -> None:
    if arguments.json:
        from memplan.report.machine import print_list

        print_list("plans", [one.model_dump(mode="json") for one in plans])
        return
    from memplan.report.console import terminal

    if by_mode:
        from memplan.report.compare import show_comparison

        show_comparison(plans, terminal(), verbose=arguments.verbose)
    else:
        from memplan.report.sweep import show_sweep

        show_sweep(plans, terminal(), judged=arguments.gpu is not None)
