"""What the subcommands share: a parser whose complaints are one sentence, and the recipe's options."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from memplan import rooms
from memplan.asked.gpus import together
from memplan.asked.options import TARGET_PRESETS, Option
from memplan.asked.recipe import OPTIMIZER_ALIASES, Mode, Recipe, recipe_options
from memplan.commands import COMMANDS, module_of, synonyms
from memplan.errors import MemplanError, UnknownName, shown
from memplan.streams import remark_with_answer, say
from memplan.units import gib

if TYPE_CHECKING:
    from memplan.asked.lengths import Lengths
    from memplan.asked.spec import ModelSpec
    from memplan.planning.plan import Plan


class UsageError(MemplanError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """argparse that raises its complaints, and leaves out options that were not given."""

    def __init__(self, command: str, description: str, usage: str, examples: str = "") -> None:
        super().__init__(
            prog=f"memplan {command}",
            usage=f"memplan {command} {usage}",
            description=description,
            epilog=examples,
            formatter_class=_HelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,  # an abbreviation in a script would break with the next option added
        )

    def error(self, message: str) -> NoReturn:
        """Raise the complaint instead of printing usage and exiting."""
        raise UsageError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        """Print the help as an answer is printed; argparse would pass over a full disk."""
        say(self.format_help())


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, max_help_position=30, **settings)


# What a run is started with, typed where MODEL stands.
_PROGRAMS = (
    "accelerate", "axolotl", "deepspeed", "llamafactory-cli", "python", "python3", "torchrun", "trl", "tune",
    "unsloth", "uv",
)  # fmt: skip


def parse(parser: Parser, arguments: Sequence[str], *, quiet: bool = False) -> argparse.Namespace:
    """The arguments as a namespace, in the words of any trainer. Raises UsageError, or Unplanned for what
    memplan has no meaning for. What was made of others' words is said unless ``quiet``."""
    options = parser._option_string_actions
    reading = synonyms.read(arguments, options)
    namespace, unknown = parser.parse_known_args(reading.words)
    if unknown and (program := getattr(namespace, "model", None)) in _PROGRAMS:
        raise UsageError(
            f"{program} is a program: memplan takes the file that it trains from (`memplan fit run.yaml`) "
            f"or runs it on a card that is not there, `memplan dry-run --gpu NAME -- {program} ...`"
        )
    for word in unknown:
        if word.startswith("-") and word != "-":
            name = word.split("=")[0]
            raise UsageError(f"no option is called {shown(name)} here; {_instead(name, parser)}")
    if unknown and not _in_words(namespace, unknown):
        raise UsageError(f"unexpected argument {unknown[0]!r} (see {parser.prog} --help)")
    for sentence in () if quiet else reading.remarks():
        remark_with_answer(sentence)
    return namespace


def _in_words(namespace: argparse.Namespace, rest: Sequence[str]) -> bool:
    """Whether the model's name was typed in several words, `qwen3 8b`; it is put together then."""
    first = getattr(namespace, "model", None)
    if not isinstance(first, str):
        return False
    from memplan.importers.registry import by_name

    name = " ".join([first, *rest])
    if by_name(name) is None:
        return False
    namespace.model = name
    return True


def _instead(name: str, parser: Parser) -> str:
    """Which option was meant, of this command or of another."""
    near = synonyms.close(name, parser._option_string_actions)
    if near is not None:
        return f"did you mean {near}? See {parser.prog} --help"
    for command in COMMANDS:
        if name in import_module(module_of(command)).parser()._option_string_actions:
            return f"it is one of `memplan {command}`"
    return f"see {parser.prog} --help"


def add_model(parser: Parser) -> None:
    """The positional argument MODEL."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name (memplan models), a Hub id or its page, or a path to a config.json",
    )


def add_run_file(parser: Parser, *, several: bool = False) -> None:
    """The positional argument MODEL where it may be a trainer's file, or ``several`` of them, and the option
    --config."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="+" if several else None,
        help="an alias (memplan models), a Hub id, a path to a config.json, or the file of a trainer: "
        "axolotl's or LLaMA-Factory's YAML, what trl sft --config takes",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=None,
        action=_Once,
        help="the file of a trainer, of accelerate or of DeepSpeed, beside a model or a trainer's file; "
        "options that are given override it",
    )


class _Once(argparse.Action):
    """A value that is given once: of two, the first would be lost."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} is given twice: a trainer's file may stand in MODEL's place, beside it")
        setattr(namespace, self.dest, values)


def add_lengths(parser: Parser) -> None:
    """The option --lengths."""
    parser.add_argument(
        "--lengths",
        metavar="L",
        default=None,
        help="play steps whose sequences differ: a file with a length in tokens on each line, in the run's "
        "order, or lognormal:MEAN,SD,MAX; --seq-len is where they are cut",
    )


def add_host_memory(parser: Parser) -> None:
    """The option --host-memory."""
    parser.add_argument(
        "--host-memory",
        metavar="SIZE",
        type=_host_memory,
        default=None,
        help="the host's memory, such as 512GB (of each node): what is offloaded beyond it is refused",
    )


def _host_memory(text: str) -> int:
    """Bytes. Raises argparse.ArgumentTypeError."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*(gb|gib|tb|tib)", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"takes a size, such as 512GB, not {shown(text)}")
    unit = {"gb": 10**9, "gib": 1 << 30, "tb": 10**12, "tib": 1 << 40}[found[2].lower()]
    return int(float(found[1]) * unit)


