"""What the caching allocator reserves for a run: its loading, its first step, and the steps after it.

A tape is one steady-state step. The allocator, though, remembers what came before: segments lie as loading
left them, cuBLAS takes its workspaces with the first products of forward and of backward, and optimizer
states are born at the end of the first step, into what that step has cached. So a run is played from the
start, on the simulated allocator: loading, then the step with workspaces and states made where they are
made, then the step as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from memplan.asked.alloc_conf import AllocatorSettings
from memplan.device.allocator import SMALL, Allocator, Block, OutOfMemory
from memplan.tape import Category, Part, Phase, Tape

LOADING, FIRST_STEP, LATER_STEP = "loading", "first step", "later step"
EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True)
class RanOut:
    """Where a run went out of memory. ``requested``: bytes that were asked for; ``reserved``: bytes held
    then."""

    stage: str
    phase: Phase
    operation: str
    module: str
    layer: int | None
    requested: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """What a run took. Bytes.

    ``allocated``: ``torch.cuda.max_memory_allocated`` of a steady-state step, whole blocks as the allocator
    counts them; ``reserved``: ``max_memory_reserved`` of the whole run, up to where it ran out if it did;
    ``after_step``: what stays reserved then; ``retries``: how often cached memory was given back to the
    driver so that a request could be met (``num_alloc_retries``); ``changes``: bytes reserved in the
    steady-state step, as (event of the tape, bytes) whenever they change.
    """

    allocated: int
    reserved: int
    after_step: int
    retries: int
    ran_out: RanOut | None = None
    changes: tuple[tuple[int, int], ...] = ()

    @property
    def in_step(self) -> int:
        """Bytes reserved at most in the steady-state step: its own ``max_memory_reserved``."""
        return max((reserved for _, reserved in self.changes), default=self.reserved)

    @property
    def fragmentation(self) -> int:
        """Bytes reserved at most beyond what was allocated at most."""
        return self.reserved - self.allocated


def simulate(
    tape: Tape,
    loading: Tape | None = None,
    settings: AllocatorSettings | None = None,
    *,
    capacity: int | None = None,
    limit: int | None = None,
) -> Reserved:
    """What the run took that the unfolded ``tape`` is a step of (:class:`Simulation`)."""
    return Simulation(tape, loading, settings, capacity=capacity, limit=limit).trained


class Simulation:
    """The run that the unfolded ``tape`` is a step of, played up to its steady state.

    ``loading`` as :func:`memplan.predict.loading.loading` writes it; without it, what rests is allocated in
    the tape's order. ``capacity`` and ``limit`` as in :class:`memplan.device.allocator.Allocator`.
    ``first``: the tape of the first step, where that is another; ``several``: GPUs share the steps, whose
    engines settle later: where the second step reserves more, a third is played. So it is with images, whose
    batches lie elsewhere in each step.
    ``begun``: what it took up to the end of its first step; ``trained``: what it took. Each is played when it
    is asked for.
    """

    def __init__(
        self,
        tape: Tape,
        loading: Tape | None = None,
        settings: AllocatorSettings | None = None,
        *,
        capacity: int | None = None,
        limit: int | None = None,
        first: Tape | None = None,
        several: bool = False,
    ) -> None:
        self._playback = Playback(first or tape, Allocator(settings, capacity=capacity, limit=limit))
        self._loading = loading
        self._tape, self._several = tape, several
        self._evaluated: Reserved | None = None
        self._later: Reserved | None = None

    @cached_property
    def begun(self) -> Reserved:
        """Loading and the first step: half the work, where that is more than there is room for already."""
        return self._outcome(self._played(self._begin))

    @cached_property
    def trained(self) -> Reserved:
        """The same with a later step."""
        if self.begun.ran_out is not None:
            return self.begun
        return self._outcome(self._played(self._go_on))

    def evaluated(self, trained: Reserved, tape: Callable[[], Tape]) -> Reserved:
        """The same with an evaluation after what was ``trained``, of which ``tape`` gives the unfolded tape;
        what was said of the later steps is then said of both. It is the same one whenever it is asked for."""
        if self._evaluated is None:
            self._evaluated = trained
            if trained.ran_out is None:
                evaluation = tape()
                self._evaluated = self._outcome(self._played(lambda: self._playback.evaluate(evaluation)))
        return self._evaluated

    def over(self, steps: Iterable[Tape]) -> Reserved:
        """The run whose later steps are these, unfolded tapes of other batches. What is allocated is the most
        of any step."""
        if self._later is None:
            self._later = self.begun
            if self.begun.ran_out is None:
                self._later = self._outcome(self._played(lambda: self._play_over(steps)))
        return self._later

    def _play_over(self, steps: Iterable[Tape]) -> None:
        for number, tape in enumerate(steps, 2):
            self._playback = self._playback.going_on(tape)
            self._playback.step(f"step {number}")

    def _begin(self) -> None:
        self._playback.load(self._loading)
        self._playback.step(FIRST_STEP)

    def _go_on(self) -> None:
        if self._playback.tape is not self._tape:
            self._playback = self._playback.going_on(self._tape)
        run, allocator = self._playback, self._playback.allocator
        allocator.peak_allocated = allocator.allocated
        run.watch()
        before = allocator.peak_reserved
        run.step(LATER_STEP)
        if (self._several or run.fed) and allocator.peak_reserved > before:
            run.step(LATER_STEP)

    def _played(self, part: Callable[[], None]) -> OutOfMemory | None:
        try:
            part()
        except OutOfMemory as error:
            return error
        return None

    def _outcome(self, error: OutOfMemory | None) -> Reserved:
        run, allocator = self._playback, self._playback.allocator
        return Reserved(
            allocator.peak_allocated,
            allocator.peak_reserved,
            allocator.reserved,
            allocator.retries,
            None if error is None else run.place(error),
            tuple(run.changes),
        )


class Playback:
    """A run being played: ``live`` holds the block of each storage that is there; ``begin`` is the event at
    which the step begins."""

    def __init__(self, tape: Tape, allocator: Allocator) -> None:
        self.tape, self.allocator = tape, allocator
        self.live: dict[int, Block] = {}
        self.stage, self.making = LOADING, False
        self.handed_on: set[int] = set()  # storages whose sizes tell what takes another's place
        self.start = 0
        self.changes: list[tuple[int, int]] = []
        setup = [segment for segment in tape.segments if segment.phase is Phase.SETUP]
        self.begin = setup[-1].stop if setup else 0
        self.update = next((s.start for s in tape.segments if s.part is Part.UPDATE), len(tape.events))
        self.resting = rest = [event for event in tape.events[: self.begin] if event >= 0]
        workspaces = [storage for storage in rest if storage in tape.workspaces]
        self.states = [e for e in rest if tape.categories[e] is Category.OPTIMIZER_STATE]
        self.renewed = [
            event
            for segment in setup
            if segment.part is Part.RENEWED
            for event in tape.events[segment.start : segment.stop]
        ]
        # images: blocks of a batch that lie among weights and activations, where it matters that each is new
        self.fed = [e for e in rest if tape.operations[e] == "batch" and tape.sizes[e] > SMALL]
        left = self._left(set(rest).difference(self.states, self.renewed))
        self.born = sorted([*zip(self._first_products(), workspaces, strict=False), *left])
        later = {*self.states, *self.renewed, *(storage for _, storage in self.born)}
        self.others = [event for event in rest if event not in later]

    def _first_products(self) -> list[int]:
        """The first events after which a thread's cuBLAS handle is there: it is made, workspace and all, when
        a product has its result and multiplies (aten/src/ATen/cuda/CublasHandlePool.cpp)."""
        tape, found = self.tape, []
        for phase in (Phase.FORWARD, Phase.BACKWARD):  # autograd has a thread of its own
            parts = (segment for segment in tape.segments if segment.phase is phase)
            at = (i for part in parts for i in range(part.start, min(part.stop, self.update)))
            first = next((i for i in at if tape.events[i] in tape.products), None)
            if first is not None:
                found.append(first + 1)
        return found

    def _left(self, rest: set[int]) -> list[tuple[int, int]]:
        """What a step finds that the one before has left, and drops: at which event, and its storage. The
        first step has none, and something of the size in its place when it would be dropped is as good."""
        events = self.tape.events
        there = set(events[self.begin : self.update])
        return [(events.index(~storage, self.begin), storage) for storage in rest if ~storage in there]

    def load(self, loading: Tape | None) -> None:
        """Everything that is there before the first step."""
        if loading is not None:
            tape, self.tape = self.tape, loading
            for segment in loading.segments:
                if segment.part is Part.EMPTIED:
                    self.allocator.empty_cache()
                else:
                    self.play(segment.start, segment.stop)
            self.tape = tape
        self._make(number for number in self.others if number not in self.live)

    def step(self, stage: str) -> None:
        """One step; the first one makes what later ones find there. A batch is there before the names of the
        one before it are given up (transformers, ``trainer.py``, ``_run_epoch``)."""
        self.stage = stage
        if stage != FIRST_STEP:
            self._feed()
        before = set(self.live)
        played = self.begin
        if stage == FIRST_STEP:
            for position, storage in self.born:
                self.play(played, position)  # which stays the place: a product asks for its workspace
                self.live[storage] = self.allocator.malloc(self.tape.sizes[storage])
                played = position
                before.add(storage)
        self.play(played, self.update)
        if stage == FIRST_STEP:
            self._make(self.states)
            before.update(self.states)
        self.play(self.update, len(self.tape.events))
        self._hand_on(before)
        if stage == FIRST_STEP:  # what loading has left goes, where later steps know nothing of it
            for number in [number for number in self.live if number >= len(self.tape.sizes)]:
                self.allocator.free(self.live.pop(number))
            self._make(self.renewed)

    def _feed(self) -> None:
        before = [self.live.pop(storage) for storage in self.fed]
        self._make(self.fed)
        for block in before:
            self.allocator.free(block)

    def evaluate(self, tape: Tape) -> None:
        """What an evaluation makes and drops; what rests on its tape is there already, and stays until the
        next step even where another takes its place."""
        self.stage = EVALUATION
        training, resting = self.tape, self.live
        self.tape, self.live = tape, {}
        begin = next(segment.start for segment in tape.segments if segment.phase is Phase.FORWARD)
        made = {event for event in tape.events[begin:] if event >= 0}
        own = [event for event in tape.events[begin:] if event >= 0 or ~event in made]
        self.start = begin
        self.allocator.play(own, tape.sizes, self.live, tape.streams)
        for block in self.live.values():
            self.allocator.free(block)
        self.tape, self.live = training, resting

    def going_on(self, tape: Tape) -> Playback:
        """The same run before a step of another batch, whose ``tape`` has the same at rest but for that; or
        behind a first step, with what that has left at the end of what rests."""
        result = Playback(tape, self.allocator)
        left = sorted(self.live.keys() - set(self.resting))
        for here, there in zip([*self.resting, *left], result.resting, strict=True):
            block = self.live[here]
            if self.tape.sizes[here] != tape.sizes[there]:  # the loop's name holds the last one until then
                result.live[there] = self.allocator.malloc(tape.sizes[there])
                self.allocator.free(block)
            else:
                result.live[there] = block
        return result

    def _at(self, index: int) -> None:
        self.start, self.allocator.position = index, 0

    @property
    def position(self) -> int:
        """The event that is played; the storage that is made, outside the steps."""
        return self.start + self.allocator.position

    def _make(self, storages: Iterable[int]) -> None:
        self.making = True
        for index in storages:
            self._at(index)
            self.allocator.play([index], self.tape.sizes, self.live)
        self.making = False

    def play(self, start: int, stop: int) -> None:
        """The tape's events from one to another."""
        self.start = start
        self.allocator.play(self.tape.events[start:stop], self.tape.sizes, self.live, self.tape.streams)

    def _hand_on(self, before: set[int]) -> None:
        """What a step puts in the place of something that was there (Adafactor's scales) is what the next
        one finds there."""
        gone = sorted(before - self.live.keys())
        if not gone:
            return
        left = sorted(self.live.keys() - before)
        self.handed_on.update(gone, left)
        for old in gone:
            match = next((new for new in left if self.tape.sizes[new] == self.tape.sizes[old]), None)
            if match is not None:
                left.remove(match)
                self.live[old] = self.live.pop(match)

    def watch(self) -> None:
        """From here on, note what is reserved."""
        self.changes.append((self.begin, self.allocator.reserved))

        def changed(_address: int, _change: int) -> None:
            self.changes.append((self.position, self.allocator.reserved))

        self.allocator.on_segment = changed

    def place(self, error: OutOfMemory) -> RanOut:
        """What the run was doing when it went out of memory."""
        tape = self.tape
        if self.making:
            storage, layer = self.position, None
            phase = Phase.SETUP if self.stage == LOADING else Phase.OPTIMIZER
        else:
            storage = tape.events[self.position]
            at = next(s for s in reversed(tape.segments) if s.start <= self.position and s.start < s.stop)
            phase, layer = at.phase, at.layer
        return RanOut(
            self.stage,
            phase,
            tape.operations[storage],
            tape.modules[storage],
            layer,
            error.requested,
            error.reserved,
        )
