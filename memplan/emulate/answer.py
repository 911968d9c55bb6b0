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
_LAUNCHERS = ("CalledProcessError", "ChildFailedError", "ProcessRaisedException")  # exceptions of theirs
# of datasets and huggingface_hub, where there is no network
_UNREACHED = ("ConnectionError", "DatasetNotFoundError", "OfflineModeIsEnabled", "ConnectTimeout")
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


Kind = Literal["loading", "step", "evaluation", "saving", "afterwards"]


class Stretch(Counters):
    """A part of the run, and when it ``ended`` in microseconds since 1970. *loading* is all up to the first
    forward pass of training, a *step* all up to the end of an optimizer's; what comes *afterwards* had no
    step any more."""

    kind: Kind
    ended: NonNegativeInt


class Rank(_Record):
    """What one of the ranks that ran took in its steps, at most."""

    rank: NonNegativeInt
    allocated_bytes: NonNegativeInt
    reserved_bytes: NonNegativeInt


class Host(_Record):
    """Of one process, at most after a step: ``tensor_bytes`` of tensors that rest on the host, and
    ``pinned_bytes`` that PyTorch's allocator of pinned memory has, which rounds up to powers of two."""

    tensor_bytes: NonNegativeInt
    pinned_bytes: NonNegativeInt


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
    stretches: tuple[Stretch, ...]
    ran_out: RanOut | None
    error: str | None  # the exception that ended it
    beyond: str | None = None  # what that says it asked for which can't be emulated
    versions: dict[str, str]
    rank: NonNegativeInt
    world: NonNegativeInt  # ranks
    device: str | None
    peak: Peak | None
    host: Host

    def of(self, kind: Kind) -> tuple[Stretch, ...]:
        """The stretches of a kind, in order."""
        return tuple(one for one in self.stretches if one.kind == kind)

    def most(self, kind: Kind) -> Counters | None:
        """The highest of each counter in all stretches of a kind."""
        found = self.of(kind)
        return _highest(found) if found else None


class DryRun(_Record):
    """The answer. Bytes. ``needed_bytes``: ``reserved_bytes``, what was reserved at most, and
    ``context_bytes``, what a process takes beside it (assumed); None where it ran out before it had all it
    wanted. ``allocated_bytes``: at most, in the steps. All are of one of the ``count`` cards, that of the
    rank which took the most; ``ranks``: all that ran, of ``world``. ``loaded``: up to the first forward pass
    of training; ``evaluation``, ``saving`` and ``afterwards``: None where the program did none."""

    schema_version: int = SCHEMA_VERSION
    memplan_version: str
    provenance: Literal["emulated"] = "emulated"
    command: tuple[str, ...]
    gpu: str
    count: int
    total_bytes: int
    context_bytes: int
    allocated_bytes: int | None
    reserved_bytes: int | None
    needed_bytes: int | None
    headroom_bytes: int | None
    verdict: Verdict
    loaded: Counters | None
    steps: tuple[Counters, ...]
    evaluation: Counters | None
    saving: Counters | None
    afterwards: Counters | None
    world: int
    ranks: tuple[Rank, ...]
    host: Host
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
    wanted: Sequence[Kind] = (),
    ranks: Sequence[int] = (0,),
    version: str,
    remarks: Sequence[str] = (),
) -> DryRun:
    """The answer of the process that took the most. ``status``: the program's exit status, None if it was
    ended; ``context``: bytes that were taken from the beginning; ``asked``: optimizer steps, ``wanted``:
    what else had to be seen; ``ranks``: which had to run, none: all; ``version``: memplan's; ``remarks``:
    other notes. Raises MemplanError if the program says nothing of a training step."""
    users = [one for one in seen if one.of("step") or one.ran_out] or [one for one in seen if one.used]
    if not users:
        raise MemplanError(_never_used(status, _error(seen)))
    _all_there(users, ranks, status)
    _check_within(seen, status)
    worst = max(users, key=_most)
    at = worst.ran_out
    # whatever it made of the exception: it ran out, and no step came after
    steps = worst.of("step")
    ran_out = at if at is not None and max(at.step, 1) > len(steps) else None
    notes: list[str] = []
    if at is not None and at.asked_bytes > _NEVER * gpu.visible_bytes:
        raise MemplanError(
            f"at {at.own or at.file or 'a place without Python'} the program asks a library of NVIDIA's that "
            "can't be emulated how much it needs, so nothing can be said"
        )
    if at is not None and ran_out is None:
        notes.append(f"it ran out of memory in step {at.step}, gave something up and went on")
    if ran_out is None:
        notes += _early(worst, status, asked, _error(seen))
        notes += [
            f"no {kind} came, which was asked for"
            for kind in wanted
            if not any(one.of(kind) for one in users)
        ]
    reserved = max((one.reserved_bytes for one in worst.stretches), default=0)
    total = gpu.visible_bytes
    room = total - context
    retries = max((step.retries for step in steps), default=0)
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
                f"it ended there: what it needs in all, a card that it fits tells, the {larger[0].name} or "
                f"another up to the {larger[-1].name}"
            )
    else:
        them = "it" if len(steps) == 1 else "them"
        unseen = {} if worst.of("evaluation") else {"an evaluation": "--eval"}
        unseen |= {} if worst.of("saving") else {"a checkpoint": "--save"}
        more = ("longer rows later on", *unseen)
        notes.append(
            f"it is judged by {_number(len(steps))} and what the program did in {them}: "
            f"{_either(more)} may take more ({', '.join(('--steps', *unseen.values()))})"
        )
    if gpu.capability is not None and gpu.capability >= _CUDNN_FROM:
        notes.append(
            "where this card would take cuDNN's attention, which can't be emulated, flash attention ran "
            "in its place"
        )
    notes += remarks
    if worst.world > 1:
        notes.append(
            f"{_who(users)} of {worst.world} ran{_for_others(users)}; NCCL's own buffers, which lie beside, "
            "are not counted"
        )
    elif len(users) > 1:
        notes.append(f"{len(users)} processes used the card; this is of the one that took the most")

    def unless_it_ran_out(nbytes: int) -> int | None:
        return nbytes if ran_out is None else None

    return DryRun(
        memplan_version=version,
        command=tuple(command),
        gpu=gpu.name,
        count=count,
        total_bytes=total,
        context_bytes=context,
        allocated_bytes=unless_it_ran_out(max((one.allocated_bytes for one in steps), default=0)),
        reserved_bytes=unless_it_ran_out(reserved),
        needed_bytes=unless_it_ran_out(reserved + context),
        headroom_bytes=unless_it_ran_out(room - reserved),
        verdict=verdict,
        loaded=worst.most("loading"),
        steps=tuple(_highest([step]) for step in steps),
        evaluation=worst.most("evaluation"),
        saving=worst.most("saving"),
        afterwards=worst.most("afterwards"),
        world=worst.world,
        ranks=tuple(sorted(map(_rank, users), key=lambda one: one.rank)),
        host=worst.host,
        peak=worst.peak,
        ran_out=ran_out,
        libraries=worst.versions,
        notes=tuple(notes),
    )