def check_host(answer: Plan, arguments: argparse.Namespace) -> None:
    """Raise MemplanError if what the processes of a node keep on its host does not fit there."""
    sentence = beyond_host(answer, arguments)
    if sentence is not None and getattr(arguments, "how_many", False):
        sentence = f"of the fewest GPUs that are enough, {sentence}"
    if sentence is not None:
        raise MemplanError(sentence)
    if arguments.host_memory is not None and not answer.host_bytes:
        remark_with_answer("nothing of this run is offloaded: --host-memory bounds only what is advised")


def beyond_host(answer: Plan, arguments: argparse.Namespace) -> str | None:
    """What is said where it does not; None where it does."""
    room: int | None = arguments.host_memory
    count = answer.recipe.gpus_per_node
    if room is None or answer.host_bytes * count <= room:
        return None
    node = "" if count == answer.recipe.gpus else " of a node"
    return (
        f"{count} processes{node} keep {gib(answer.host_bytes)} GiB each on the host, "
        f"{gib(answer.host_bytes * count)} GiB in all, and --host-memory leaves {gib(room)} GiB: offload "
        "less, or take a larger host"
    )


def given_lengths(arguments: argparse.Namespace) -> Lengths | None:
    """What --lengths was given. Raises MemplanError."""
    if arguments.lengths is None:
        return None
    from memplan.asked.lengths import read_lengths

    return read_lengths(arguments.lengths)


def add_switch(parser: argparse._ActionsContainer, name: str, words: str) -> None:
    """An option without a value; where it is not given it is False, and not left out as others are."""
    parser.add_argument(name, action="store_true", default=False, help=words)


def add_json(parser: argparse._ActionsContainer) -> None:
    """The option --json."""
    add_switch(parser, "--json", "print JSON")


def add_verbose(parser: argparse._ActionsContainer) -> None:
    """The option --verbose."""
    parser.add_argument(
        "--verbose", "-v", action="store_true", default=False, help="all details, beyond a first screen"
    )


def positive(text: str) -> float:
    """The type of an option that takes a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it must be a number above 0, not {text[:40]!r}")
    return value


def add_tape(parser: Parser) -> None:
    """The option --tape."""
    parser.add_argument(
        "--tape",
        metavar="FILE",
        default=None,
        help="write every allocation and release to a file for memplan diff; compressed if it ends in .gz",
    )


def add_pictures(parser: Parser) -> None:
    """The options that draw the step, and write it down for other tools."""
    group = parser.add_argument_group("pictures")
    add_switch(group, "--timeline", "draw live bytes over the step by category, in the terminal")
    for option, told in (
        (
            "--html",
            "one page for a browser, which needs no network: the step, what is alive when, cards",
        ),
        ("--trace-json", "a trace for ui.perfetto.dev or chrome://tracing; compressed if it ends in .gz"),
        ("--snapshot", "a memory snapshot for PyTorch's viewer (pytorch.org/memory_viz)"),
    ):
        group.add_argument(option, metavar="FILE", default=None, help=f"write {told}")


_MOST_CARDS = 10  # of one question; with 126 layers, each takes most of a second


class _Cards(argparse.Action):
    """Cards one after the other, each once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        cards = [*(getattr(namespace, self.dest, None) or []), values]
        setattr(namespace, self.dest, cards)
        if len(set(cards)) > _MOST_CARDS:
            raise UsageError(
                f"one question is about {_MOST_CARDS} cards at most, for the allocator is simulated for each"
            )


def add_gpus(parser: Parser) -> None:
    """The option --gpu, which may be given several times."""
    parser.add_argument(
        "--gpu",
        action=_Cards,
        metavar="NAME",
        default=None,
        help="a card to judge, such as a6000 (memplan gpus), a size such as 24GB, or auto: the one in this "
        "machine; may be given several times",
    )


def add_recipe(parser: Parser, *, mode: bool = True) -> None:
    """The options that make a Recipe, as its fields tell them. Each one's destination is a field's name."""
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for name, option in sorted(recipe_options().items(), key=_place):
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        if name != "mode" or mode:
            _add_option(groups[option.group], name, option)


_GROUPS = ("", "step", "adapters (lora and qlora)", "precision and 4-bit base", "optimizer")


def _place(told: tuple[str, Option]) -> tuple[int, bool]:
    option = told[1]
    return _GROUPS.index(option.group), not option.first


