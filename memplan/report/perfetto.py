"""A tape in the Trace Event Format, for ui.perfetto.dev and chrome://tracing.

One event of the tape is one microsecond, since the format knows time only. A thread of slices holds phases,
in them layers and other parts, in them the modules that allocate; a counter a category and one of all count
live bytes; an instant marks the peak.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from memplan.report.plan import CATEGORIES
from memplan.tape import Tape, replay
from memplan.tape.curves import Span, live_bytes, parts, phases
from memplan.units import gib

_PROCESS, _THREAD = 1, 1


def trace_json(tape: Tape, title: str) -> bytes:
    """The trace of an unfolded tape; ``title`` names the process."""
    events = [*_names(title), *_slices(tape), *_peak(tape), *_counters(tape)]
    events.sort(key=lambda event: (event.get("ts", -1), -event.get("dur", 0)))  # stable: outer slices first
    document = {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {
            "provenance": tape.provenance,
            "unit": "a microsecond is one allocation or release, not time",
        },
    }
    return json.dumps(document, separators=(",", ":")).encode()


def _event(kind: str, name: str, ts: int, **rest: Any) -> dict[str, Any]:
    return {"ph": kind, "name": name, "pid": _PROCESS, "tid": _THREAD, "ts": ts, **rest}


def _names(title: str) -> Iterator[dict[str, Any]]:
    for kind, name in (("process_name", title), ("thread_name", "step")):
        yield {"ph": "M", "name": kind, "pid": _PROCESS, "tid": _THREAD, "args": {"name": name}}


def _slices(tape: Tape) -> Iterator[dict[str, Any]]:
    for phase in phases(tape):
        yield _slice(phase.name, phase.start, phase.stop)
    for part in parts(tape):
        name = part.name if part.layer is None else f"layer {part.layer}"
        yield _slice(name, part.start, part.stop, segment=part.name)
        yield from _modules(tape, part)


def _modules(tape: Tape, part: Span) -> Iterator[dict[str, Any]]:
    """Runs of allocations in one module, with the releases between them."""
    start, module = part.start, None
    for position in range(part.start, part.stop):
        event = tape.events[position]
        if event < 0 or tape.modules[event] == module:
            continue
        if module:
            yield _slice(module, start, position)
        start, module = position, tape.modules[event]
    if module:
        yield _slice(module, start, part.stop)


def _slice(name: str, start: int, stop: int, **arguments: Any) -> dict[str, Any]:
    return _event("X", name, start, dur=stop - start, args=arguments)


def _counters(tape: Tape) -> Iterator[dict[str, Any]]:
    """Each category where it changes, and all together."""
    live = live_bytes(tape)
    totals = dict.fromkeys(CATEGORIES, 0)
    for position, event in enumerate(tape.events):
        field = tape.categories[event if event >= 0 else ~event].value
        totals[field] += tape.deltas[position]
        yield _event("C", CATEGORIES[field][0], position, args={"bytes": totals[field]})
        yield _event("C", "tensors", position, args={"bytes": live[position]})


def _peak(tape: Tape) -> Iterator[dict[str, Any]]:
    live = live_bytes(tape)
    position = live.index(max(live))
    peak = replay(tape)
    about = {"operation": peak.operation, "module": peak.module, "bytes": peak.allocated_bytes}
    yield _event("i", f"peak {gib(peak.allocated_bytes)} GiB", position, s="g", args=about)
