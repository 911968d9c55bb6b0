"""Measurements that nobody made, for tests of what reads them; they are never written outside a test."""

from __future__ import annotations

from typing import Any

from small_specs import config

from memplan.asked.recipe import Recipe
from memplan.device.playback import simulate
from memplan.predict.step import write_tape
from memplan.tape import replay
from memplan.verify.job import card_of, spec_of
from memplan.verify.measurement import (
    Device,
    Evidence,
    Measurement,
    Model,
    Outcome,
    Run,
    Step,
    packed,
)
from memplan.verify.workspaces import without_workspaces

CARD = Device(kind="cuda", name="Card of a test", capability=(8, 0), total_bytes=1 << 33, driver="1.2")
HOST = Device(kind="cpu", name="x86", total_bytes=1 << 33)


def example(*, excess: int = 0, **changes: Any) -> Measurement:
    """A run that took what the plan says, and ``excess`` bytes more."""
    model = Model(name="small", config=config("llama", 2))
    recipe = Recipe(trainer="peft", seq_len=64).resolved()
    device = changes.get("device", CARD)
    tape = write_tape(spec_of(model), recipe, card=card_of(device), folded=False)
    if device.kind == "cpu":
        tape = without_workspaces(tape)
    tape.provenance = "measured"
    if device.kind == "cpu":
        peak = reserved = replay(tape).allocated_bytes + excess
    else:
        run = simulate(tape)
        peak, reserved = run.allocated + excess, run.in_step + excess
    values: dict[str, Any] = {
        "counted": "CUDA caching allocator",
        "date": "2026-11-25T12:00:00+00:00",
        "memplan_version": "0",
        "python": "3.12",
        "platform": "test",
        "libraries": {"torch": "2.13.0"},
        "device": CARD,
        "model": model,
        "recipe": recipe,
        "run": Run(),
        "outcome": Outcome(kind="trained"),
        "steps": tuple(
            Step(
                number=number,
                loss=5.0 - number,
                seconds=0.5,
                allocated_bytes=peak,
                resting_bytes=1 << 20,
                reserved_bytes=reserved,
                driver_bytes=peak + (700 << 20),
                alloc_retries=0,
                ooms=0,
            )
            for number in (1, 2, 3)
        ),
        "evidence": Evidence(
            first_loss=4.0,
            last_loss=2.0,
            trained_tensors=28,
            changed_tensors=28,
            frozen_tensors=10,
            frozen_changed=0,
            gradients_finite=True,
        ),
        "baseline_driver_bytes": 100 << 20,
        "tape_step": 3,
        "tape": packed(tape),
    }
    return Measurement(**{**values, **changes})
