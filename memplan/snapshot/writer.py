"""Snapshots into files that PyTorch's tools open."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from memplan.files import write_whole
from memplan.snapshot.records import ORIGIN_KEY, Action, Frame, Segment, Snapshot, TraceEntry

# PyTorch's viewer reads 2 to 4 (torch/utils/viz/MemoryViz.js); torch itself writes Python's default.
_PROTOCOL = 4


def save_snapshot(snapshot: Snapshot, path: str | Path) -> None:
    """Write a snapshot that PyTorch's tools open. The file is there as a whole or not at all.

    Raises MemplanError if it can't be written.
    """
    frames = _FrameWriter()
    trace = [_entry_row(entry, frames) for entry in snapshot.trace]
    document = {
        "segments": [_segment_row(segment, snapshot.device, frames) for segment in snapshot.segments],
        "device_traces": [*([] for _ in range(snapshot.device)), trace],
        "allocator_settings": dict(snapshot.settings),
        "external_annotations": [],
    }
    if snapshot.origin:
        document[ORIGIN_KEY] = snapshot.origin
    write_whole(path, pickle.dumps(document, protocol=_PROTOCOL), "the snapshot")


class _FrameWriter:
    """Stack traces as rows; the same trace is the same list, which the pickle then holds once."""

    def __init__(self) -> None:
        self.rows: dict[int, list[dict[str, Any]]] = {}

    def __call__(self, frames: tuple[Frame, ...]) -> list[dict[str, Any]]:
        rows = self.rows.get(id(frames))
        if rows is None:
            rows = [{"filename": f.filename, "line": f.line, "name": f.name} for f in frames]
            self.rows[id(frames)] = rows
        return rows


def _entry_row(entry: TraceEntry, frames: _FrameWriter) -> dict[str, Any]:
    oom = entry.action is Action.OOM
    row: dict[str, Any] = {
        "action": entry.action.value,
        "device_free" if oom else "addr": entry.device_free if oom else entry.addr,
        "size": entry.size,
        "stream": entry.stream,
        "pool_id": entry.pool_id,
        "frames": frames(entry.frames),
    }
    if entry.time_us is not None:
        row["time_us"] = entry.time_us
    if entry.category is not None:
        row["category"] = entry.category
    return row


def _segment_row(segment: Segment, device: int, frames: _FrameWriter) -> dict[str, Any]:
    return {
        "device": device,
        "address": segment.address,
        "total_size": segment.total_size,
        "allocated_size": segment.allocated_size,
        "active_size": segment.active_size,
        "requested_size": segment.requested_size,
        "stream": segment.stream,
        "segment_type": segment.segment_type,
        "segment_pool_id": segment.pool_id,
        "is_expandable": segment.is_expandable,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested_size,
                "state": block.state.value,
                "frames": frames(block.frames),
            }
            for block in segment.blocks
        ],
    }
