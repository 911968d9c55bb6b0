"""What is asked is understood once, and what follows from it is found once."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from small_specs import SPECS

from memplan import Recipe, plan
from memplan.device import playback
from memplan.planning import predicted
from memplan.planning.advise import advise
from memplan.planning.plan import Plan, plan_of
from memplan.planning.study import Prediction, ask


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often a run of each recipe was written, and how many were simulated."""
    found: Counter[Any] = Counter()
    write, simulation = predicted.run, playback.Simulation

    def run(spec: Any, recipe: Recipe, card: Any = None) -> Any:
        found[recipe, card] += 1
        return write(spec, recipe, card)

    def simulated(*arguments: Any, **options: Any) -> Any:
        found["simulated"] += 1
        return simulation(*arguments, **options)

    monkeypatch.setattr(predicted, "run", run)
    monkeypatch.setattr(playback, "Simulation", simulated)
    return found


def test_nothing_is_simulated_before_somebody_asks(counted: Counter[Any]) -> None:
    answer = plan(SPECS["llama"](2), Recipe(trainer="peft", seq_len=16))
    assert answer.peak.tensor_bytes > 0
    assert not counted


def test_every_answer_is_found_once(counted: Counter[Any]) -> None:
    study = Prediction(ask(SPECS["llama"](2), Recipe(trainer="peft", seq_len=16), ["a6000", "a100"]))
    answer = plan_of(study).telling(evaluation=study.judged_evaluation)
    for _ in range(2):
        assert answer.peak.allocated_bytes == answer.allocator.allocated_bytes
        assert len(answer.fits) == len(answer.evaluation.fits) == 2  # type: ignore[union-attr]
        assert list(answer.glances())
        assert answer.model_dump_json()
    assert counted == {(study.recipe, None): 1, "simulated": 1}
    advise(study, "a6000")
    assert counted[study.recipe, None] == 1


@pytest.mark.parametrize("before", [lambda answer: None, lambda answer: answer.fits])
def test_a_plan_can_be_sent_to_another_process(before: Callable[[Plan], object]) -> None:
    answer = plan(SPECS["llama"](2), Recipe(trainer="peft", seq_len=16), gpus=["a6000"])
    before(answer)
    sent: Plan = pickle.loads(pickle.dumps(answer))
    assert sent.model_dump_json() == answer.model_dump_json()
    assert sent.study is not answer.study
