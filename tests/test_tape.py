"""Replay of tapes, against the plainest way to do it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memplan.tape import Category, Part, Phase, Segment, Tape, replay, rounded, static_bytes, timeline

CATEGORIES = list(Category)


def write(script: list[tuple[str, int]]) -> Tape:
    """A tape of one segment a letter: ``("+", bytes)`` allocates, ``("-", n)`` frees the n-th alive."""
    tape = Tape()
    alive: list[int] = []
    tape.begin(Phase.FORWARD, "forward")
    for kind, number in script:
        if kind == "+":
            category = CATEGORIES[number % len(CATEGORIES)]
            alive.append(tape.alloc(number, f"op{number}", category))
        elif alive:
            tape.free(alive.pop(number % len(alive)))
    tape.finish()
    return tape


scripts = st.lists(st.tuples(st.sampled_from("++-"), st.integers(1, 10_000)), min_size=1, max_size=60)


def test_requests_are_charged_in_units_of_512_bytes() -> None:
    assert [rounded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]


@given(scripts.filter(lambda script: script[0][0] == "+"))
def test_the_peak_is_the_highest_sum_of_live_bytes(script: list[tuple[str, int]]) -> None:
    tape = write(script)
    live, highest = 0, 0
    for delta in tape.deltas:
        live += delta
        highest = max(highest, live)
    peak = replay(tape)
    assert peak.allocated_bytes == highest
    assert sum(peak.by_category.values()) == highest
    assert max(point.allocated_bytes for point in timeline(tape)) == highest


def test_what_is_left_of_setup_is_static() -> None:
    tape = Tape()
    tape.begin(Phase.SETUP, "weights", part=Part.LOADED)
    tape.alloc(1024, "weight", Category.WEIGHTS)
    tape.free(tape.alloc(4096, "scratch", Category.TEMPORARIES))
    tape.begin(Phase.FORWARD, "forward")
    tape.alloc(512, "activation", Category.ACTIVATIONS)
    tape.finish()
    static = static_bytes(tape)
    assert static[Category.WEIGHTS] == 1024
    assert static[Category.TEMPORARIES] == static[Category.ACTIVATIONS] == 0


def layers(repeat: int, grow: int, inner: int, *, descending: bool) -> Tape:
    """A tape in which one layer allocates ``grow`` bytes for good and ``inner`` for a moment."""
    tape = Tape()
    tape.begin(Phase.SETUP, "start", part=Part.RESTING)
    tape.alloc(512, "start", Category.WEIGHTS)
    tape.begin(Phase.FORWARD, "layer", repeat if descending else 0)
    tape.alloc(grow, "keep", Category.ACTIVATIONS)
    tape.free(tape.alloc(inner, "inner", Category.TEMPORARIES))
    tape.begin(Phase.FORWARD, "after")
    tape.alloc(512, "after", Category.WEIGHTS)
    tape.finish()
    segment = tape.segments[1]
    segment.repeat, segment.marks, segment.direction = repeat, (segment.start,), -1 if descending else 1
    return tape


@given(st.integers(1, 90), st.integers(1, 9000), st.integers(1, 9000), st.booleans())
def test_a_folded_tape_replays_like_the_unfolded_one(
    repeat: int, grow: int, inner: int, descending: bool
) -> None:
    tape = layers(repeat, grow, inner, descending=descending)
    peak = replay(tape)
    points = list(timeline(tape))
    assert peak.allocated_bytes == max(point.allocated_bytes for point in points)
    at = next(point for point in points if point.allocated_bytes == peak.allocated_bytes)
    assert (at.layer, at.operation, at.by_category) == (peak.layer, peak.operation, peak.by_category)
    assert len(points) == 2 + 3 * repeat


def test_a_layer_is_named_inside_a_period() -> None:
    segment = Segment(Phase.BACKWARD, "backward", 11, 0, 6, repeat=2, marks=(0, 3), direction=-1)
    assert [segment.layer_at(position, turn) for turn in (0, 1) for position in (0, 2, 3, 5)] == [
        11, 11, 10, 10, 9, 9, 8, 8,
    ]  # fmt: skip
