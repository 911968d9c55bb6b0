"""Plans are made by many threads at once, as by a server: each gets what it would get alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from small_specs import SPECS

from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.predict.evaluation import write_evaluation
from memplan.predict.step import write_long_tape, write_tape
from memplan.shadow import tensor
from memplan.tape import Tape

THREADS = 8
RECIPES = (
    Recipe(trainer="peft", mode="full", seq_len=64),
    Recipe(trainer="peft", mode="lora", seq_len=32, attn="eager", optimizer="adafactor"),
    Recipe(trainer="peft", mode="qlora", seq_len=48, loss="chunked"),
    Recipe(trainer="peft", mode="qlora", seq_len=16, autocast=True, kbit_prep=False, batch_size=2),
)


def tapes(spec: ModelSpec, recipe: Recipe) -> tuple[Tape, ...]:
    recipe = recipe.resolved()
    return write_tape(spec, recipe), write_long_tape(spec, recipe), write_evaluation(spec, recipe, 3)


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that take turns often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty")
def test_every_thread_gets_its_own_tape_to_the_byte() -> None:
    cases = [(SPECS[name](3), recipe) for name in SPECS for recipe in RECIPES]
    alone = [tapes(*case) for case in cases]
    ready = Barrier(THREADS)

    def together(first: int) -> list[bool]:
        ready.wait()
        order = [(number + first * 5) % len(cases) for number in range(len(cases))]
        return [tapes(*cases[number]) == alone[number] for number in order]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(together, range(THREADS)))
    assert all(all(same) for same in found)


def test_nothing_is_recorded_where_nobody_plays() -> None:
    with pytest.raises(AssertionError, match="playing"):
        tensor.begin(None)
