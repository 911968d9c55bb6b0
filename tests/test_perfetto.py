"""The trace for Perfetto and Chrome: the Trace Event Format, and the tape's numbers in it."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest
from example_tapes import example_tape
from small_specs import SPECS

from memplan.asked.recipe import Recipe
from memplan.predict.step import write_tape
from memplan.report.perfetto import trace_json
from memplan.tape import Category, Tape, replay
from memplan.tape.curves import live_bytes

TAPES = {
    "example": example_tape(),
    "full": write_tape(
        SPECS["gemma2"](3), Recipe(trainer="peft", mode="full", seq_len=64).resolved(), folded=False
    ),
    "accumulating": write_tape(
        SPECS["llama"](3),
        Recipe(trainer="peft", mode="qlora", seq_len=64, gradient_accumulation_steps=2).resolved(),
        folded=False,
    ),
}


@pytest.fixture(params=sorted(TAPES))
def tape(request: pytest.FixtureRequest) -> Tape:
    return TAPES[request.param]


def events(tape: Tape, kind: str | None = None) -> list[dict[str, Any]]:
    document = json.loads(trace_json(tape, "a title"))
    found: list[dict[str, Any]] = document["traceEvents"]
    return [event for event in found if kind in (None, event["ph"])]


def test_every_event_has_what_the_format_asks_for(tape: Tape) -> None:
    needed = {"M": {"args"}, "X": {"ts", "dur"}, "C": {"ts", "args"}, "i": {"ts", "s"}}
    for event in events(tape):
        assert event.keys() >= {"ph", "name", "pid", "tid"} | needed[event["ph"]]
        assert isinstance(event["name"], str)
        assert event["name"]
        if event["ph"] != "M":
            assert type(event["ts"]) is int
            assert 0 <= event["ts"] < len(tape.events)
        if event["ph"] == "C":
            assert all(type(value) is int and value >= 0 for value in event["args"].values())
    assert {e["name"]: e["args"]["name"] for e in events(tape, "M")} == {
        "process_name": "a title",
        "thread_name": "step",
    }


def test_time_goes_forward(tape: Tape) -> None:
    times = [event["ts"] for event in events(tape) if event["ph"] != "M"]
    assert times == sorted(times)
    assert [event["ts"] for event in events(tape, "C") if event["name"] == "tensors"] == [
        *range(len(tape.events))
    ]


def test_slices_are_nested(tape: Tape) -> None:
    """Each begins and ends in the one around it, and an outer one comes first: what a thread's slices are."""
    stack: list[dict[str, Any]] = []
    depths = set()
    for event in events(tape, "X"):
        assert event["dur"] > 0
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            assert event["ts"] + event["dur"] <= stack[-1]["ts"] + stack[-1]["dur"]
        stack.append(event)
        depths.add(len(stack))
    assert depths == {1, 2, 3}  # phases, layers and other parts, modules
    outer = [event for event in events(tape, "X") if event["name"] in ("setup", "forward", "optimizer")]
    assert outer[0]["ts"] == 0
    assert outer[-1]["ts"] + outer[-1]["dur"] == len(tape.events)


def test_counters_are_the_live_bytes(tape: Tape) -> None:
    live = live_bytes(tape)
    last: dict[str, int] = defaultdict(int)
    for event in events(tape, "C"):
        last[event["name"]] = event["args"]["bytes"]
        if event["name"] == "tensors":
            assert event["args"]["bytes"] == live[event["ts"]]
            assert sum(size for name, size in last.items() if name != "tensors") == live[event["ts"]]
    assert len(last) <= len(Category) + 1


def test_the_peak_is_marked(tape: Tape) -> None:
    (mark,) = events(tape, "i")
    peak = replay(tape)
    assert mark["args"]["bytes"] == peak.allocated_bytes == live_bytes(tape)[mark["ts"]]
    assert mark["args"]["operation"] == peak.operation
    inside = [e["name"] for e in events(tape, "X") if e["ts"] <= mark["ts"] < e["ts"] + e["dur"]]
    assert inside[0] == peak.phase.value
    if peak.layer is not None:
        assert inside[1] == f"layer {peak.layer}"


def test_it_says_what_it_is(tape: Tape) -> None:
    about = json.loads(trace_json(tape, ""))["otherData"]
    assert about["provenance"] == "predicted"
    assert "not time" in about["unit"]
