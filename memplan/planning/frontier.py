"""The frontier: the largest batch or sequence of a recipe that a card has room for.

Playing a step costs milliseconds, and a table of a hundred points asks for thousands of steps. What does not
change between them is reused: a step of other tokens has the same events, only its sizes differ, and each
size is a polynomial in batch and sequence length. Four or five played steps give all coefficients
(:class:`SizedTape`); tests/test_frontier.py plays what it says.

Two answers: :func:`at_most` by the peak of allocated bytes alone, which no run can do without;
:func:`largest` by the verdict, with the allocator simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from memplan import attention, losses, strategies
from memplan.asked.alloc_conf import parse_settings
from memplan.asked.gpus import Gpu
from memplan.asked.recipe import Kernels, Mode, Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.attention import key_splits
from memplan.cuda.card import Card
from memplan.cuda.embedding import SORTED_FROM
from memplan.device.fit import context_bytes, usable_bytes
from memplan.errors import MemplanError
from memplan.planning import predicted
from memplan.planning.apart import each
from memplan.planning.cards import remark, written_for
from memplan.predict.parameters import resolve_recipe
from memplan.tape import Tape, replay

if TYPE_CHECKING:
    from memplan.planning.runs import Runs

What = Literal["batch_size", "seq_len"]

LONGEST = 1 << 20  # tokens in a sequence, batches: beyond them the answer is "enough"
_NEAR = 1 << 16
_SHORT = 32  # tokens
_MOST_PLAYED = 4_000_000  # events, some 10 s; the default table of Gemma-3-27B is 3 million
_MOST_PLAYED_WHOLE = 256  # layers of all points where each is played each time (ZeRO)
_MOST_SIMULATED = 10_000  # layers of all points: the default table of 126 layers, which takes a minute
_NEVER_FUSED_ABOVE = 1536  # tokens (memplan.cuda.gemm_4bit)


class Cell(BaseModel):
    """One point of the frontier. ``seq_len``: the longest sequence there is room for, None for none;
    ``capped``: it is the model's own limit, not the card's, or the longest that is looked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int
    seq_len: int | None
    capped: bool = False

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch_size * (self.seq_len or 0)


class Row(BaseModel):
    """The cells of one recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    cells: tuple[Cell, ...]


class Frontier(BaseModel):
    """A table. ``simulated``: its cells fit with the allocator simulated; else they are the most that the
    peak of allocated bytes leaves room for, and less may really fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    gpu: str
    usable_bytes: int
    simulated: bool
    rows: tuple[Row, ...]
    note: str | None = None  # what is to say of the card


def frontier(
    spec: ModelSpec,
    recipes: Iterable[Recipe],
    gpu: Gpu,
    batches: Iterable[int],
    *,
    simulated: bool = True,
    workers: int = 1,
    progress: Callable[[], None] | None = None,
) -> Frontier:
    """The longest sequence for each recipe and batch. ``progress`` is told of each cell that is done;
    ``workers``: processes that simulate.

    Raises RecipeError where a recipe does not suit the model, MemplanError where too much is to be simulated.
    """
    batches, recipes = list(batches), list(recipes)
    points = len(batches) * len(recipes)
    most = _MOST_SIMULATED if all(map(strategies.folds, recipes)) else _MOST_PLAYED_WHOLE
    if simulated and points * spec.num_hidden_layers > most:
        raise MemplanError(
            f"{points} points of {spec.num_hidden_layers} layers are too many to simulate: ask for "
            f"{most // spec.num_hidden_layers} at most, of fewer batch sizes, modes, optimizers"
        )
    every = [Peaks(spec, resolve_recipe(spec, recipe), gpu) for recipe in recipes]
    # what has no room for the smallest step needs no looking for longer ones
    some = [bool(batches) and one.played(min(batches), 1) <= one.room for one in every]

    def longest(point: tuple[int, int]) -> int:
        row, batch = point
        if not some[row]:
            return 0
        if simulated:
            return largest(every[row], "seq_len", batch)
        found = every[row].bound("seq_len", batch)
        if sum(one.events for one in every) > _MOST_PLAYED:
            raise MemplanError(
                f"the steps of this model have to be played for each size, and {points} points of the "
                "table take too long: ask for fewer batch sizes, modes or optimizers, for example "
                "--batch-sizes 1 --modes qlora"
            )
        return found

    rows: list[list[Cell]] = [[] for _ in every]
    asked = [(row, batch) for row in range(len(every)) for batch in batches]
    for (row, batch), found in zip(asked, each(longest, asked, workers if simulated else 1), strict=True):
        rows[row].append(Cell(batch_size=batch, seq_len=found or None, capped=found == every[row].longest))
        if progress is not None:
            progress()
    return Frontier(
        model=spec.name,
        gpu=gpu.name,
        usable_bytes=usable_bytes(gpu),
        simulated=simulated,
        rows=tuple(
            Row(recipe=sizes.recipe, cells=tuple(cells)) for sizes, cells in zip(every, rows, strict=True)
        ),
        note=remark(gpu, every[0].recipe) if every else None,
    )


