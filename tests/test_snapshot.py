"""PyTorch's memory snapshots: read back as written, opened by PyTorch's own tools, refused if not sound."""

from __future__ import annotations

import os
import pickle
import re
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memplan.errors import MemplanError
from memplan.snapshot import (
    Action,
    Block,
    BlockState,
    Frame,
    Segment,
    Snapshot,
    TraceEntry,
    load_snapshot,
    save_snapshot,
)

MIB = 1 << 20
BASE = 0x7F12_A400_0000

STACK = (Frame("model.py", 12, "forward"), Frame("train.py", 40, "<module>"))


def example() -> Snapshot:
    """A segment of 2 MiB with a live tensor, one whose release is pending, and room; 20 MiB came and went."""
    blocks = (
        Block(BASE, 1024, 1000, BlockState.ALLOCATED, STACK),
        Block(BASE + 1024, 512, 512, BlockState.PENDING_FREE),
        Block(BASE + 1536, 2 * MIB - 1536, 0, BlockState.INACTIVE),
    )
    other = BASE + 64 * MIB
    return Snapshot(
        device=1,
        segments=(Segment(BASE, 2 * MIB, 1024, 1536, 1512, 0, "small", False, blocks),),
        trace=(
            TraceEntry(Action.SEGMENT_ALLOC, BASE, 2 * MIB, time_us=1),
            TraceEntry(Action.ALLOC, BASE, 1000, frames=STACK, time_us=2, category="weights"),
            TraceEntry(Action.ALLOC, BASE + 1024, 512, stream=94, time_us=3),
            TraceEntry(Action.SEGMENT_ALLOC, other, 20 * MIB),
            TraceEntry(Action.ALLOC, other, 15 * MIB, frames=STACK),
            TraceEntry(Action.FREE_REQUESTED, other, 15 * MIB),
            TraceEntry(Action.FREE_COMPLETED, other, 15 * MIB),
            TraceEntry(Action.SEGMENT_FREE, other, 20 * MIB),
            TraceEntry(Action.FREE_REQUESTED, BASE + 1024, 512, stream=94),
            TraceEntry(Action.OOM, 0, 1 << 40, device_free=7 * MIB),
            TraceEntry(Action.SNAPSHOT, 0, 0, pool_id=(0, 1)),
        ),
        settings={"PYTORCH_CUDA_ALLOC_CONF": "", "roundup_power2_divisions": {"1": 0}, "max_split_size": -1},
        origin="made up by a test",
    )


def document(**changes: Any) -> dict[str, Any]:
    """The smallest file that ``_dump_snapshot`` could write, with changes."""
    block = {"address": BASE, "size": 512, "requested_size": 4, "state": "active_allocated", "frames": []}
    segment = {
        "device": 0,
        "address": BASE,
        "total_size": 512,
        "allocated_size": 512,
        "active_size": 512,
        "requested_size": 4,
        "stream": 0,
        "segment_type": "small",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": [block],
    }
    entry = {"action": "alloc", "addr": BASE, "size": 4, "stream": 0, "time_us": 5, "compile_context": "N/A"}
    parts = {"block": block, "segment": segment, "entry": entry}
    for name, change in changes.items():
        if name in parts:
            for key, value in change.items():
                if value is ...:
                    del parts[name][key]
                else:
                    parts[name][key] = value
    whole = {
        "segments": [segment],
        "device_traces": [[entry]],
        "allocator_settings": {},
        "external_annotations": [],
    }
    return whole | {name: change for name, change in changes.items() if name not in parts}


