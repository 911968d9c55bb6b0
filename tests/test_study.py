"""What is asked is understood once, and what follows from it is found once."""

from __future__ import annotations

import json
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

    def run(spec: Any, recipe: Recipe, card: Any = None, lengths: Any = None) -> Any:
        found[recipe, card] += 1
        return write(spec, recipe, card, lengths)

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


def test_a_notebook_shows_the_plan() -> None:
    shown = plan("llama-3.2-1b", Recipe(mode="lora"))._repr_html_()
    assert "llama-3.2-1b" in shown and "GiB at the peak" in shown and "RTX A6000" in shown
    named = plan("llama-3.2-1b", Recipe(mode="lora"), gpus=["t4"])
    evil = named.model_copy(update={"model": named.model.model_copy(update={"name": "<script>"})})
    assert "<script>" not in evil._repr_html_()


def test_accumulating_takes_more_where_weights_are_trained() -> None:
    alone = plan("llama-3.2-1b", Recipe(mode="full"))
    twice = plan("llama-3.2-1b", Recipe(mode="full", gradient_accumulation_steps=2))
    assert alone.accumulated_bytes == twice.peak.tensor_bytes
    assert twice.accumulated_bytes is None
    assert plan("llama-3.2-1b", Recipe(mode="lora", r=1, target_modules="q,v")).accumulated_bytes is None


def test_the_api_can_be_listed() -> None:
    import memplan

    assert set(memplan.__all__) <= set(dir(memplan))


def test_a_slip_that_cannot_be_had_is_not_told() -> None:
    told = plan("llama-3.2-1b", Recipe(mode="lora", adapter_dtype="bfloat16"), gpus=[])
    assert json.loads(told.model_dump_json())["slip"] is None
