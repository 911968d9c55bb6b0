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

from memplan.errors import MemplanError, UnknownName, printable, shown
from memplan.resources import data_file
from memplan.units import gib

MIB = 2**20

# What a plan shows unless asked for others: one card for each size that people rent or own, smallest first.
DEFAULT_GPUS: tuple[str, ...] = ("t4", "4090", "5090", "a100-40", "a6000", "h100", "h200", "b200", "mi300x")

_LIST_HINT = "`memplan gpus` lists all cards."
# "Quadro" stays: without it a Quadro RTX 6000 (24 GB) would answer to the name of newer 48 GB cards.
_NOT_DISTINCTIVE = re.compile(r"nvidia|geforce|tesla|amd|radeon|instinct|[^a-z0-9]")
_MANY = 8  # candidates that one sentence can name
# 24, 24GB, 24 GiB; cards are sold in GB and have as many GiB. A number of four digits is a card's name.
_SIZE = re.compile(
    r"([+-]?\d{1,9}(?:\.\d{1,3})?) ?(gb|gib|g)( card)?|([+-]?\d{1,3}(?:\.\d{1,3})?)", re.IGNORECASE
)
_NUMBER_WITH_UNIT = r"[+-]?(?:\d[\d.]*(?:e[+-]?\d+)?|inf|nan) ?[kmgt]i?b(?: card)?"
_MOST_GB = 512  # of a size that is asked about; the largest card that is listed has 288
_SEVERAL = re.compile(r"(\d{1,4}) ?[x×*] ?(.+)|(.+?) ?[x×*] ?(\d{1,4})", re.IGNORECASE)
_AMPERE = (8, 0)  # the compute capability from which on FlashAttention runs and bf16 is there

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]


class Gpu(BaseModel):
    """One kind of card. Fields in MiB are as reported by the tools; use the properties to compute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    aliases: Annotated[tuple[Slug, ...], Field(min_length=1)]
    vendor: Literal["nvidia", "amd"]
    gb: PositiveInt
    total_mib: PositiveInt
    torch_visible_mib: PositiveInt | None
    compute_capability: str
    kind: Literal["consumer", "workstation", "datacenter", "slice", "shared"]
    ecc: Literal["on", "off", "n.a."]
    source: Annotated[str, Field(min_length=1)]
    assumed: str | None = None  # what is taken for it, of a card that is asked about by its size alone
    larger: tuple[str, ...] = ()  # of such a card: those of its size that leave a program more

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
        return max(self.total_mib - largest_gap_mib(self.total_mib), 0) * MIB

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


def largest_gap_mib(total_mib: int) -> int:
    """The most that a card of ``total_mib`` or less with both numbers known hides from PyTorch: larger ones
    hide more. Slices and shared memory are called by sizes that they don't have."""
    return max(
        gpu.total_mib - gpu.torch_visible_mib
        for gpu in load_gpus()
        if gpu.torch_visible_mib is not None
        and gpu.total_mib <= max(total_mib, 8192)
        and gpu.kind not in ("slice", "shared")
    )


def find_gpu(name: str) -> Gpu:
    """The card of that name or alias; case, spaces, dashes, underscores and vendor words do not matter. Of a
    size, such as 24GB, the one card of it that leaves a program the least.

    The whole name must match. Completing "2080" to the only 2080 in the list, a 2080 Ti, would plan for a
    card with 3 GB more than the user has.
    """
    gpus_by_key = _gpus_by_key()
    key = _key(name)
    if key in gpus_by_key:
        return gpus_by_key[key]
    size = size_of(name)
    if size is not None:
        return _of_size(size)
    counted = _counted(name)
    if counted is not None:
        return find_gpu(counted[1])
    if re.fullmatch(_NUMBER_WITH_UNIT, name.strip(), re.IGNORECASE):
        raise MemplanError(
            f"a card has from 1 to {_MOST_GB} GB, written like 24GB, not {printable(name.strip())}"
        )
    if "," in name:
        raise MemplanError(f"--gpu takes one card at a time, not {shown(name)}: give it for each")
    begun = {gpu.name: gpu for known, gpu in gpus_by_key.items() if key and known.startswith(key)}
    # slices are called by their card's name and more
    begun = {name: gpu for name, gpu in begun.items() if gpu.kind != "slice"} or begun
    if len(begun) > 1:
        raise MemplanError(f"GPU name {name!r} could be {_alternatives(begun.values())}; {_LIST_HINT}")
    raise UnknownName("GPU", name, [_closest_alias(gpu, name) for gpu in load_gpus()], _LIST_HINT)