def _highest(stretches: Sequence[Stretch]) -> Counters:
    names = Counters.model_fields
    return Counters(**{name: max(getattr(one, name) for one in stretches) for name in names})


def _most(seen: Seen) -> tuple[bool, int]:
    return seen.ran_out is not None, max((one.reserved_bytes for one in seen.stretches), default=0)


def _rank(seen: Seen) -> Rank:
    steps = seen.most("step")
    allocated, reserved = (steps.allocated_bytes, steps.reserved_bytes) if steps is not None else (0, 0)
    return Rank(rank=seen.rank, allocated_bytes=allocated, reserved_bytes=reserved)


def _who(users: Sequence[Seen]) -> str:
    numbers = sorted({one.rank for one in users})
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _for_others(users: Sequence[Seen]) -> str:
    count = len({one.rank for one in users})
    if count == users[0].world:
        return ""
    stands = "stands" if count == 1 else "stand"
    return f" and {stands} for all, which may take more where they differ (--ranks)"


def _all_there(users: Sequence[Seen], ranks: Sequence[int], status: int | None) -> None:
    """Raises MemplanError if a rank that had to run took no step and did not run out."""
    world = users[0].world
    if world == 1:
        return
    there = {one.rank for one in users if one.of("step") or one.ran_out}
    missing = sorted({rank for rank in (ranks or range(world)) if rank < world} - there)
    if there and missing:
        who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        how = f" (the program's exit status is {status})" if status else ""
        raise MemplanError(f"{who} took no optimizer step{how}, so nothing can be said of it: see above")
    beyond = sorted(rank for rank in ranks if rank >= world)
    if beyond:
        raise MemplanError(
            f"--ranks names {beyond[0]}, and the program has {world} ranks, from 0 to {world - 1}"
        )


def _check_within(seen: Sequence[Seen], status: int | None) -> None:
    """Raises MemplanError if the program ended at something that can't be emulated."""
    beyond = next((one.beyond for one in seen if one.beyond), None)
    if status and beyond:
        raise MemplanError(
            f"the program uses {beyond}, which can't be emulated (docs/dry-run.md): see above for where"
        )


def _error(seen: Sequence[Seen]) -> str | None:
    """The exception that ended the program, of whichever process: a launcher's own says only that another
    process failed."""
    errors = [one.error for one in seen if one.error is not None]
    return next((error for error in errors if error not in _LAUNCHERS), next(iter(errors), None))


def _never_used(status: int | None, error: str | None) -> str:
    if status:
        what = f", {error}" if error else ""
        return (
            f"the program failed by itself (exit status {status}{what}) before it used the card: see above"
            f"{_unreached(error)}"
        )
    if status is None:
        return "the program did not use the card in the time it was given: give it more with --timeout"
    return "the program never used the card: is its model moved to cuda?"


def _unreached(error: str | None) -> str:
    """Words for who finds no data where there is no network."""
    if error not in _UNREACHED:
        return ""
    return (
        "; data sets are not served as models are: name files of your own, or rows that `memplan stub "
        "MODEL DIR --data ROWS` makes"
    )


def _early(seen: Seen, status: int | None, asked: int, error: str | None) -> list[str]:
    """A note if it ended early. Raises MemplanError if it can't be judged."""
    done = len(seen.of("step"))
    if done >= asked:
        return []
    if status:
        what = f", {error}" if error else ""
        raise MemplanError(
            f"the program failed by itself (exit status {status}{what}) {_since(done)}: see above"
            f"{_unreached(error) if not done else ''}"
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


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _number(steps: int) -> str:
    return "one optimizer step" if steps == 1 else f"{steps} optimizer steps"


def _since(steps: int) -> str:
    if not steps:
        return "before its first optimizer step"
    return f"after {_number(steps)}"
