"""Snapshots from files. A pickle is a program; it is read by a machine that can put plain values together and
nothing else (:mod:`memplan.snapshot.pickled`), so that one may read a stranger's file."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

from memplan.errors import MemplanError, shown
from memplan.snapshot.pickled import Damaged, NotPlain, read_plain
from memplan.snapshot.records import (
    ORIGIN_KEY,
    Action,
    Block,
    BlockState,
    Frame,
    Segment,
    Snapshot,
    TraceEntry,
)

_MAX_BYTES = 4 << 30


def load_snapshot(path: str | Path, device: int = 0) -> Snapshot:
    """Read one device's part of a snapshot.

    Raises MemplanError with one sentence for whatever else the file holds.
    """
    where = shown(str(path))
    document = _document(Path(path), where)
    if isinstance(document, list):
        raise MemplanError(
            f"{where} holds segments without a trace; torch.cuda.memory._dump_snapshot writes both"
        )
    if not isinstance(document, dict) or not {"segments", "device_traces"} <= document.keys():
        raise MemplanError(f"{where} is no memory snapshot, which torch.cuda.memory._dump_snapshot writes")
    try:
        return _snapshot(document, device)
    except _NoDevice as error:
        raise MemplanError(f"{where} {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        why = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise MemplanError(f"{where} is a damaged snapshot, or one of another version: {why}") from None


class _NoDevice(Exception):
    pass


def _document(path: Path, where: str) -> Any:
    try:
        with path.open("rb") as file:
            if path.stat().st_size > _MAX_BYTES:
                raise MemplanError(f"{where} is larger than {_MAX_BYTES >> 30} GiB, too large for a snapshot")
            start = file.peek(2)[:2]
            if start == b"\x1f\x8b":
                raise MemplanError(f"{where} is compressed: unpack it with gunzip first")
            if start[:1] != b"\x80":
                raise MemplanError(
                    f"{where} is no pickle, so it is no memory snapshot, which "
                    "torch.cuda.memory._dump_snapshot writes"
                )
            return read_plain(file.read())
    except MemplanError:
        raise
    except OSError as error:
        raise MemplanError(f"the snapshot {where} can't be read: {error.strerror}") from None
    except NotPlain as error:
        raise MemplanError(
            f"{where} holds more than plain values ({shown(str(error))}), so it is no memory snapshot, "
            "and it was not run"
        ) from None
    except Damaged:
        raise MemplanError(f"the snapshot {where} is cut short or damaged") from None


def _snapshot(document: dict[str, Any], device: int) -> Snapshot:
    traces = _list(document["device_traces"], "device_traces")
    segments = _dicts(document["segments"], "segments")
    seen = {number for number, trace in enumerate(traces) if trace}
    seen |= {_int(row, "device") for row in segments}
    if device not in seen and (seen or device):
        others = ", ".join(str(number) for number in sorted(seen)) or "none at all"
        raise _NoDevice(f"has nothing of device {device}; it has {others}")
    if len({id(row.get("blocks")) for row in segments}) < len(segments):
        raise ValueError("segments share their blocks")  # a few bytes for as many rows as one likes
    frames = _FrameReader()
    entries = _dicts(traces[device], "the trace") if 0 <= device < len(traces) else []
    return Snapshot(
        device=device,
        segments=tuple(_segment(row, frames) for row in segments if row["device"] == device),
        trace=tuple(_entry(row, frames) for row in entries),
        settings=_settings(document.get("allocator_settings", {})),
        origin=_text(document, ORIGIN_KEY) if ORIGIN_KEY in document else "",
    )


class _FrameReader:
    """Stack traces; PyTorch writes equal ones once, so they are read once."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Frame, ...]] = {}

    def __call__(self, row: dict[str, Any]) -> tuple[Frame, ...]:
        rows = row.get("frames")
        if not rows:
            return ()
        frames = self.known.get(id(rows))
        if frames is None:
            frames = tuple(
                Frame(_text(frame, "filename"), _int(frame, "line"), _text(frame, "name"))
                for frame in _dicts(rows, "frames")
            )
            self.known[id(rows)] = frames
        return frames


