"""The fewest GPUs of a kind that a run fits on, by each way of sharing a step."""

from __future__ import annotations

from memplan import rooms, strategies
from memplan.asked.gpus import Gpu
from memplan.device.fit import Run, excess, judge
from memplan.errors import RecipeError
from memplan.planning import predicted
from memplan.planning.cards import written_for
from memplan.planning.records import HowMany
from memplan.planning.study import Asked

_MOST = 4096  # GPUs that a recipe may have


def how_many(asked: Asked, gpu: Gpu) -> tuple[HowMany, ...]:
    """The fewest that have 2 % of what is reserved to spare, and what each of them needs; the fewest first.
    Of a strategy that does not divide what is too large there is no number."""
    found = (_of(asked, gpu, parallel) for parallel in rooms.names("strategies"))
    return tuple(sorted(found, key=lambda one: one.gpus or _MOST + 1))


def _of(asked: Asked, gpu: Gpu, parallel: str) -> HowMany:
    try:
        return _fewest(asked, gpu, parallel)
    except RecipeError as error:
        return HowMany(parallel=parallel, note=str(error))


def _fewest(asked: Asked, gpu: Gpu, parallel: str) -> HowMany:
    def fits(count: int) -> bool:
        return excess(gpu, _run(asked, gpu, parallel, count)) <= 0

    low, high, before = 0, 1, -1
    while not fits(high):
        reserved = _run(asked, gpu, parallel, high).free.reserved
        if high == _MOST or reserved == before:
            needed = judge(gpu, _run(asked, gpu, parallel, high), explain=False).needed_bytes
            return HowMany(parallel=parallel, needed_bytes=needed, note=_none(asked, parallel))
        low, high, before = high, 2 * high, reserved if high > 1 else -1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    needed = judge(gpu, _run(asked, gpu, parallel, high)).needed_bytes
    return HowMany(parallel=parallel, gpus=high, needed_bytes=needed)


def _none(asked: Asked, parallel: str) -> str:
    several = asked.otherwise(asked.given.model_copy(update={"parallel": parallel, "gpus": 2}))
    why = ": each loads all of the 4-bit weights first" if strategies.loads_whole(several.recipe) else ""
    return f"no number of them is enough{why}"


def _run(asked: Asked, gpu: Gpu, parallel: str, count: int) -> Run:
    spread = {"parallel": parallel if count > 1 else None, "gpus": count}
    again = asked.otherwise(asked.given.model_copy(update=spread))
    return predicted.run(again.spec, again.recipe, written_for(again.recipe, gpu), again.lengths)
