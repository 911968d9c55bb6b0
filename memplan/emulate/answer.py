"""What was seen of a program on a card that is not there, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from memplan.asked.gpus import Gpu, load_gpus
from memplan.device.fit import MARGIN_PER_CENT, Verdict
from memplan.emulate.cards import MULTIPROCESSORS
from memplan.errors import MemplanError

SCHEMA_VERSION = 1
_CUDNN_FROM = (9, 0)  # the capability from which PyTorch prefers cuDNN's attention (sdp_utils.cpp)
_NEVER = 64  # times a card: no program asks for so much, but one that was told nonsense


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Counters(_Record):
    """PyTorch's allocator: allocated and reserved at most since the last such record, resting at its end;
    ``retries``: how often cached memory was given back so that a request could be met, since the program
    began (``num_alloc_retries``)."""

    allocated_bytes: NonNegativeInt
    reserved_bytes: NonNegativeInt
    resting_bytes: NonNegativeInt
    retries: NonNegativeInt


class Step(Counters):
    """An optimizer step, and when it ``ended`` in microseconds since 1970."""

    ended: NonNegativeInt


class Line(_Record):
    """A line of code: the nearest one outside PyTorch, empty where no Python was running (most of a backward
    pass), and the program's ``own`` line that led there, as FILE:LINE."""

    file: str
    line: int
    function: str
    own: str


class Held(Line):
    """``bytes`` in ``count`` tensors that a line made in a phase of the run, there at the peak."""

    phase: str
    bytes: NonNegativeInt
    count: NonNegativeInt


class Peak(Line):
    """The highest point of allocated bytes since training began: in which step and phase, in which module,
    at which line, which asked for ``asked_bytes``; and the lines that hold the most of the ``held_bytes``
    there. Of a run that ran out it is the moment when it did."""

    step: int
    phase: str
    module: str
    asked_bytes: NonNegativeInt
    held_bytes: NonNegativeInt
    largest: tuple[Held, ...]


class RanOut(Line):
    """Where the allocator had no more. ``step``: 0 while loading. Bytes: asked for, free on the card,
    allocated and reserved then."""

    step: int
    phase: str
    module: str
    asked_bytes: NonNegativeInt
    free_bytes: NonNegativeInt
    allocated_bytes: NonNegativeInt
    reserved_bytes: NonNegativeInt


class Seen(_Record):
    """What one process of the program wrote of itself (hook/memplan_watch.py)."""

    used: bool  # the card
    loaded: Counters | None
    steps: tuple[Step, ...]
    ran_out: RanOut | None
    error: str | None  # the exception that ended it
    versions: dict[str, str]
    world: NonNegativeInt  # ranks
    device: str | None
    peak: Peak | None


class DryRun(_Record):
    """The answer. Bytes. ``needed_bytes``: what was reserved at most and ``context_bytes``, what a process
    takes beside it (assumed); None where it ran out before it had all it wanted. All are of one of the
    ``count`` cards. ``loaded``: up to the first forward pass of training."""

    schema_version: int = SCHEMA_VERSION
    memplan_version: str
    provenance: Literal["emulated"] = "emulated"
    command: tuple[str, ...]
    gpu: str
    count: int
    total_bytes: int
    context_bytes: int
    needed_bytes: int | None
    verdict: Verdict
    loaded: Counters | None
    steps: tuple[Step, ...]
    peak: Peak | None
    ran_out: RanOut | None
    libraries: dict[str, str]
    notes: tuple[str, ...] = ()