def size_of(text: str) -> float | None:
    """The GB that a card is asked for by, None of a name. Raises MemplanError for a size that no card has."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    size = float(found[1] or found[4])
    if not 1 <= size <= _MOST_GB:
        raise MemplanError(f"a card has from 1 to {_MOST_GB} GB, not {printable(text.strip())}")
    return size


def of_size(size: float) -> list[Gpu]:
    """The listed cards that are sold as having so many GB."""
    return [gpu for gpu in load_gpus() if gpu.gb == size]


def _of_size(size: float) -> Gpu:
    """A card that stands for all of a size: which of them it is was not said, so it is the least."""
    name = f"{size:g} GB card"
    whole = [
        gpu
        for gpu in of_size(size)
        if gpu.capability is not None and gpu.capability >= _AMPERE and gpu.kind not in ("slice", "shared")
    ]
    seen = [gpu for gpu in whole if not gpu.visible_is_estimate] or whole
    if not seen:
        return Gpu(
            name=name,
            aliases=("gb",),
            vendor="nvidia",
            gb=max(round(size), 1),
            total_mib=int(size * 1024),
            torch_visible_mib=None,
            compute_capability="8.6",
            kind="datacenter",  # of which a process is taken to have the most beside the allocator
            ecc="n.a.",
            source="a size that was asked for",
            assumed="no NVIDIA card of this size is listed; what PyTorch sees of one is a cautious estimate",
        )
    least, most = (pick(seen, key=lambda gpu: gpu.visible_bytes) for pick in (min, max))
    assumed = f"taken as the {least.name}"
    if most.visible_bytes > least.visible_bytes:
        assumed += (
            f", the least of this size ({gib(least.visible_bytes)} GiB usable, {gib(most.visible_bytes)} of "
            f"the {most.name}); `memplan gpus {size:g}GB` names all"
        )
    larger = tuple(gpu.name for gpu in seen if gpu.visible_bytes > least.visible_bytes)
    return least.model_copy(update={"name": name, "assumed": assumed, "larger": larger})


def several(name: str) -> int:
    """How many cards a name means: 8 of 8xH100, else 1. Raises MemplanError for none."""
    found = _counted(name)
    return 1 if found is None else found[0]


def own_name(name: str) -> str:
    """The card's own name, without how many there are of it. Raises MemplanError for none."""
    found = _counted(name)
    return (name if found is None else found[1]).strip()


def together(names: Iterable[str], said: int | None = None) -> int | None:
    """How many cards share a question that names these; None where no name says it. Raises MemplanError
    where that is several numbers, or not the one that is ``said`` beside."""
    names = [names] if isinstance(names, str) else list(names)
    counts = {several(name) for name in names}
    if len(counts) > 1:
        raise MemplanError("one question is about one number of GPUs: give each card the same, or ask twice")
    if all(_counted(name) is None for name in names):
        return None
    count = counts.pop()
    if said is not None and said != count:
        cards = "one card was" if count == 1 else f"{count} cards were"
        raise MemplanError(f"{cards} named, and gpus says {said}: leave one of them out")
    return count


def _counted(name: str) -> tuple[int, str] | None:
    """The count and the card's own name, as in 8xH100; None of a name without a count."""
    if _key(name) in _gpus_by_key():
        return None
    found = _SEVERAL.fullmatch(name.strip())
    if found is None:
        return None
    count, rest = int(found[1] or found[4]), found[2] or found[3]
    if found[3] and _key(rest) not in _gpus_by_key():
        return None  # an x in a card's own name
    if count == 0:
        raise MemplanError(f"{printable(name.strip())} is no card: give one, such as {rest}")
    return count, rest


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