def _entry(row: dict[str, Any], frames: _FrameReader) -> TraceEntry:
    action = _one_of(Action, row, "action")
    oom = action is Action.OOM
    return TraceEntry(
        action=action,
        addr=0 if oom else _int(row, "addr"),
        size=_int(row, "size", least=0),
        stream=_int(row, "stream"),
        frames=frames(row),
        device_free=_int(row, "device_free") if oom else None,
        time_us=_int(row, "time_us") if "time_us" in row else None,
        category=_text(row, "category") if "category" in row else None,
        pool_id=_pair(row, "pool_id"),
    )


def _segment(row: dict[str, Any], frames: _FrameReader) -> Segment:
    address, total = _int(row, "address"), _int(row, "total_size", least=0)
    rows = _dicts(row["blocks"], "blocks")
    ends = list(accumulate((_int(block, "size", least=0) for block in rows), initial=address))
    if ends[-1] != address + total:
        raise ValueError(f"a segment of {total} bytes has {ends[-1] - address} bytes in its blocks")
    blocks = tuple(_block(block, start, frames) for block, start in zip(rows, ends, strict=False))
    return Segment(
        address=address,
        total_size=total,
        allocated_size=_total(row, "allocated_size", _sizes(blocks, BlockState.ALLOCATED)),
        active_size=_total(
            row,
            "active_size",
            _sizes(blocks, BlockState.ALLOCATED, BlockState.PENDING_FREE, BlockState.AWAITING_FREE),
        ),
        requested_size=_total(row, "requested_size", sum(block.requested_size for block in blocks)),
        stream=_int(row, "stream"),
        segment_type=_text(row, "segment_type") if "segment_type" in row else "large",
        is_expandable=row.get("is_expandable", False) is True,
        blocks=blocks,
        pool_id=_pair(row, "segment_pool_id"),
    )


def _block(row: dict[str, Any], address: int, frames: _FrameReader) -> Block:
    state = _one_of(BlockState, row, "state")
    told = _int(row, "address") if "address" in row else address  # where those before it end, if not told
    if told != address:
        raise ValueError(f"a block is at {told}, but the ones before it end at {address}")
    inactive = state is BlockState.INACTIVE
    requested = 0 if inactive else _int(row, "requested_size", least=0)
    return Block(address, _int(row, "size"), requested, state, frames(row))


def _sizes(blocks: Iterable[Block], *states: BlockState) -> int:
    return sum(block.size for block in blocks if block.state in states)


def _total(row: dict[str, Any], key: str, counted: int) -> int:
    """A total that older versions and the profiler's snapshots leave to be counted."""
    return _int(row, key, least=0) if key in row else counted


def _settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("allocator_settings are no settings by name")
    plain = (str, int, float, type(None))
    for key, setting in value.items():
        parts = setting.values() if isinstance(setting, dict) else (setting,)
        if not all(isinstance(part, plain) for part in parts):
            raise ValueError(f"the setting {shown(key)} is no plain value")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what}: no list")
    return value


def _dicts(value: Any, what: str) -> list[dict[str, Any]]:
    rows = _list(value, what)
    if not all(type(row) is dict for row in rows):
        raise ValueError(f"{what}: not all are dictionaries")
    return rows


def _int(row: dict[str, Any], key: str, least: int | None = None) -> int:
    value = row[key]
    if type(value) is not int or (least is not None and value < least):
        raise ValueError(f"{key} is {shown(value)}")
    return value


def _text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is {shown(value)}")
    return value


def _pair(row: dict[str, Any], key: str) -> tuple[int, int]:
    value = row.get(key, (0, 0))
    if not isinstance(value, tuple) or len(value) != 2 or not all(type(part) is int for part in value):
        raise ValueError(f"{key} is {shown(value)}")
    return value


def _one_of(kind: type[Any], row: dict[str, Any], key: str) -> Any:
    try:
        return kind(row[key])
    except ValueError:
        raise ValueError(f"{key} is {shown(row[key])}, which is not known") from None