def _add_option(group: argparse._ActionsContainer, name: str, option: Option) -> None:
    """An option of the command line. What kind it is follows from the field's annotation."""
    field = Recipe.model_fields[name]
    kind = next(kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None))
    settings: dict[str, Any] = {}
    if option.read is not None:
        settings["type"] = _reader(option.read)
    elif kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif kind is int:
        settings["type"] = whole
    elif kind is float:
        settings["type"] = float
    elif isinstance(kind, type) and issubclass(kind, Enum):
        settings["choices"] = _values(kind)
    elif option.room is not None and option.metavar is None:
        settings["choices"] = rooms.names(option.room)
    elif kind is not str:
        settings["choices"] = list(get_args(kind) or (kind,))  # of a Literal
    if option.short is not None:
        settings["type"] = _longer(option.short)
    if option.metavar is not None:
        settings["metavar"] = option.metavar
    told = _default(name) if option.default is None else option.default
    names = ", ".join(rooms.names(option.room)) if option.room is not None else ""
    text = option.help.replace("{names}", names) + (f" (default: {told})" if told else "")
    group.add_argument(f"--{name.replace('_', '-')}", *option.flags, help=text, **settings)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe's options that were given, by field; ``gpus`` in all. Raises UsageError."""
    return in_all(typed_options(arguments))


def typed_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same with ``gpus`` as they are typed, which are those of each node. Raises UsageError."""
    given = vars(arguments)
    options = {field: given[field] for field in Recipe.model_fields if field in given}
    count = together(given.get("gpu") or (), options.get("gpus"))
    if count is not None:
        options = {"gpus": count, **options}
    return options


def in_all(options: dict[str, Any]) -> dict[str, Any]:
    """Typed options with ``gpus`` in all. Raises UsageError."""
    if options.get("nodes") is None:
        return options
    if "gpus" not in options:
        raise UsageError("--nodes says how many machines: say how many GPUs each has, such as --gpus 8")
    return {**options, "gpus": options["gpus"] * max(options["nodes"], 1)}


def applicable(options: dict[str, Any], mode: str) -> dict[str, Any]:
    """Those of the options that mean something in this mode: `compare` gives the same ones to every mode."""
    told = recipe_options()
    return {field: value for field, value in options.items() if mode in told[field].modes}


def modes(text: str) -> list[str]:
    """The modes in a list with commas. Raises UsageError, or UnknownName for one that does not exist."""
    known = _values(Mode)
    found = list(dict.fromkeys(mode.strip() for mode in text.split(",") if mode.strip()))
    if not found:
        raise UsageError(f"--modes names no mode; take some of {','.join(known)}")
    for mode in found:
        synonyms.refuse_unplanned(f"--modes {mode}", mode)
        if mode not in known:
            raise UnknownName("mode", mode, known, f"The modes are {', '.join(known)}.")
    return found


def possible(named: Sequence[str], spec: ModelSpec) -> list[str]:
    """Those of the modes that nobody named in which a checkpoint can be trained; what is left out is said."""
    from memplan.planning.modes import possible_modes

    found = [name for name in named if name in possible_modes(spec)]
    left_out = [name for name in named if name not in found]
    if left_out:
        remark_with_answer(
            f"{spec.name} holds {_stored_as(spec)}: "
            f"{' and '.join(left_out)} {'is' if len(left_out) == 1 else 'are'} left out"
        )
    return found


def _stored_as(spec: ModelSpec) -> str:
    if spec.mxfp4:
        return "experts in MXFP4, which are unpacked and take no other quantisation"
    return "weights in 4 bits, which are trained as QLoRA alone"


def completions(action: argparse.Action) -> Collection[str]:
    """The words that may follow an option or stand for a positional argument, where they can be listed."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    if action.dest == "optimizer":
        return [*rooms.names("optimizers"), *OPTIMIZER_ALIASES]
    if action.dest == "target_modules":
        return TARGET_PRESETS
    return ()


def _values(kind: type[Enum]) -> list[str]:
    return [str(member.value) for member in kind]


def _default(field: str) -> str:
    value = Recipe.model_fields[field].default
    if isinstance(value, Enum):
        value = value.value
    elif isinstance(value, bool):
        value = "on" if value else "off"
    return str(value)


def whole(text: str) -> int:
    """A whole number that 64 bits hold: none that is asked for is longer, and arithmetic with floats fails
    on much longer ones. Raises ArgumentTypeError."""
    with suppress(ValueError):  # Python refuses to read more than 4300 digits
        number = int(text)
        if number.bit_length() < 64:
            return number
    raise argparse.ArgumentTypeError(f"it takes a whole number of at most 18 digits, not {text[:60]!r}")


def _longer(short: dict[str, str]) -> Callable[[str], str]:
    return lambda text: short.get(text, text)


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """``read``, complaining as argparse has it."""

    def reading(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return reading