def dumped(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.pickle"
    save_snapshot(example(), path)
    assert load_snapshot(path, device=1) == example()
    assert load_snapshot(path, device=1).reserved_bytes == 2 * MIB
    assert load_snapshot(path, device=1).allocated_bytes == 1024
    assert [other.name for other in tmp_path.iterdir()] == ["a.pickle"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_may_write_is_read(protocol: int, tmp_path: Path) -> None:
    snapshot = load_snapshot(dumped(tmp_path / "a.pickle", document(), protocol))
    assert snapshot.trace == (TraceEntry(Action.ALLOC, BASE, 4, time_us=5),)
    assert snapshot.segments[0].blocks == (Block(BASE, 512, 4, BlockState.ALLOCATED),)
    assert snapshot.origin == ""


def test_what_is_written_uses_only_what_the_viewer_unpickles(tmp_path: Path) -> None:
    """The opcodes of ``unpickle`` in torch/utils/viz/MemoryViz.js; what it lacks is an error there."""
    from pickletools import genops

    save_snapshot(example(), tmp_path / "a.pickle")
    used = {opcode.name for opcode, _, _ in genops((tmp_path / "a.pickle").read_bytes())}
    known = (
        "PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET BINPUT LONG_BINPUT NONE NEWTRUE NEWFALSE "
        "BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE EMPTY_LIST APPEND APPENDS LIST "
        "EMPTY_DICT SETITEM SETITEMS DICT EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE"
    )
    assert used <= set(known.split())


def test_blocks_that_await_their_release_have_two_names(tmp_path: Path) -> None:
    """torch/cuda/memory.py documents one, torch/csrc/cuda/Module.cpp writes the other."""
    for state in ("active_awaiting_free", "active_pending_free"):
        content = document(block={"state": state}, segment={"active_size": ...})
        assert load_snapshot(dumped(tmp_path / state, content)).segments[0].active_size == 512


def test_a_device_without_anything_is_said_to_be(tmp_path: Path) -> None:
    save_snapshot(example(), tmp_path / "a.pickle")
    with pytest.raises(MemplanError, match=r"has nothing of device 0; it has 1$"):
        load_snapshot(tmp_path / "a.pickle")
    empty = dumped(tmp_path / "b.pickle", document(segments=[], device_traces=[[], []]))
    assert load_snapshot(empty) == Snapshot(0, (), ())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"entry": {"action": "teleport"}}, "action is 'teleport', which is not known"),
        ({"entry": {"addr": ...}}, "addr is missing"),
        ({"entry": {"size": -4}}, "size is -4"),
        ({"entry": {"size": 4.5}}, "size is 4.5"),
        ({"entry": {"stream": True}}, "stream is true"),
        ({"entry": {"frames": [1]}}, "frames: not all are dictionaries"),
        ({"entry": {"frames": [{"filename": "a", "line": 1}]}}, "name is missing"),
        ({"entry": {"pool_id": (1,)}}, "pool_id is a tuple"),
        ({"entry": {"action": "oom"}}, "device_free is missing"),
        ({"block": {"state": "asleep"}}, "state is 'asleep', which is not known"),
        ({"block": {"address": BASE + 1}}, "the ones before it end at"),
        ({"block": {"size": 1024}}, "a segment of 512 bytes has 1024 bytes in its blocks"),
        ({"segment": {"total_size": "512"}}, "total_size is '512'"),
        ({"segment": {"device": None}}, "device is null"),
        ({"segments": "none"}, "segments: no list"),
        ({"segments": [[]]}, "segments: not all are dictionaries"),
        ({"device_traces": {}}, "device_traces: no list"),
        ({"device_traces": [{"a": 1}]}, "the trace: no list"),
        ({"allocator_settings": []}, "no settings by name"),
        ({"allocator_settings": {"a": b"b"}}, "the setting 'a' is no plain value"),
        ({"memplan": 1}, "memplan is 1"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = dumped(tmp_path / "a.pickle", document(**change))
    with pytest.raises(MemplanError, match="is a damaged snapshot, or one of another version") as error:
        load_snapshot(path)
    assert complaint in str(error.value)


class Attack:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, ("stolen",)


@pytest.mark.parametrize(
    "content",
    [Attack(), document(entry={"addr": Attack()}), [document(), {1, 2}, Attack()], os.getcwd, Path()],
    ids=["call", "inside", "late", "function", "class"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_file_is_run(
    content: Any, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MemplanError, match=r"holds more than plain values .* it was not run"):
        load_snapshot(dumped(tmp_path / "a.pickle", content, protocol))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pickle"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is no pickle"),
        (b"{}", "is no pickle"),
        (b"PK\x03\x04 what torch.save writes", "is no pickle"),
        (b"\x1f\x8b\x08", "gunzip"),
        (b"\x80", "cut short or damaged"),
        (b"\x80\x04Q.", "cut short or damaged"),
        (b"\x80\x04h\x05.", "cut short or damaged"),
        (b"\x80\x09N.", "cut short or damaged"),
        (b"\x80\x04]\x94\x8d" + b"\xff" * 8, "cut short or damaged"),
        (b"\x80\x04\x8c\x01aQ.", "holds more than plain values"),
        (pickle.dumps([]), "segments without a trace"),
        (pickle.dumps("text"), "is no memory snapshot"),
        (pickle.dumps({"segments": []}), "is no memory snapshot"),
    ],
)
def test_other_files_are_refused(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pickle"
    path.write_bytes(content)
    with pytest.raises(MemplanError, match=complaint):
        load_snapshot(path)


BOMBS = {
    "a memo of 4 GB": (b"\x80\x02Nr\xff\xff\xff\x0f.", "is no memory snapshot"),
    "tuples nested deeply": (b"\x80\x02)" + b"\x85" * 400_000 + b".", "a tuple of more than numbers"),
    "a key that is hashed for ever": (
        b"\x80\x04}" + b"K\x01\x94" + b"".join(b"h%c" % n * 2 + b"\x86\x94" for n in range(60)) + b"Ns.",
        "a tuple of more than numbers",
    ),
    "a number as a key": (b"\x80\x04}K\x01Ns.", "a key that is no text"),
    "a number of many digits": (b"\x80\x04\x8a\xff" + b"\x11" * 255 + b".", "a number of 255 bytes"),
    "a text of 4 GB": (b"\x80\x04X\xff\xff\xff\xffa.", "cut short or damaged"),
    "a set": (b"\x80\x04\x8f(K\x01\x90.", "a set"),
    "lists nested deeply": (b"\x80\x04" + b"]" * 400_000 + b"a" * 399_999 + b".", "segments without a trace"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_few_bytes_take_neither_time_nor_memory(bomb: str, tmp_path: Path) -> None:
    content, complaint = BOMBS[bomb]
    path = tmp_path / "a.pickle"
    path.write_bytes(content)
    began = time.monotonic()
    tracemalloc.start()
    with pytest.raises(MemplanError, match=complaint) as error:
        load_snapshot(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert peak < 100 * MIB
    assert time.monotonic() - began < 10


def test_rows_that_are_written_once_are_read_once(tmp_path: Path) -> None:
    whole = document()
    whole["segments"] *= 100_000  # of one segment's blocks: the file has a byte or two for each
    with pytest.raises(MemplanError, match="segments share their blocks"):
        load_snapshot(dumped(tmp_path / "a.pickle", whole))
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with pytest.raises(MemplanError, match="the setting 'a' is no plain value"):
        load_snapshot(dumped(tmp_path / "b.pickle", document(allocator_settings={"a": loop})))


def test_a_file_cut_anywhere_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.pickle"
    save_snapshot(example(), path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(MemplanError) as error:
            load_snapshot(path, device=1)
        assert "\n" not in str(error.value)


def test_a_file_changed_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    path = dumped(tmp_path / "a.pickle", document())
    whole = bytearray(path.read_bytes())
    for position in range(len(whole)):
        for value in (0, 0x2E, 0x7D, 0x93):
            changed = whole.copy()
            changed[position] = value
            path.write_bytes(changed)
            with suppress(MemplanError):
                assert isinstance(load_snapshot(path), Snapshot)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MemplanError, match="can't be read: No such file"):
        load_snapshot(tmp_path / "none")
    with pytest.raises(MemplanError, match="can't be read: Is a directory"):
        load_snapshot(tmp_path)
    with pytest.raises(MemplanError, match=r"the snapshot can't be written to .*: No such file"):
        save_snapshot(example(), tmp_path / "none" / "a.pickle")
    assert not list(tmp_path.iterdir())


def test_a_snapshot_that_pytorch_made_is_read(tmp_path: Path) -> None:
    """There is no GPU here, but PyTorch's profiler turns its own events into the same format."""
    torch = pytest.importorskip("torch")
    from torch.cuda._memory_viz import _profile_to_snapshot

    with torch.profiler.profile(profile_memory=True, record_shapes=True, with_stack=True) as profile:
        kept = torch.ones(3000)
        torch.ones(1000).exp_()
    path = dumped(tmp_path / "a.pickle", _profile_to_snapshot(profile))
    snapshot = load_snapshot(path)
    assert next(entry.size for entry in snapshot.trace if entry.action is Action.ALLOC) == 12000
    assert 12000 in [block.size for segment in snapshot.segments for block in segment.blocks]
    assert 4000 in [entry.size for entry in snapshot.trace if entry.action is Action.FREE_COMPLETED]
    save_snapshot(snapshot, path)
    assert load_snapshot(path) == snapshot
    del kept


def test_the_example_is_sound() -> None:
    """So that the tests above change one thing only."""
    snapshot = example()
    assert replace(snapshot) == snapshot
    assert sum(block.size for block in snapshot.segments[0].blocks) == snapshot.segments[0].total_size


def test_the_docs_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "pictures.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    save_snapshot(replace(example(), device=0), tmp_path / "dump_snapshot.pickle")
    exec(compile(code, "docs/pictures.md", "exec"), {})
    assert capsys.readouterr().out.startswith(f"{2 * MIB} 11 ")
