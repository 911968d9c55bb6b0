"""Graphics cards: how much memory each has, and how much of it PyTorch can use.

The two differ. nvidia-smi prints an RTX A6000 as 49,140 MiB, PyTorch reports 48,537 MiB as its total
capacity: the driver keeps the rest. Only the second number may decide whether a run fits. Both, each with the
place where it was seen, stand in ``data/gpus.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StringConstraints, model_validator

from memplan.errors import MemplanError, UnknownName
from memplan.resources import data_file

MIB = 2**20

# What a plan shows unless asked for others: one card for each size that people rent or own, smallest first.
DEFAULT_GPUS: tuple[str, ...] = ("t4", "4090", "5090", "a100-40", "a6000", "h100", "h200", "b200", "mi300x")

_LIST_HINT = "`memplan gpus` lists all cards."
# "Quadro" stays: without it a Quadro RTX 6000 (24 GB) would answer to the name of newer 48 GB cards.
_NOT_DISTINCTIVE = re.compile(r"nvidia|geforce|tesla|amd|radeon|instinct|[^a-z0-9]")
_MANY = 8  # candidates that one sentence can name

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]


class Gpu(BaseModel):
    """One kind of card. Fields in MiB are as reported by the tools; use the properties to compute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    aliases: Annotated[tuple[Slug, ...], Field(min_length=1)]
    vendor: Literal["nvidia", "amd"]
    total_mib: PositiveInt
    torch_visible_mib: PositiveInt | None
    compute_capability: str
    kind: Literal["consumer", "workstation", "datacenter"]
    ecc: Literal["on", "off", "n.a."]
    source: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _visible_is_below_total(self) -> Gpu:
        if self.torch_visible_mib is not None and self.torch_visible_mib >= self.total_mib:
            raise ValueError(f"{self.name}: torch_visible_mib must be less than total_mib")
        return self

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability as PyTorch compares it; None of a card that is not NVIDIA's."""
        if self.vendor != "nvidia":
            return None
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    @property
    def total_bytes(self) -> int:
        """What the driver prints as the card's memory; more than a program can have."""
        return self.total_mib * MIB

    @property
    def visible_bytes(self) -> int:
        """What PyTorch reports as the card's capacity, before its own CUDA context."""
        if self.torch_visible_mib is not None:
            return self.torch_visible_mib * MIB
        # Too little is the safe error here: a plan may say "tight" of a run that fits, never the reverse.
        return max(self.total_mib - largest_gap_mib(), 0) * MIB

    @property
    def visible_is_estimate(self) -> bool:
        """True where PyTorch's capacity was not seen, so that ``visible_bytes`` is a cautious guess."""
        return self.torch_visible_mib is None


class _GpuFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str
    gpus: tuple[Gpu, ...]


@cache
def load_gpus() -> tuple[Gpu, ...]:
    """All known cards, in the order of the data file."""
    return _GpuFile.model_validate_json(data_file("gpus.json").read_bytes()).gpus


@cache
def largest_gap_mib() -> int:
    """The most that any card with both numbers known hides from PyTorch."""
    return max(
        gpu.total_mib - gpu.torch_visible_mib for gpu in load_gpus() if gpu.torch_visible_mib is not None
    )


def find_gpu(name: str) -> Gpu:
    """The card of that name or alias; case, spaces, dashes, underscores and vendor words do not matter.

    The whole name must match. Completing "2080" to the only 2080 in the list, a 2080 Ti, would plan for a
    card with 3 GB more than the user has.
    """
    gpus_by_key = _gpus_by_key()
    key = _key(name)
    if key in gpus_by_key:
        return gpus_by_key[key]
    begun = {gpu.name: gpu for known, gpu in gpus_by_key.items() if key and known.startswith(key)}
    if len(begun) > 1:
        raise MemplanError(f"GPU name {name!r} could be {_alternatives(begun.values())}; {_LIST_HINT}")
    raise UnknownName("GPU", name, [_closest_alias(gpu, name) for gpu in load_gpus()], _LIST_HINT)


def _key(name: str) -> str:
    return _NOT_DISTINCTIVE.sub("", name.lower())


@cache
def _gpus_by_key() -> dict[str, Gpu]:
    return {_key(name): gpu for gpu in load_gpus() for name in (gpu.name, *gpu.aliases)}


def _closest_alias(gpu: Gpu, name: str) -> str:
    from difflib import SequenceMatcher

    # One alias a card: otherwise "5090" and "rtx5090" would fill the three places of a suggestion.
    return max(gpu.aliases, key=lambda alias: SequenceMatcher(None, alias, name.lower()).ratio())


def _alternatives(gpus: Iterable[Gpu]) -> str:
    aliases = [gpu.aliases[0] for gpu in gpus]
    if len(aliases) > _MANY:
        return f"{', '.join(aliases[:_MANY])} or {len(aliases) - _MANY} more"
    return f"{', '.join(aliases[:-1])} or {aliases[-1]}"
