"""Does a run fit on a card? The allocator is simulated, and the card's bytes are held against what it takes.

needed = peak of reserved bytes + what a process takes outside PyTorch's allocator, against what PyTorch can
see of the card. Where that does not fit, the run is simulated once more on a card of that size: PyTorch
gives cached memory back before it gives up, so some runs that would rather have more still get through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from memplan.asked.gpus import Gpu
from memplan.cuda.card import Card
from memplan.tape import Category, Phase, Tape

if TYPE_CHECKING:  # a plan whose cards are all told at a glance never loads the simulation
    from memplan.asked.alloc_conf import AllocatorSettings
    from memplan.device.playback import RanOut, Reserved, Simulation

MIB = 1 << 20

# What a process takes outside PyTorch's allocator: driver context, kernel images, cuBLAS. Assumed, not
# measured by us: the upper end of what others' runs show. Public out-of-memory messages of single processes
# (in use - allocated - reserved but unallocated) give 0.24 to 0.60 GiB on RTX cards and an A6000, 0.50 and
# 0.51 on A100s, 0.73 on an H100, 0.51 on an H200; published nvidia-smi figures of an A100 leave up to 0.80
# (docs/fit.md, docs/accuracy.md).
CONTEXT_BYTES = {
    "consumer": 640 * MIB, "workstation": 640 * MIB, "datacenter": 832 * MIB, "slice": 832 * MIB,
    "shared": 832 * MIB,
}  # fmt: skip

# What a process takes beside that where several share a step: NCCL's buffers. Assumed too: public messages
# and nvidia-smi's figures of such processes leave 0.2 to 0.6 GiB more than those of single ones
# (docs/fit.md).
NCCL_BYTES = 640 * MIB

# A run that leaves less than this share of what it reserves is called tight: what memplan promises for
# reserved bytes is 2 % (docs/fit.md).
MARGIN_PER_CENT = 2

Verdict = Literal["fits", "tight", "does not fit"]
_Bounds = tuple["int | None", "int | None", "int | None"]


class Fit(BaseModel):
    """One card. Bytes. ``total_bytes`` is what PyTorch can see of the card; ``needed_bytes`` is
    ``reserved_bytes``, as much as the run reserves where nothing limits it, plus ``context_bytes``, what a
    process takes beside it; ``headroom_bytes`` is what is left, of the card or of the share of it that
    ``per_process_memory_fraction`` allows.

    Verdicts: *fits*: it is there, and 2 % of what is reserved to spare. *tight*: the simulated run gets
    through, but with less to spare, or only because the allocator gives cached memory back to the driver and
    asks again (``retries``), which costs time. *does not fit*: the simulated run goes out of memory.
    ``note`` says why. ``gets_through_on``: of a card that was asked for by its size and is the least of it,
    the others of that size on which the run gets through, though it does not here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    total_bytes: int
    reserved_bytes: int
    context_bytes: int
    needed_bytes: int
    headroom_bytes: int
    verdict: Verdict
    retries: int = 0
    note: str | None = None
    gets_through_on: tuple[str, ...] = ()


