"""What the subcommands share: a parser whose complaints are one sentence, and the recipe's options."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any, NoReturn

from memplan import rooms
from memplan.asked.recipe import (
    OF_ADAPTERS,
    OF_FOUR_BITS,
    OPTIMIZER_ALIASES,
    TARGET_PRESETS,
    DTypeName,
    Kernels,
    Mode,
    QuantType,
    Recipe,
)
from memplan.errors import MemplanError, UnknownName
from memplan.streams import say

_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "flash": "flash_attention_2"}
_NAME = re.compile(r"[\w.-]+")


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


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments as a namespace. Raises UsageError, or UnknownName for an option that does not exist."""
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        if unknown[0].startswith("-") and unknown[0] != "-":
            options = [option for action in parser._actions for option in action.option_strings]
            raise UnknownName("option", unknown[0].split("=")[0], options, f"See {parser.prog} --help.")
        raise UsageError(f"unexpected argument {unknown[0]!r} (see {parser.prog} --help)")
    return namespace


def add_model(parser: Parser) -> None:
    """The positional argument MODEL."""
    parser.add_argument(
        "model", metavar="MODEL", help="an alias (memplan models), a Hub id, or a path to a config.json"
    )


def add_json(parser: argparse._ActionsContainer) -> None:
    """The option --json."""
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")


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
    group.add_argument(
        "--timeline",
        action="store_true",
        default=False,
        help="draw live bytes over the step by category, in the terminal",
    )
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


def add_gpus(parser: Parser, *, required: bool = False) -> None:
    """The option --gpu, which may be given several times."""
    parser.add_argument(
        "--gpu",
        action=_Cards,
        metavar="NAME",
        required=required,
        default=None,
        help="a card to judge, such as a6000 (memplan gpus); may be given several times",
    )


def add_recipe(parser: Parser, *, mode: bool = True) -> None:
    """The options that make a Recipe. Each one's destination is the name of a field."""
    if mode:
        parser.add_argument(
            "--mode",
            choices=_values(Mode),
            help="full: every weight; lora: adapters on a 16-bit base; qlora: on a 4-bit one"
            + _default("mode"),
        )
    _add_step(parser.add_argument_group("step"))
    _add_adapters(parser.add_argument_group("adapters (lora and qlora)"))
    _add_precision(parser.add_argument_group("precision and 4-bit base"))
    _add_optimizer(parser.add_argument_group("optimizer"))


def _add_step(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch-size",
        "--per-device-train-batch-size",
        type=whole,
        metavar="N",
        help="sequences in one forward pass" + _default("batch_size"),
    )
    group.add_argument(
        "--seq-len", type=whole, metavar="N", help="tokens in a sequence" + _default("seq_len")
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="keep each layer's input only and recompute the rest (default: on for qlora, else off)",
    )
    group.add_argument(
        "--use-reentrant",
        action=argparse.BooleanOptionalAction,
        help="which of torch's two ways of checkpointing (default: docs/recipe.md)",
    )
    group.add_argument(
        "--device-map",
        choices=["auto"],
        help="from_pretrained's: weights are loaded onto the card (default: by the host, except in 4 bits)",
    )
    group.add_argument(
        "--use-cache",
        action=argparse.BooleanOptionalAction,
        help="train with a cache of keys and values, which no Trainer does" + _default("use_cache"),
    )
    group.add_argument(
        "--attn",
        type=_long_name,
        choices=rooms.names("attention"),
        help="attention kernel (default: sdpa; flash is short for flash_attention_2)",
    )
    group.add_argument(
        "--alloc-conf",
        metavar="CONF",
        help="PYTORCH_ALLOC_CONF of the run, such as expandable_segments:True (default: none)",
    )
    group.add_argument(
        "--loss",
        choices=rooms.names("losses"),
        help="standard: as transformers; chunked: as TRL; liger: fused with lm_head" + _default("loss"),
    )


