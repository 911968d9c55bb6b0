"""The step over time: no peak is lost on the way to a picture, and the picture in characters."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from example_tapes import MIB, example_tape
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_specs import SPECS

from memplan.asked.recipe import Recipe
from memplan.predict.step import write_tape
from memplan.report.timeline import show_timeline
from memplan.tape import Category, Phase, Tape, replay, static_bytes
from memplan.tape.curves import Held, live_bytes, moments, phases, resident, shown, step_start


def drawn(
    tape: Tape, width: int = 80, encoding: str = "utf-8", micro_steps: int = 1, **settings: object
) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width, highlight=False, markup=False, **settings)  # type: ignore[arg-type]
    show_timeline(tape, console, Recipe(trainer="peft", gradient_accumulation_steps=micro_steps))
    file.flush()
    return raw.getvalue().decode(encoding)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300), st.integers(1, 50), st.data())
def test_no_extreme_is_lost(live: list[int], columns: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(live) - 1))
    chosen = [event for events in shown(live, start, columns) for event in events]
    assert len(shown(live, start, columns)) == min(columns, len(live) - start)
    assert chosen == sorted(set(chosen))
    assert all(start <= event < len(live) for event in chosen)
    assert max(live[event] for event in chosen) == max(live[start:])
    assert min(live[event] for event in chosen) == min(live[start:])
    assert live.index(max(live[start:]), start) in chosen  # the first of equal peaks, as replay has it


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_moments_agree_with_the_replay(mode: str) -> None:
    tape = write_tape(
        SPECS["llama"](4), Recipe(trainer="peft", mode=mode, seq_len=64).resolved(), folded=False
    )
    live = live_bytes(tape)
    found = list(moments(tape, range(step_start(tape), len(live)), largest=3))
    peak, highest = replay(tape), max(found, key=lambda moment: moment.allocated_bytes)
    assert [moment.allocated_bytes for moment in found] == live[step_start(tape) :]
    assert highest.by_category == peak.by_category
    assert (highest.phase, highest.layer, highest.operation, highest.module) == (
        peak.phase,
        peak.layer,
        peak.operation,
        peak.module,
    )
    before = static_bytes(tape)
    assert found[0].by_category != before  # the first event of the step has happened
    assert live[step_start(tape) - 1] == sum(before.values())


def test_the_largest_tensors_of_the_step_are_told() -> None:
    tape = example_tape()
    head = next(span for span in phases(tape) if span.phase is Phase.BACKWARD).start - 1
    (moment,) = moments(tape, [head], largest=5)
    assert moment.held == (
        Held("lm_head", "mm", Category.LOGITS_AND_LOSS, 200 * MIB, 2),
        Held("mlp", "add", Category.ACTIVATIONS, 64 * MIB, 6),  # one of each layer
        Held("model.embed_tokens", "embedding", Category.ACTIVATIONS, 64 * MIB, 1),
    )
    assert sum(held.nbytes for held in moment.held) + sum(static_bytes(tape).values()) == (
        moment.allocated_bytes
    )
    (after,) = moments(tape, [len(tape.events) - 1], largest=5)
    assert after.held == ()


def test_what_is_there_before_the_step_is_told_apart() -> None:
    assert resident(example_tape(layers=4), 2) == (
        Held("model.embed_tokens", "parameter", Category.WEIGHTS, 512 * MIB, 1),
        Held("mlp", "parameter", Category.WEIGHTS, 128 * MIB, 4),
    )


def test_layers_of_a_trace_are_counted_together() -> None:
    tape = Tape()
    tape.begin(Phase.FORWARD, "layer", 0)
    for layer in (0, 1):
        tape.module = f"model.layers.{layer}.mlp.gate_proj"
        tape.alloc(1024, "mm", Category.ACTIVATIONS)
    tape.finish()
    (moment,) = moments(tape, [1], largest=4)
    assert moment.held == (Held("model.layers.*.mlp.gate_proj", "mm", Category.ACTIVATIONS, 1024, 2),)


def test_phases_follow_one_another() -> None:
    recipe = Recipe(trainer="peft", mode="lora", seq_len=64, gradient_accumulation_steps=4).resolved()
    tape = write_tape(SPECS["llama"](2), recipe, folded=False)
    found = phases(tape)
    names = ["setup", "forward", "backward", "forward", "backward", "optimizer"]
    assert [span.name for span in found] == names
    assert [span.start for span in found[1:]] == [span.stop for span in found[:-1]]
    assert (found[0].start, found[-1].stop) == (0, len(tape.events))


def test_a_folded_tape_is_not_drawn() -> None:
    tape = write_tape(SPECS["llama"](12), Recipe(trainer="peft", mode="qlora").resolved())
    for function in (live_bytes, phases, lambda tape: list(moments(tape, [0]))):
        with pytest.raises(ValueError, match="folded"):
            function(tape)


def test_the_picture(golden: Callable[[str, str], None]) -> None:
    golden("timeline.txt", drawn(example_tape()))


def test_the_picture_in_ascii(golden: Callable[[str, str], None]) -> None:
    """And with weights so small that the axis begins at 0."""
    golden("timeline-ascii.txt", drawn(example_tape(layers=40, weights=512 * MIB), encoding="ascii"))


@pytest.mark.parametrize("layers", [1, 3, 50])
@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_nothing_sticks_out(layers: int, width: int) -> None:
    lines = drawn(example_tape(layers=layers), width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    assert sum("peak" in line for line in lines) == 1


def test_colour_changes_no_character() -> None:
    import re

    plain = drawn(example_tape())
    coloured = drawn(example_tape(), force_terminal=True, color_system="standard")
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_the_pointer_stands_over_the_highest_column() -> None:
    for layers in (1, 4, 30):
        lines = drawn(example_tape(layers=layers)).splitlines()
        pointer = next(line for line in lines if "peak" in line)
        top = lines[lines.index(pointer) + 1]
        assert top[pointer.index("▼")] not in " │"
        assert set(top[13 : pointer.index("▼")]) <= {" "}  # the first of the highest


def test_micro_steps_that_are_left_out_are_told() -> None:
    assert "micro-steps" not in drawn(example_tape(), micro_steps=2)
    text = " ".join(drawn(example_tape(), micro_steps=8).split())
    assert "Two of 8 micro-steps are shown: the others are like the second." in text
    traced = example_tape()
    traced.provenance = "traced"  # a trace runs them all
    assert "micro-steps" not in drawn(traced, micro_steps=8)