class Run:
    """A run to be held against cards: its tape with every layer played, how it is loaded onto a card of so
    many bytes, and the allocator's settings; ``ranks``: how many processes share its steps; ``first``:
    gives the tape of its first step, where that is another, to which loading belongs then."""

    def __init__(
        self,
        tape: Tape,
        loading: Callable[[int | None], Tape | None],
        settings: AllocatorSettings,
        card: Card | None = None,
        ranks: int = 1,
        first: Callable[[], Tape] | None = None,
    ) -> None:
        self.tape, self.settings, self.ranks = tape, settings, ranks
        self.first = first
        self.loading = loading
        self.card = card or Card()
        self._simulations: dict[_Bounds, Simulation] = {}

    @property
    def free(self) -> Reserved:
        """The run where nothing limits it."""
        return self._found((None, None, None))

    @property
    def begun(self) -> Reserved:
        """The same up to the end of its first step."""
        return self.simulation((None, None, None)).begun

    def within(self, room: int, total: int, limit: int | None = None) -> Reserved:
        """The run where the driver has ``room`` bytes for it, on a card of ``total``."""
        return self._found((room, total, limit))

    def with_evaluation(self, tape: Callable[[], Tape]) -> Evaluated:
        """The run with an evaluation after its steps, of which ``tape`` gives the unfolded tape."""
        return Evaluated(self, tape)

    def simulation(self, bounds: _Bounds) -> Simulation:
        """The run, played once for these bounds: room, total and limit."""
        from memplan.device.playback import Simulation

        if bounds not in self._simulations:
            room, total, limit = bounds
            self._simulations[bounds] = Simulation(
                self.tape,
                self.loading(total),
                self.settings,
                capacity=room,
                limit=limit,
                first=None if self.first is None else self.first(),
                several=self.ranks > 1,
            )
        return self._simulations[bounds]

    def steady(self, simulation: Simulation) -> Reserved:
        """What is played of a simulation."""
        return simulation.trained

    def _found(self, bounds: _Bounds) -> Reserved:
        return self.steady(self.simulation(bounds))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_simulations": {}}  # which can be found again


class Evaluated(Run):
    """A run with an evaluation after its steps: what it took to get there is not played again."""

    def __init__(self, run: Run, tape: Callable[[], Tape]) -> None:
        super().__init__(run.tape, run.loading, run.settings, run.card, run.ranks)
        self._run, self._evaluation = run, tape

    def _found(self, bounds: _Bounds) -> Reserved:
        simulation = self._run.simulation(bounds)
        return simulation.evaluated(self._run.steady(simulation), self._evaluation)


class Varied(Run):
    """A run whose steps differ: ``steps`` gives the unfolded tapes of those after its first, ``tape``."""

    def __init__(self, run: Run, steps: Callable[[], Iterable[Tape]]) -> None:
        super().__init__(run.tape, run.loading, run.settings, run.card, run.ranks)
        self._steps = steps

    def steady(self, simulation: Simulation) -> Reserved:
        """All steps."""
        return simulation.over(self._steps())


def glance(gpu: Gpu, allocated: int, loaded: int, recast: int = 0) -> Verdict | None:
    """The verdict where it can be told without the simulation, which takes longer than the rest of a plan;
    else None. ``allocated``: bytes at the peak, ``loaded``: those of them that loading brings, ``recast``:
    those of these that were there in 16 bits first (:func:`recast_bytes`).

    It does not fit if the peak alone does not. It fits if the margin is left where the allocator loses as
    much again as training adds to what was loaded and a tenth of that, what was there in 16 bits, and 25 of
    its smallest large segments: tests/test_fit.py looks for runs that lose more.
    """
    room = usable_bytes(gpu) - context_bytes(gpu, Card())
    if allocated > room:
        return "does not fit"
    added = allocated - loaded
    most = allocated + added + added // 10 + recast // 2 + 500 * MIB
    return "fits" if most + most * MARGIN_PER_CENT // 100 <= room else None


def recast_bytes(tape: Tape) -> int:
    """Bytes of the weights that a 4-bit model has in 32 bits: PEFT's preparation casts them on the card when
    all are loaded, and what they were in 16 bits is left to the allocator's cache."""
    quantised = {module.removesuffix(".absmax") for module in tape.modules if module.endswith(".absmax")}
    found = 0
    for segment in tape.segments:
        if segment.phase is not Phase.SETUP:
            continue
        for position in range(segment.start, segment.stop):
            index = tape.events[position]
            if index < 0 or tape.categories[index] is not Category.WEIGHTS:
                continue
            if tape.modules[index].removesuffix(".weight") not in quantised:
                found += tape.deltas[position] * segment.repeat
    return found


