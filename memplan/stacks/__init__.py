"""Trainers, one file each: what their code does with a run when nobody says otherwise.

A file defines ``STACK``. The values are checked by dry runs of plain scripts of that trainer
(benchmarks/plain); docs/trainers.md is made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memplan import rooms

if TYPE_CHECKING:
    from memplan.asked.recipe import Recipe

DEFAULT = "trl"

# trainers that run code of their own where memplan plays the libraries'
NOT_PLAYED = {
    "unsloth": "Unsloth runs kernels and checkpoints of its own",
    "torchtune": "torchtune has models of its own",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a trainer sets an option of a recipe to, by mode; a mode that is not named leaves the option at
    the recipe's own default. ``source``: library, file and name."""

    source: str
    by_mode: Mapping[str, Any]


def always(value: Any, source: str) -> Setting:
    """The same in every mode."""
    return Setting(source=source, by_mode=dict.fromkeys(("full", "lora", "qlora"), value))


def only(source: str, **by_mode: Any) -> Setting:
    """In the modes that are named."""
    return Setting(source=source, by_mode=by_mode)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slip:
    """What people leave out: what happens then in a clause, the options that the run then has, and the modes
    in which it counts."""

    told: str
    changes: Mapping[str, Any]
    modes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A trainer.

    ``title``: what people call it; ``versions``: of what its values are taken; ``settings``: by field of a
    recipe; ``reentrant``: whether it checkpoints the reentrant way, from a recipe as it is given;
    ``casts_adapters_back``: adapters that PEFT made fp32 become bf16 where the base is quantised;
    ``sizes``: of its own files and commands, by field, where they say nothing (a question that names no
    batch, length or rank has memplan's own instead: docs/recipe.md); ``packed``: what its collator puts on
    the card of packed sequences beside ids, labels and positions, None where it packs otherwise; ``keeps``:
    numbers that its own code keeps on the card beside those of the Trainer's loop
    (:mod:`memplan.parts.loop`), and where; ``slip``: see there.
    """

    title: str
    versions: Mapping[str, str]
    settings: Mapping[str, Setting]
    reentrant: Callable[[Recipe], bool]
    sizes: Mapping[str, Setting] = field(default_factory=dict)
    casts_adapters_back: bool = False
    packed: tuple[str, ...] | None = None
    keeps: Mapping[str, str] = field(default_factory=dict)
    slip: Slip | None = None

    def of(self, mode: str) -> dict[str, Any]:
        """Its settings in a mode."""
        return {
            name: setting.by_mode[mode] for name, setting in self.settings.items() if mode in setting.by_mode
        }


def find(name: str) -> Stack:
    """The trainer of that name. Raises UnknownName."""
    stack: Stack = rooms.thing("stacks", name, "STACK", "trainer")
    return stack