def read(folder: Path) -> list[Seen]:
    """What the program's processes wrote. Raises MemplanError for a file that none of them wrote so."""
    try:
        return [Seen.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    except (OSError, ValidationError) as error:
        raise MemplanError(
            "what the program wrote of itself can't be read: was its folder changed?"
        ) from error


def answer(
    command: Sequence[str],
    gpu: Gpu,
    seen: Sequence[Seen],
    status: int | None,
    *,
    context: int,
    count: int = 1,
    asked: int,
    version: str,
) -> DryRun:
    """The answer of the process that took the most. ``status``: the program's exit status, None if it was
    ended; ``context``: bytes that were taken from the beginning; ``asked``: optimizer steps; ``version``:
    memplan's. Raises MemplanError if the program says nothing of a training step."""
    users = [one for one in seen if one.steps or one.ran_out] or [one for one in seen if one.used]
    if not users:
        raise MemplanError(_never_used(status))
    worst = max(users, key=_most)
    at = worst.ran_out
    # whatever it made of the exception: it ran out, and no step came after
    ran_out = at if at is not None and status and max(at.step, 1) > len(worst.steps) else None
    notes: list[str] = []
    if at is not None and at.asked_bytes > _NEVER * gpu.visible_bytes:
        raise MemplanError(
            f"at {at.own or at.file or 'a place without Python'} the program asks a library of NVIDIA's that "
            "can't be emulated how much it needs, so nothing can be said"
        )
    if at is not None and ran_out is None:
        notes.append(f"it ran out of memory in step {at.step}, gave something up and went on")
    if ran_out is None:
        notes += _early(worst, status, asked)
    reserved = max((one.reserved_bytes for one in (worst.loaded, *worst.steps) if one is not None), default=0)
    total = gpu.visible_bytes
    room = total - context
    retries = max((step.retries for step in worst.steps), default=0)
    verdict: Verdict = "fits"
    if ran_out is not None:
        verdict = "does not fit"
    elif retries or reserved + reserved * MARGIN_PER_CENT // 100 > room:
        verdict = "tight"
        notes.append(
            f"cached memory was given back {retries} times so that requests could be met, which costs time"
            if retries
            else f"it leaves less than {MARGIN_PER_CENT} % of what it reserves"
        )
    if ran_out is not None:
        larger = [card for card in _emulated() if card.visible_bytes > total]
        if larger:
            notes.append(
                f"the next larger card is the {larger[0].name}: ask again with --gpu for what it would take"
            )
    else:
        done = len(worst.steps)
        them = "it" if done == 1 else "them"
        notes.append(
            f"it is judged by {_number(done)} and what the program did in {them}: longer rows later "
            "on, an evaluation or a checkpoint may take more (--steps)"
        )
    if gpu.capability is not None and gpu.capability >= _CUDNN_FROM:
        notes.append(
            "where this card would take cuDNN's attention, which can't be emulated, flash attention ran "
            "in its place"
        )
    if worst.world > 1:
        notes.append(
            f"rank 0 of {worst.world} ran and stands for all, which may take more where they differ; NCCL's "
            "own buffers, which lie beside, are not counted"
        )
    if len(users) > 1:
        notes.append(f"{len(users)} processes used the card; this is of the one that took the most")
    return DryRun(
        memplan_version=version,
        command=tuple(command),
        gpu=gpu.name,
        count=count,
        total_bytes=total,
        context_bytes=context,
        needed_bytes=None if ran_out is not None else reserved + context,
        verdict=verdict,
        loaded=worst.loaded,
        steps=worst.steps,
        peak=worst.peak,
        ran_out=ran_out,
        libraries=worst.versions,
        notes=tuple(notes),
    )


def _most(seen: Seen) -> tuple[bool, int]:
    return seen.ran_out is not None, max((step.reserved_bytes for step in seen.steps), default=0)


def _never_used(status: int | None) -> str:
    if status:
        return f"the program failed by itself (exit status {status}) before it used the card; see above"
    if status is None:
        return "the program did not use the card in the time it was given: give it more with --timeout"
    return "the program never used the card: is its model moved to cuda?"


def _early(seen: Seen, status: int | None, asked: int) -> list[str]:
    """A note if it ended early. Raises MemplanError if it can't be judged."""
    done = len(seen.steps)
    if done >= asked:
        return []
    if status:
        what = f", {seen.error}" if seen.error else ""
        raise MemplanError(
            f"the program failed by itself (exit status {status}{what}) {_since(done)}: see above"
        )
    if done:
        return [f"the program ended {_since(done)}, of the {asked} that were asked for"]
    if status is None:
        raise MemplanError(
            "the program took no optimizer step in the time it was given: give it more with --timeout"
        )
    raise MemplanError(
        "the program took no optimizer step before it ended, so nothing can be said of training"
    )


def _emulated() -> list[Gpu]:
    """The cards that can be, the smallest first."""
    found = [gpu for gpu in load_gpus() if gpu.name in MULTIPROCESSORS]
    return sorted(found, key=lambda gpu: gpu.visible_bytes)


def _number(steps: int) -> str:
    return "one optimizer step" if steps == 1 else f"{steps} optimizer steps"


def _since(steps: int) -> str:
    if not steps:
        return "before its first optimizer step"
    return f"after {_number(steps)}"
