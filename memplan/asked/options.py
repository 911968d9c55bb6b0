"""What an option of a recipe is called and how it is told. :class:`memplan.asked.recipe.Recipe` declares each
of its fields with one: the command line, the reports and docs/recipe.md read it there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

TARGET_PRESETS = ("all-linear", "attention", "q,v")
# what "attention" means: the projections of all families, fused or latent ones, too
ATTENTION = (
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
)  # fmt: skip

_NAME = re.compile(r"[\w.-]+")
_ADAPTERS, _FOUR_BITS = ("lora", "qlora"), ("qlora",)


@dataclass(frozen=True, kw_only=True, eq=False)
class Option:
    """An option.

    ``help``: what it is; ``{names}`` in it stands for the things of its ``room``. ``default``: how the help
    says it, where that is not the field's own; "" for not at all. ``source``: where the default is from, with
    file and name. ``group``: of the help; ``first``: it stands first there. ``modes``: those in which it says
    something; elsewhere it is refused unless it is ``rest``, which says nothing. ``phrase``: a resolved
    recipe's setting in a few words, or None where that says nothing; ``told_with``: the field whose phrase
    speaks of this one, too. ``flags``: other names of ``--field-name``; ``metavar`` and ``read``: of its
    value on the command line (``read`` raises ValueError); ``short``: short forms of values.
    """

    help: str
    source: str
    group: str
    first: bool = False
    default: str | None = None
    modes: tuple[str, ...] = ("full", "lora", "qlora")
    rest: Any = None
    phrase: Callable[[Any], str | None] | None = None
    told_with: str | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    read: Callable[[str], Any] | None = None
    room: str | None = None
    short: dict[str, str] | None = None


def loads_onto(text: str) -> str | None:
    """A ``device_map`` as it is typed. Raises ValueError."""
    if text not in ("auto", "cuda", "cuda:0", "none"):
        raise ValueError(f"it takes auto, cuda or none, not {text[:40]!r}")
    return None if text == "none" else text.removesuffix(":0")


def pixels(text: str) -> tuple[int, int]:
    """A width and a height as they are typed, with an x or × between them. Raises ValueError."""
    parts = re.split("[x×]", text.strip().lower())
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ValueError(f"it takes a width and a height in pixels, such as 1024x768, not {text[:40]!r}")
    return int(parts[0]), int(parts[1])


def of_step(**told: Any) -> Option:
    """An option of what is run."""
    return Option(group="step", **told)


def of_adapters(**told: Any) -> Option:
    """An option that says nothing without adapters."""
    return Option(group="adapters (lora and qlora)", modes=_ADAPTERS, **told)


def of_precision(**told: Any) -> Option:
    """An option of what numbers are kept in."""
    return Option(group="precision and 4-bit base", **told)


def of_four_bits(**told: Any) -> Option:
    """One of those that says nothing without a 4-bit base."""
    return of_precision(modes=_FOUR_BITS, **told)


def of_optimizer(**told: Any) -> Option:
    """An option of the update."""
    return Option(group="optimizer", **told)


def elements(text: str) -> int | str:
    """A number of elements, as 500000000 or 5e8, or `auto`. Raises ValueError."""
    if text == "auto":
        return text
    value = float(text)
    if not value.is_integer():
        raise ValueError("it is no whole number")
    return int(value)


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def targets(text: str) -> str | tuple[str, ...]:
    """A preset or a pattern stays as it is; plain names become a list, even one: to PEFT a lone string is
    a regular expression for whole module paths, which no one means by `--target-modules q_proj`. Raises
    ValueError."""
    found = names(text)
    if not found:
        raise ValueError("it names no module")
    if text in TARGET_PRESETS or not all(_NAME.fullmatch(name) for name in found):
        return text
    return found
