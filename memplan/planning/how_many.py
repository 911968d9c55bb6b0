"""The fewest GPUs of a kind that a run fits on, by each way of sharing a step."""

from __future__ import annotations

from collections.abc import Sequence

from memplan import rooms, strategies
from memplan.asked.alloc_conf import parse_settings
from memplan.asked.gpus import Gpu
from memplan.asked.recipe import OF_SEVERAL, Recipe
from memplan.cuda.card import Card
from memplan.device.fit import Run, allowed_bytes, excess, judge
from memplan.errors import RecipeError
from memplan.planning import predicted
from memplan.planning.cards import written_for
from memplan.planning.records import HowMany
from memplan.planning.study import Asked
from memplan.tape import replay

_MOST = 4096  # GPUs that a recipe may have


def how_many(asked: Asked, gpu: Gpu, parallel: str | None = None) -> tuple[HowMany, ...]:
    """The fewest that have 2 % of what is reserved to spare, and what each of them needs; the fewest first.
    Beside them the fewest on which it is tight. Of several replicas, of each there are as many.
    Of a strategy that does not divide what is too large, or that the recipe can't have, there is no number.
    ``parallel``: the only strategy that is asked about."""
    found = (_of(asked, gpu, one) for one in ([parallel] if parallel else rooms.names("strategies")))
    return tuple(sorted(found, key=lambda one: one.gpus or _MOST + 1))


def on_the_fewest(asked: Asked, counts: Sequence[HowMany]) -> Asked:
    """The question on the fewest of all; on one where no number is enough."""
    return _on(asked, counts[0].parallel, (counts[0].gpus or 1) // (asked.given.dp_replicate or 1) or 1)


def _of(asked: Asked, gpu: Gpu, parallel: str) -> HowMany:
    try:
        return _fewest(asked, gpu, parallel)
    except RecipeError as error:
        return HowMany(parallel=parallel, note=str(error))


def _among(asked: Asked, gpu: Gpu, parallel: str, counts: Sequence[int]) -> HowMany:
    """The same of a strategy that has these numbers alone."""
    _on(asked, parallel, counts[0] if counts else 2)  # refuses what the strategy can't have
    tight = None
    for count in counts:
        on = _on(asked, parallel, count)
        if max(_beyond(on, gpu)) <= 0:
            needed = judge(gpu, _run(on, gpu)).needed_bytes
            return HowMany(parallel=parallel, gpus=count, needed_bytes=needed, tight_gpus=tight)
        if tight is None and _through(on, gpu):
            tight = count
    return HowMany(
        parallel=parallel,
        needed_bytes=judge(gpu, _run(on, gpu), explain=False).needed_bytes,
        note="no number that divides its heads is enough",
    )


def _fewest(asked: Asked, gpu: Gpu, parallel: str) -> HowMany:
    strategy: strategies.Strategy = strategies.find(parallel)
    if strategy.worlds is not None:
        return _among(asked, gpu, parallel, strategy.worlds(asked.spec))
    times = asked.given.dp_replicate or 1
    most = _MOST // times
    _on(asked, parallel, 2)  # refuses what the strategy can't have, on however few it would fit
    low, high = 0, 1
    before: tuple[int, int] | None = None
    while max(beyond := _beyond(_on(asked, parallel, high), gpu)) > 0:
        # Tensors at the peak are the most of several sums of what is divided and what is not, each a line
        # over 1 / GPUs: no number has less than the line through the last two points has at its end.
        hopeless = before is not None and (beyond == before or 2 * beyond[0] > max(before[0], 0))
        if 2 * high > most or hopeless:
            needed = judge(gpu, _run(_on(asked, parallel, most), gpu), explain=False).needed_bytes
            return HowMany(parallel=parallel, needed_bytes=needed, note=_none(asked, parallel))
        low, high, before = high, 2 * high, beyond if high > 1 else None
    while high - low > 1:
        middle = (low + high) // 2
        enough = max(_beyond(_on(asked, parallel, middle), gpu)) <= 0
        low, high = (low, middle) if enough else (middle, high)
    needed = judge(gpu, _run(_on(asked, parallel, high), gpu)).needed_bytes
    tight = _tight(asked, gpu, parallel, high)
    every = times if high > 1 else 1
    return HowMany(
        parallel=parallel,
        gpus=high * every,
        needed_bytes=needed,
        tight_gpus=None if tight is None else tight * every,
    )


def _tight(asked: Asked, gpu: Gpu, parallel: str, enough: int) -> int | None:
    """The fewest that a run gets through on, where that is fewer than are ``enough`` to call it *fits*."""

    def through(count: int) -> bool:
        return _through(_on(asked, parallel, count), gpu)

    low, high = 1, enough  # of one there is nothing to share, and it was looked at first
    step = 1
    while high - low > 1:  # most are not far away: 2 % of so many
        tried = max(high - step, low + 1)
        if through(tried):
            high, step = tried, 2 * step
        else:
            low, step = tried, max((high - tried) // 2, 1)
    return high if high < enough else None


def _through(asked: Asked, gpu: Gpu) -> bool:
    """Whether a run gets through."""
    return _tensors_beyond(asked, gpu) <= 0 and judge(gpu, _run(asked, gpu)).verdict != "does not fit"


def _none(asked: Asked, parallel: str) -> str:
    several = _on(asked, parallel, 2)
    loads = ": each loads all of the 4-bit weights first, onto the card (loading on the host is not planned)"
    why = loads if strategies.loads_whole(several.recipe) else ""
    return f"no number of them is enough{why}"


def _on(asked: Asked, parallel: str, count: int) -> Asked:
    """The question on so many, for each replica. Raises RecipeError."""
    every = count * (asked.given.dp_replicate or 1)
    changed: dict[str, object] = {"parallel": parallel, "gpus": every, "nodes": None}
    if count == 1:
        changed |= {"gpus": 1, **dict.fromkeys(OF_SEVERAL)}
    return asked.otherwise(Recipe(**{**asked.given.model_dump(exclude_unset=True), **changed}))


def _beyond(asked: Asked, gpu: Gpu) -> tuple[int, int]:
    """Bytes by which a run's tensors go beyond what fits, and what is reserved; of one whose tensors do,
    those twice, for the allocator's simulation takes far longer."""
    tensors = _tensors_beyond(asked, gpu)
    return tensors, tensors if tensors > 0 else excess(gpu, _run(asked, gpu))


def _tensors_beyond(asked: Asked, gpu: Gpu) -> int:
    card = written_for(asked.recipe, gpu)
    peak = replay(predicted.write(asked.spec, asked.recipe, card, lengths=asked.lengths)).allocated_bytes
    settings = parse_settings(asked.recipe.alloc_conf)
    return peak - allowed_bytes(gpu, card or Card(), settings, asked.recipe.gpus)


def _run(asked: Asked, gpu: Gpu) -> Run:
    return predicted.run(asked.spec, asked.recipe, written_for(asked.recipe, gpu), asked.lengths)