_MOST_EVENTS, _LEAST_TRIES = 2_000_000, 4  # simulated in one search, some seconds; simulations


_LOSES = 1.2  # what is reserved grows so many times as fast as what is allocated

MOST_SEARCHED = 300_000  # events of a run that is simulated many times; a 405B's has 107,000


def at_most(peaks: Peaks, what: What, other: int, hint: int = 2048) -> int:
    """The largest value whose peak of allocated bytes there is room for; 0 for none. ``other``: the batch
    size where the sequence length is asked for, and the other way round; ``hint``: where to look first."""

    def excess(value: int) -> int:
        batch, length = (other, value) if what == "seq_len" else (value, other)
        over = peaks.allocated(batch, length) - peaks.room
        return over if abs(over) > _NEAR else peaks.played(batch, length) - peaks.room

    return _last_not_above_zero(excess, peaks.longest if what == "seq_len" else LONGEST, hint)


def largest(peaks: Peaks, what: What, other: int) -> int:
    """The largest value of a recipe on a card that the verdict calls *fits*, as it does all values below it
    that are tried; 0 for none.

    The allocator's losses go up and down with sizes, on a real card too, so some values fit by luck while
    smaller ones do not. Who reads "up to N" means all of them: some below it are tried, and where one does
    not fit the answer is sought below that one.

    It depends on what is asked alone, and on nothing that was found before: a table and a single answer say
    the same.
    """
    runs = peaks.runs

    def excess(value: int) -> int:
        step = runs.step(*((other, value) if what == "seq_len" else (value, other)))
        events.append(len(step.long.events))
        if events[-1] > MOST_SEARCHED:
            raise MemplanError(
                f"a step of {events[-1]:,} allocations and releases takes too long to be simulated over and "
                "over: ask whether one size fits, without --maximize and --advise, or for a frontier with "
                "--no-exact"
            )
        return runs.excess(step)

    known: dict[int, int] = {}
    events: list[int] = []  # of each simulation

    def may_try() -> bool:
        return sum(events) < _MOST_EVENTS or len(known) < _LEAST_TRIES

    def once(value: int) -> int:
        if value not in known:
            known[value] = excess(value)
        return known[value]

    bound = peaks.bound(what, other)
    while bound:
        near = bound - bound // 6  # where most answers are
        slope = _LOSES * peaks.slope(what, other, near, bound)
        found = _last_not_above_zero(once, bound, near, slope)
        for value in _below(found):
            if may_try():
                once(value)
        lucky = [value for value, over in known.items() if over > 0 and value < found]
        if not lucky:
            return found
        bound = min(lucky) - 1
        if not may_try():  # the largest that is known to fit, with all that are known below it
            return max((value for value, over in known.items() if over <= 0 and value <= bound), default=0)
    return 0


