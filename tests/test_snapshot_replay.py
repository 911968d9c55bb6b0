"""Snapshots written from the simulated allocator, and histories played on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_specs import SPECS

from memplan.asked.alloc_conf import parse_settings
from memplan.asked.recipe import Recipe
from memplan.device.allocator import MIB, Allocator, Block
from memplan.errors import MemplanError
from memplan.planning import predicted
from memplan.predict.parameters import resolve_recipe
from memplan.snapshot import Action, Snapshot, load_snapshot, save_snapshot
from memplan.snapshot.layout import snapshot_of
from memplan.snapshot.records import Block as RecordedBlock
from memplan.snapshot.records import BlockState, Segment, TraceEntry
from memplan.snapshot.replay import replay
from memplan.snapshot.simulated import placement


def recorded(program: list[int]) -> Snapshot:
    """What PyTorch would have recorded of a program (sizes to allocate, negative: which live block to free,
    0: empty the cache), by an allocator that writes its history down."""
    trace: list[TraceEntry] = []

    def segment(address: int, change: int) -> None:
        action = Action.SEGMENT_ALLOC if change > 0 else Action.SEGMENT_FREE
        trace.append(TraceEntry(action, address, abs(change)))

    allocator = Allocator(on_segment=segment)
    live: list[tuple[Block, int]] = []
    for step in program:
        if step > 0:
            block = allocator.malloc(step)
            trace.append(TraceEntry(Action.ALLOC, block.address, step))
            live.append((block, step))
        elif step < 0 and live:
            block, size = live.pop(step % len(live))
            trace.append(TraceEntry(Action.FREE_REQUESTED, block.address, size))
            trace.append(TraceEntry(Action.FREE_COMPLETED, block.address, size))
            allocator.free(block)
        elif step == 0:
            allocator.empty_cache()
    segments = []
    for view in allocator.segments():
        blocks, at = [], view.address
        for size, used in view.blocks:
            state = BlockState.ALLOCATED if used else BlockState.INACTIVE
            blocks.append(RecordedBlock(at, size, size if used else 0, state))
            at += size
        live_bytes = sum(size for size, used in view.blocks if used)
        kind = "small" if view.small else "large"
        segments.append(
            Segment(
                view.address, view.size, live_bytes, live_bytes, live_bytes, 0, kind, False, tuple(blocks)
            )
        )
    return Snapshot(0, tuple(segments), tuple(trace))


PROGRAM = [3 * MIB, 30 * MIB, 512, -1, 20 * MIB, -2, 0, 40 * MIB]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(1, 3 * MIB), st.integers(MIB, 100 * MIB), st.integers(-40, 0)),
        min_size=1,
        max_size=80,
    )
)
def test_a_whole_history_ends_in_its_segments(program: list[int]) -> None:
    found = replay(recorded(program))
    assert found.difference is None
    assert found.reserved_bytes == found.recorded_reserved_bytes


def test_it_survives_the_file(tmp_path: Path) -> None:
    save_snapshot(recorded(PROGRAM), tmp_path / "s.pickle")
    found = replay(load_snapshot(tmp_path / "s.pickle"))
    assert (found.difference, found.requests) == (None, 5)


def test_another_block_is_noticed() -> None:
    snapshot = recorded(PROGRAM)
    at = next(
        i for i, entry in enumerate(snapshot.trace) if entry.action is Action.ALLOC and entry.size == 20 * MIB
    )
    moved = list(snapshot.trace)
    moved[at] = dataclasses.replace(moved[at], addr=moved[at].addr + 512)
    found = replay(dataclasses.replace(snapshot, trace=tuple(moved)))
    assert found.difference is not None
    assert "got the block" in found.difference


def test_other_settings_are_noticed() -> None:
    found = replay(recorded(PROGRAM), parse_settings("large_segment_size_mb:40"))
    assert found.difference is not None
    assert "segment of" in found.difference


def test_a_history_without_its_beginning_is_refused() -> None:
    snapshot = recorded(PROGRAM)
    lost = next(
        i for i, entry in enumerate(snapshot.trace) if (entry.action, entry.size) == (Action.ALLOC, 512)
    )
    late = dataclasses.replace(snapshot, trace=snapshot.trace[:lost] + snapshot.trace[lost + 1 :])
    with pytest.raises(MemplanError, match="lost its beginning"):
        replay(late)


@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
def test_a_step_lies_as_the_allocator_lays_it(conf: str) -> None:
    spec = SPECS["llama"](4)
    run = predicted.run(spec, resolve_recipe(spec, Recipe(trainer="peft", seq_len=700, alloc_conf=conf)))
    snapshot = snapshot_of(run.tape, placement(run))
    assert snapshot.reserved_bytes == run.free.after_step
    rest = sum(
        block.size for segment in snapshot.segments for block in segment.blocks if block.requested_size
    )
    assert rest == snapshot.allocated_bytes
    assert any(segment.is_expandable for segment in snapshot.segments) is bool(conf)