def context_of(device: str) -> int:
    """Bytes of the context on the card that its driver calls so; on one that is not listed, the most."""
    from memplan.asked.gpus import load_gpus

    kind = next((gpu.kind for gpu in load_gpus() if gpu.name == device), "datacenter")
    return CONTEXT_BYTES[kind]


def usable_bytes(gpu: Gpu) -> int:
    """What PyTorch can see of a card: as its driver says if the card is in this machine, else as listed."""
    from memplan.device import driver

    return driver.present().get(gpu.name, gpu.visible_bytes)


def judge(gpu: Gpu, run: Run, *, explain: bool = True) -> Fit:
    """Hold a run against a card. Without ``explain`` it is not found out at which request a run ends that
    needs more than there is: it is said not to fit, though it may be tight."""
    total = usable_bytes(gpu)
    outside = context_bytes(gpu, run.card, run.ranks)
    free = run.free
    room = total - outside
    needed = free.reserved + outside
    limit = run.settings.limit(total)
    allowed = allowed_bytes(gpu, run.card, run.settings, run.ranks)
    retries, note = 0, None
    verdict: Verdict = "fits"
    if free.reserved > allowed and not explain:
        verdict = "does not fit"
    elif free.reserved > allowed:
        bound = run.within(room, total, limit)
        retries = bound.retries
        if bound.ran_out is not None:
            verdict, note = "does not fit", _out_of_memory(bound.ran_out)
        else:
            verdict = "tight"
            note = f"gets through by giving cached memory back to the driver, {_times(retries)} in two steps"
    elif beyond(free.reserved, allowed) > 0:
        verdict, note = "tight", f"leaves less than {MARGIN_PER_CENT} % of what it reserves"
    if allowed < room:
        note = "; ".join(filter(None, (f"PyTorch may reserve {_size(allowed)} at most", note)))
    return Fit(
        gpu=gpu.name,
        total_bytes=total,
        reserved_bytes=free.reserved,
        context_bytes=outside,
        needed_bytes=needed,
        headroom_bytes=allowed - free.reserved,
        verdict=verdict,
        retries=retries,
        note=note,
    )


def excess(gpu: Gpu, run: Run) -> int:
    """Bytes by which a run goes beyond what is called *fits* on a card; at most 0 if it is called so. Of one
    that goes beyond it in its first step already, those."""
    allowed = allowed_bytes(gpu, run.card, run.settings, run.ranks)
    begun = beyond(run.begun.reserved, allowed)
    return begun if begun > 0 else beyond(run.free.reserved, allowed)


def beyond(reserved: int, allowed: int) -> int:
    """Bytes by which what is reserved goes beyond what is called *fits*."""
    return reserved + reserved * MARGIN_PER_CENT // 100 - allowed


def allowed_bytes(gpu: Gpu, written_for: Card, settings: AllocatorSettings, ranks: int = 1) -> int:
    """Bytes that a run may reserve on a card."""
    total = usable_bytes(gpu)
    room = total - context_bytes(gpu, written_for, ranks)
    limit = settings.limit(total)
    return room if limit is None else min(room, limit)


def context_bytes(gpu: Gpu, written_for: Card, ranks: int = 1) -> int:
    """Bytes that a process takes outside the simulated run: the context, what this card's two cuBLAS
    workspaces have more than those that the run was written with, and NCCL's where several share a step."""
    workspaces = 0
    if gpu.capability is not None:
        workspaces = 2 * (Card(gpu.capability).cublas_workspace - written_for.cublas_workspace)
    return CONTEXT_BYTES[gpu.kind] + workspaces + (NCCL_BYTES if ranks > 1 else 0)


def _out_of_memory(at: RanOut) -> str:
    layer = "" if at.layer is None else f" of layer {at.layer}"
    where = "while loading" if at.stage == "loading" else f"in the {at.stage}'s {at.phase.value}{layer}"
    return (
        f"out of memory {where}, at {at.operation}: {_size(at.requested)} asked for with "
        f"{_size(at.reserved)} reserved"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / MIB:.1f} MiB"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
