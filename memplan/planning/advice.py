"""What :mod:`memplan.planning.advise` says, as records."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from memplan.device.fit import Verdict


class Change(BaseModel):
    """One change. Bytes: ``tensor_bytes`` at the peak after it, ``saves_bytes`` less than before;
    ``needed_bytes`` with the allocator simulated, None where the peak alone is too large. ``cost`` in words;
    ``command``: memplan's option; ``config``: the same in PEFT, TRL or the Trainer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    cost: str
    command: str
    config: str
    tensor_bytes: int
    saves_bytes: int
    needed_bytes: int | None
    verdict: Verdict


class Combination(BaseModel):
    """Several changes that together make a run fit; none of them can be left out. ``command``: memplan's
    options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    titles: tuple[str, ...]
    command: str
    needed_bytes: int
    verdict: Verdict


class Advice(BaseModel):
    """For one card. Of a run that does not fit: ``changes``, those that make it fit first, the cheapest of
    them first; ``combination`` where no single one does; ``cards`` on which it fits as it is. Of one that
    fits: ``room``, what else there is room for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    changes: tuple[Change, ...] = ()
    combination: Combination | None = None
    cards: tuple[str, ...] = ()
    room: tuple[str, ...] = ()
