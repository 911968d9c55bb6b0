"""A tape as a snapshot: nothing overlaps, nothing is lost, and PyTorch's own tools open it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_specs import SPECS

from memplan.asked.recipe import Recipe
from memplan.predict.step import write_tape
from memplan.snapshot import Action, BlockState, Frame, Snapshot, TraceEntry, load_snapshot, save_snapshot
from memplan.snapshot.layout import Placed, first_fit, snapshot_of
from memplan.tape import Category, Part, Phase, Tape, replay

MIB = 1 << 20


def toy() -> Tape:
    """Weights stay; an activation lives into backward, where a temporary takes the place of another."""
    tape = Tape()
    tape.begin(Phase.SETUP, "weights", part=Part.LOADED)
    tape.alloc(4 * MIB, "weight", Category.WEIGHTS)
    tape.begin(Phase.SETUP, "nothing", part=Part.RESTING)
    tape.begin(Phase.FORWARD, "layer", 0)
    tape.module = "mlp"
    kept = tape.alloc(3 * MIB, "mm", Category.ACTIVATIONS)
    tape.free(tape.alloc(2 * MIB, "add", Category.TEMPORARIES))
    tape.alloc(0, "empty", Category.TEMPORARIES)
    tape.begin(Phase.BACKWARD, "backward", 0)
    later = tape.alloc(MIB, "mul", Category.TEMPORARIES)
    tape.free(kept)
    tape.free(later)
    tape.finish()
    return tape


def step() -> Tape:
    return write_tape(
        SPECS["llama"](3), Recipe(trainer="peft", mode="qlora", seq_len=64).resolved(), folded=False
    )


def test_the_first_gap_that_is_large_enough() -> None:
    base = first_fit(toy())[0].addr
    assert [(p.action.value, p.addr - base, p.size, p.storage) for p in first_fit(toy())] == [
        ("segment_alloc", 0, 10 * MIB, -1),  # 4 + 3 + 2, in pages of 2 MiB
        ("alloc", 0, 4 * MIB, 0),
        ("alloc", 4 * MIB, 3 * MIB, 1),
        ("alloc", 7 * MIB, 2 * MIB, 2),
        ("free_completed", 7 * MIB, 2 * MIB, 2),
        ("alloc", 7 * MIB, MIB, 4),
        ("free_completed", 4 * MIB, 3 * MIB, 1),
        ("free_completed", 7 * MIB, MIB, 4),
    ]


@pytest.mark.parametrize("tape", [toy(), step()], ids=["toy", "step"])
def test_no_two_live_tensors_overlap(tape: Tape) -> None:
    segment, *placed = first_fit(tape)
    end = segment.addr + segment.size
    live: dict[int, int] = {}
    most = 0
    for one in placed:
        if one.action is Action.FREE_COMPLETED:
            assert live.pop(one.addr) == one.addr + one.size
        else:
            assert all(one.addr + one.size <= start or stop <= one.addr for start, stop in live.items())
            assert segment.addr <= one.addr
            assert one.addr + one.size <= end
            live[one.addr] = one.addr + one.size
            most = max(most, sum(stop - start for start, stop in live.items()))
    assert most == replay(tape).allocated_bytes


def test_each_tensor_says_what_it_is() -> None:
    snapshot = snapshot_of(toy())
    _, weight, activation, *_, last = snapshot.trace
    assert activation.frames == (
        Frame("operation", 0, "mm"),
        Frame("module", 0, "mlp"),
        Frame("layer", 0, "0"),
        Frame("phase", 0, "forward (layer)"),
        Frame("category", 0, "activations"),
        Frame("memplan", 0, "predicted, not recorded by PyTorch"),
    )
    assert weight.frames[3] == Frame("phase", 0, "setup (weights)")
    assert activation.category == "activations"
    assert last.action is Action.SNAPSHOT
    assert last.category == "unknown"  # which the viewer needs
    assert snapshot.origin == "predicted by memplan, not recorded by PyTorch"


def test_what_is_left_lies_in_blocks() -> None:
    (segment,) = snapshot_of(toy()).segments
    assert [(block.size, block.state) for block in segment.blocks] == [
        (4 * MIB, BlockState.ALLOCATED),
        (6 * MIB, BlockState.INACTIVE),
    ]
    assert (segment.total_size, segment.allocated_size, segment.requested_size) == (
        10 * MIB,
        4 * MIB,
        4 * MIB,
    )


def test_an_allocators_own_placement_is_taken_as_it_is() -> None:
    """Two pools, a segment given back, a block larger than its tensor, an expandable segment cut in two."""
    small, large, spread = 1 << 30, 1 << 31, 1 << 32
    placement = [
        Placed(Action.SEGMENT_ALLOC, small, 2 * MIB, pool="small"),
        Placed(Action.SEGMENT_ALLOC, large, 20 * MIB),
        Placed(Action.ALLOC, large, 5 * MIB, 0),
        Placed(Action.ALLOC, large + 5 * MIB, 3 * MIB, 1),
        Placed(Action.SEGMENT_MAP, spread, 2 * MIB),
        Placed(Action.SEGMENT_MAP, spread + 4 * MIB, 2 * MIB),
        Placed(Action.SEGMENT_MAP, spread + 2 * MIB, 2 * MIB),
        Placed(Action.ALLOC, spread, 2 * MIB, 2),
        Placed(Action.FREE_COMPLETED, spread, 2 * MIB, 2),
        Placed(Action.ALLOC, spread + 4 * MIB, MIB, 4),
        Placed(Action.SEGMENT_UNMAP, spread + 2 * MIB, 2 * MIB),
        Placed(Action.FREE_COMPLETED, large + 5 * MIB, 3 * MIB, 1),
        Placed(Action.SEGMENT_FREE, small, 2 * MIB, pool="small"),
        Placed(Action.OOM, 3 * MIB, 40 * MIB),
    ]
    snapshot = snapshot_of(toy(), placement, {"max_split_size": -1})
    assert [
        (segment.address, segment.total_size, segment.segment_type, segment.is_expandable)
        for segment in snapshot.segments
    ] == [
        (large, 20 * MIB, "large", False),
        (spread, 2 * MIB, "large", True),
        (spread + 4 * MIB, 2 * MIB, "large", True),
    ]
    block, rest = snapshot.segments[0].blocks
    assert (block.size, block.requested_size, rest.size) == (5 * MIB, 4 * MIB, 15 * MIB)
    assert [block.size for block in snapshot.segments[2].blocks] == [MIB, MIB]
    assert snapshot.settings == {"max_split_size": -1}
    assert snapshot.trace[-2] == TraceEntry(Action.OOM, 0, 40 * MIB, device_free=3 * MIB)
    pools = snapshot_of(toy(), placement[:1]).segments
    assert [segment.segment_type for segment in pools] == ["small"]


def test_a_folded_tape_cannot_be_laid_out() -> None:
    tape = write_tape(SPECS["llama"](12), Recipe(trainer="peft", mode="qlora").resolved())
    with pytest.raises(ValueError, match="folded"):
        snapshot_of(tape)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshot, Tape]:
    path = tmp_path_factory.mktemp("snapshot") / "step.pickle"
    tape = step()
    snapshot = snapshot_of(tape)
    save_snapshot(snapshot, path)
    return path, snapshot, tape


def test_it_is_read_back(dumped: tuple[Path, Snapshot, Tape]) -> None:
    path, snapshot, tape = dumped
    assert load_snapshot(path) == snapshot
    live = peak = 0
    for entry in load_snapshot(path).trace:
        if entry.action is Action.ALLOC:
            live += entry.size
        elif entry.action is Action.FREE_COMPLETED:
            live -= entry.size
        peak = max(peak, live)
    assert peak == replay(tape).allocated_bytes
    assert live == sum(tape.deltas) == snapshot.allocated_bytes


def test_pytorchs_own_tools_open_it(dumped: tuple[Path, Snapshot, Tape], tmp_path: Path) -> None:
    """python -m torch.cuda._memory_viz, as a user would."""
    pytest.importorskip("torch")
    path, snapshot, _ = dumped

    def viz(*arguments: str) -> str:
        command = [sys.executable, "-W", "ignore", "-m", "torch.cuda._memory_viz", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    stats = viz("stats", str(path))
    assert "segments: 1\n" in stats
    assert f"total_reserved: {snapshot.reserved_bytes / MIB:.1f}MiB" in stats
    assert f"total_allocated: {snapshot.allocated_bytes / MIB:.1f}MiB" in stats
    assert f"{len(snapshot.trace)} entries" in viz("trace", str(path))
    for kind, title in (
        ("trace_plot", "Active Memory Timeline"),
        ("segment_plot", "Allocator State History"),
    ):
        page = tmp_path / f"{kind}.html"
        viz(kind, str(path), "-o", str(page))
        assert title in page.read_text(encoding="utf-8")


def test_pytorchs_flamegraphs_take_it(dumped: tuple[Path, Snapshot, Tape]) -> None:
    pytest.importorskip("torch")
    import pickle

    from torch.cuda import _memory_viz

    path, snapshot, _ = dumped
    with path.open("rb") as file:
        document = pickle.load(file)
    lines = _memory_viz.memory(document, format_flamegraph=str).splitlines()
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == snapshot.reserved_bytes
    assert any("category:0:weights;phase:0:setup (weights)" in line for line in lines)
    kept = _memory_viz.filter_alloc_free_pairs(document)["device_traces"][0]
    assert sum(1 for entry in kept if entry["action"] == "alloc") == sum(
        1 for segment in snapshot.segments for block in segment.blocks if block.state is BlockState.ALLOCATED
    )