def _add_adapters(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--r", type=whole, metavar="N", help="rank" + _default("r"))
    group.add_argument("--lora-alpha", type=float, metavar="X", help="scale (default: 2 r); costs no memory")
    group.add_argument("--lora-dropout", type=float, metavar="P", help="dropout" + _default("lora_dropout"))
    group.add_argument(
        "--target-modules",
        type=_targets,
        metavar="T",
        help=f"{', '.join(TARGET_PRESETS[:2])} or {TARGET_PRESETS[2]}; names with commas between them; or a "
        "regular expression, as PEFT takes them" + _default("target_modules"),
    )
    group.add_argument(
        "--modules-to-save", type=_names, metavar="NAMES", help="modules trained in full beside the adapters"
    )
    group.add_argument("--use-rslora", action=argparse.BooleanOptionalAction, help="rank-stabilised scale")
    group.add_argument("--use-dora", action=argparse.BooleanOptionalAction, help="weight-decomposed adapters")
    group.add_argument(
        "--adapter-dtype",
        type=_long_name,
        choices=_values(DTypeName),
        help="adapters' dtype" + _default("adapter_dtype"),
    )


def _add_precision(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dtype",
        type=_long_name,
        choices=_values(DTypeName),
        help="weights' dtype; bf16, fp16 and fp32 will do" + _default("dtype"),
    )
    group.add_argument(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        help="run under torch.autocast, the Trainer's bf16=True" + _default("autocast"),
    )
    group.add_argument("--quant-type", choices=_values(QuantType), help="4-bit code" + _default("quant_type"))
    group.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        help="quantise the quantisation constants too" + _default("double_quant"),
    )
    group.add_argument(
        "--kbit-prep",
        action=argparse.BooleanOptionalAction,
        help="PEFT's prepare_model_for_kbit_training, which upcasts what is not 4-bit (default: on in qlora)",
    )
    group.add_argument(
        "--kernels",
        choices=_values(Kernels),
        help="what multiplies by 4-bit weights: bitsandbytes and PEFT, or memplan.kernels"
        + _default("kernels"),
    )


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--optimizer",
        metavar="NAME",
        help="the Trainer's optim: " + ", ".join(rooms.names("optimizers")) + _default("optimizer"),
    )
    group.add_argument("--momentum", type=float, metavar="X", help="of sgd" + _default("momentum"))
    group.add_argument(
        "--max-grad-norm",
        type=float,
        metavar="X",
        help="clip gradients; 0: never" + _default("max_grad_norm"),
    )
    group.add_argument(
        "--gradient-accumulation-steps",
        type=whole,
        metavar="N",
        help="forward and backward passes a step" + _default("gradient_accumulation_steps"),
    )


def recipe_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe's options that were given, by field."""
    given = vars(arguments)
    return {field: given[field] for field in Recipe.model_fields if field in given}


def applicable(options: dict[str, Any], mode: str) -> dict[str, Any]:
    """Those of the options that mean something in this mode: `compare` gives the same ones to every mode."""
    foreign = (OF_FOUR_BITS | {"kbit_prep", "kernels"} if mode != "qlora" else frozenset()) | (
        OF_ADAPTERS if mode == "full" else frozenset()
    )
    return {field: value for field, value in options.items() if field not in foreign}


def modes(text: str) -> list[str]:
    """The modes in a list with commas. Raises UsageError, or UnknownName for one that does not exist."""
    known = _values(Mode)
    found = list(dict.fromkeys(mode.strip() for mode in text.split(",") if mode.strip()))
    if not found:
        raise UsageError(f"--modes names no mode; take some of {','.join(known)}")
    for mode in found:
        if mode not in known:
            raise UnknownName("mode", mode, known, f"The modes are {', '.join(known)}.")
    return found


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
    return f" (default: {value})"


def whole(text: str) -> int:
    """A whole number that 64 bits hold: none that is asked for is longer, and arithmetic with floats fails
    on much longer ones. Raises ArgumentTypeError."""
    with suppress(ValueError):  # Python refuses to read more than 4300 digits
        number = int(text)
        if number.bit_length() < 64:
            return number
    raise argparse.ArgumentTypeError(f"it takes a whole number of at most 18 digits, not {text[:60]!r}")


def _long_name(text: str) -> str:
    return _SHORT_NAMES.get(text, text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _targets(text: str) -> str | tuple[str, ...]:
    """A preset or a pattern stays as it is; plain names become a list, even one: to PEFT a lone string is
    a regular expression for whole module paths, which no one means by `--target-modules q_proj`."""
    names = _names(text)
    if not names:
        raise argparse.ArgumentTypeError("it names no module")
    if text in TARGET_PRESETS or not all(_NAME.fullmatch(name) for name in names):
        return text
    return names