def _below(value: int) -> list[int]:
    """Values to be tried before "up to ``value``" is said."""
    tried = (value - 1, value - 1 - value // 128, value - 1 - value // 16)
    return [it for it in dict.fromkeys(tried) if it > 0]


def _last_not_above_zero(excess: Callable[[int], int], last: int, hint: int, slope: float = 0) -> int:
    """A value up to ``last`` whose excess is not above zero while the next one's is (``last`` itself if its
    own is not; 0 if that of 1 is). ``hint`` is where to look first; ``slope``: how steep it is about there,
    where that is known.

    Excess is nearly straight, with steps. From one side a line leads to the place that is sought; between
    both, a line does where the one before took half of what was left, and half of it is taken where not.
    """
    low, high = 0, last + 1  # not asked about themselves
    below: list[tuple[int, int]] = []
    above: list[tuple[int, int]] = []
    guess, left = hint, 2 * last + 2
    for turn in range(200):
        if high - low <= 1:
            break
        guess = min(max(guess, low + 1), high - 1)
        over = excess(guess)
        ours = above if over > 0 else below
        ours.append((guess, over))
        if over > 0:
            high = guess
        else:
            low = guess
        if below and above:
            halves = high - low <= 8 or 2 * (high - low) > left
            guess = (low + high) // 2 if halves else _crossing(below[-1], above[-1])
            left = high - low
        elif slope:
            # further each time: where it is flat, a line leads nowhere
            guess -= int(max(abs(over / slope), 8**turn)) * (1 if over > 0 else -1)
        elif len(ours) > 1:
            guess = _crossing(ours[-2], ours[-1]) + (-turn if over > 0 else 1)
        else:
            guess = high - high // 8 - 1 if over > 0 else low + low // 8 + 1
    return low


def _crossing(one: tuple[int, int], two: tuple[int, int]) -> int:
    """Where the line through two points is zero."""
    (x1, y1), (x2, y2) = one, two
    return x1 if y2 == y1 else x1 - y1 * (x2 - x1) // (y2 - y1)


class Peaks:
    """Peaks of allocated bytes of one recipe (resolved) on a card, by batch and sequence length."""

    def __init__(self, spec: ModelSpec, recipe: Recipe, gpu: Gpu) -> None:
        self.spec, self.recipe, self.gpu = spec, recipe, gpu
        self.card = written_for(recipe, gpu)
        total = usable_bytes(gpu)
        self.room = total - context_bytes(gpu, self.card or Card())
        limit = parse_settings(recipe.alloc_conf).limit(total)
        if limit is not None:
            self.room = min(self.room, limit)
        self.longest = min(spec.max_position_embeddings or LONGEST, LONGEST)
        self._runs: Runs | None = None
        self._sized: dict[object, SizedTape | None] = {}
        self._tokens: int | None = None
        self.events = 0  # that were played

    @property
    def runs(self) -> Runs:
        """Runs of the recipe on the card, with the allocator simulated."""
        from memplan.planning.runs import Runs

        if self._runs is None:
            self._runs = Runs(self.spec, self.recipe, self.gpu, self.card)
        return self._runs

    def bound(self, what: What, other: int) -> int:
        """:func:`at_most`, looked for where as many tokens are as one sequence may have."""
        if self._tokens is None:
            self._tokens = at_most(self, "seq_len", 1)
        return at_most(self, what, other, max(self._tokens // other, 1))

    def slope(self, what: What, other: int, low: int, high: int) -> float:
        """Bytes allocated at the peak for each more of what is asked for, between two values."""
        sizes = [
            self.allocated(*((other, value) if what == "seq_len" else (value, other)))
            for value in (low, high)
        ]
        return (sizes[1] - sizes[0]) / (high - low) if high > low else 0

    def allocated(self, batch: int, length: int) -> int:
        """Bytes allocated at the peak."""
        regime = self._regime(batch, length)
        if regime not in self._sized:
            self._sized[regime] = None if regime is None else self._sample(regime)
        sized = self._sized[regime]
        return self.played(batch, length) if sized is None else sized.peak(batch, length)

    def played(self, batch: int, length: int) -> int:
        """The same by playing the step, whatever is known: the polynomials round a few sizes up together that
        the allocator rounds one by one, and are up to ``_NEAR`` bytes too high."""
        return replay(self._play(batch, length)).allocated_bytes

    def _regime(self, batch: int, length: int) -> object:
        """What decides which kernels run: steps of one regime have the same events. None for those that are
        played one by one: masks of a window are padded to 8 columns, eager attention copies what cuBLAS
        can't read as it lies, fused losses go by chunks, FlashAttention splits the keys where few rows leave
        the card idle, bitsandbytes has kernels of its own for few rows, memplan's go by strips, and of short
        sequences tensors are large that have nothing to do with tokens."""
        spec, recipe = self.spec, self.recipe
        tokens = batch * length
        if spec.sliding_window is not None and length >= spec.sliding_window:
            return None
        if recipe.mode is Mode.QLORA and tokens <= _NEVER_FUSED_ABOVE:
            return None
        if length < _SHORT or not attention.of(recipe).fused or losses.find(recipe.loss).tiled:
            return None
        if recipe.kernels is not Kernels.STOCK:
            return None
        rows = batch * spec.num_attention_heads
        if key_splits(self.card or Card(), rows, length, length, spec.qk_head_dim) > 1:
            return None
        embedding_is_trained = recipe.mode is Mode.FULL or bool(recipe.modules_to_save)
        return tokens > SORTED_FROM or not embedding_is_trained

    def _sample(self, regime: object) -> SizedTape | None:
        """Four steps of the regime, if they have the same events; a fifth where a mask needs it."""
        batch, length = (4, 2048) if regime else (1, 512)
        window = self.spec.sliding_window
        while window is not None and 2 * length >= window:
            batch, length = 2 * batch, length // 2
        points = [(batch, length), (2 * batch, length), (batch, 2 * length), (2 * batch, 2 * length)]
        if length < 16 or any(self._regime(*point) != regime for point in points):
            return None
        samples = [self._play(*point) for point in points]
        sized = SizedTape.of(samples, batch, length)
        if sized is None or not sized.any_negative:
            return sized
        half = (batch, length // 2)
        if self._regime(*half) != regime:
            return None
        sized = SizedTape.of([*samples, self._play(*half)], batch, length)
        return None if sized is None or sized.any_negative else sized

    def _play(self, batch: int, length: int) -> Tape:
        asked = self.recipe.model_copy(update={"batch_size": batch, "seq_len": length})
        tape = predicted.write(self.spec, asked, self.card)
        self.events += len(tape.events)
        return tape


class SizedTape:
    """A tape whose sizes are polynomials: c0 + c1 B S + c2 S + c3 B S² + c4 S², for batch B and length S. The
    last is of masks that all sequences share, where attention is not fused."""

    def __init__(self, tape: Tape, terms: list[tuple[float, float, float, float, float]]) -> None:
        self.terms = list(dict.fromkeys(terms))  # many tensors have the same: a size is worked out once
        places = {term: place for place, term in enumerate(self.terms)}
        self.segments = [(s.start, s.stop, s.repeat) for s in tape.segments if s.start < s.stop]
        self.events = []  # which size, and how many of it come (or go: negative)
        for event, delta in zip(tape.events, tape.deltas, strict=True):
            index = event if event >= 0 else ~event
            self.events.append(
                (places[terms[index]], delta // tape.sizes[index])
            )  # in a folded tape many can go at once

    @staticmethod
    def of(samples: list[Tape], batch: int, length: int) -> SizedTape | None:
        """From steps of (B, S), (2B, S), (B, 2S), (2B, 2S) and, for c4, (B, S/2); None if their events
        differ, or where attention pads its log-sum-exp to 32 rows."""
        first = samples[0]
        if any("efficient_attention" in operation for operation in first.operations):
            return None
        if any(
            tape.events != first.events or tape.operations != first.operations for tape in samples[1:]
        ) or any(
            [(s.start, s.stop, s.repeat) for s in tape.segments]
            != [(s.start, s.stop, s.repeat) for s in first.segments]
            for tape in samples[1:]
        ):
            return None
        terms = []
        for a, b, c, d, *half in zip(*(tape.sizes for tape in samples), strict=True):
            # B, S and powers of two: every coefficient is exact in floating point
            square = (d - c - 2 * (b - a)) / 2
            both = b - a - square
            # what is left has no B: at S, at 2S, and at S/2
            one, two = a - both - square, c - 2 * both - 4 * square
            shared = 0.0
            if half:
                shared = 2 * (two - one - 2 * (one - (half[0] - both / 2 - square / 4))) / 3
            alone = two - one - 3 * shared
            terms.append(
                (
                    one - alone - shared,
                    both / (batch * length),
                    alone / length,
                    square / (batch * length * length),
                    shared / (length * length),
                )
            )
        return SizedTape(first, terms)

    @property
    def any_negative(self) -> bool:
        """Whether a coefficient is below zero, as no tensor's is: something in S² was taken for a line."""
        return any(min(term) < 0 for term in self.terms)

    def peak(self, batch: int, length: int) -> int:
        """Bytes allocated at the peak."""
        tokens, square, shared = batch * length, batch * length * length, length * length
        sizes = [
            -int(-(c0 + c1 * tokens + c2 * length + c3 * square + c4 * shared) // 512) * 512
            for c0, c1, c2, c3, c4 in self.terms
        ]
        deltas = [sizes[index] * times for index, times in self.events]
        live = best = 0
        known: dict[tuple[int, int], tuple[int, int]] = {}  # of stretches that several layers share
        for start, stop, repeat in self.segments:
            if (start, stop) not in known:
                profile = list(accumulate(deltas[start:stop]))
                known[start, stop] = profile[-1], max(profile)
            net, top = known[start, stop]
            best = max(best, live + top + max(net, 0) * (repeat - 1))
            live += repeat * net
        return best
