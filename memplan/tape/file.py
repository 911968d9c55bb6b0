"""Tapes in files: JSON, compressed if the name ends in ``.gz``, with what the tape is of.

A file holds the tape's columns as they are (see :class:`memplan.tape.Tape`); operations, modules and
categories are numbers of entries in a list of strings. Reading checks that the tape can be replayed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memplan.bounded import TooManyParts, read_json
from memplan.errors import MemplanError, printable, shown
from memplan.files import write_whole, zipped
from memplan.tape import ALLOCATION_GRANULARITY, Category, Part, Phase, Segment, Tape

FORMAT = "memplan tape"
VERSION = 2

_MAX_BYTES = 64 << 20  # unpacked; the tape of 126 layers is 20 MiB
_MAX_EVENTS = 1 << 22  # with every repetition; that tape has 110,000, and readers go through all of them
_MAX_REPEAT = 1024  # a segment is repeated for layers, of which no model has so many
_MAX_SIZE = 1 << 62  # bytes; what a 64-bit number holds, far above any card


class TapeInfo(BaseModel):
    """What a tape is of: the model, the recipe as the Plan prints it, and the libraries that wrote it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memplan_version: str = ""
    model: str = ""
    recipe: dict[str, Any] = Field(default_factory=dict)
    libraries: dict[str, str] = Field(default_factory=dict)


def save(tape: Tape, path: str | Path, info: TapeInfo | None = None) -> None:
    """Write a tape. The file is there as a whole or not at all."""
    write_whole(path, zipped(path, encode(tape, info)), "the tape")


def encode(tape: Tape, info: TapeInfo | None = None) -> bytes:
    """A tape file's content, not compressed."""
    strings: dict[str, int] = {}

    def numbers(texts: list[str]) -> list[int]:
        return [strings.setdefault(text, len(strings)) for text in texts]

    document = {
        "format": FORMAT,
        "version": VERSION,
        "provenance": tape.provenance,
        "info": (info or TapeInfo()).model_dump(mode="json"),
        "segments": [
            [
                s.phase.value,
                s.name,
                s.layer,
                s.start,
                s.stop,
                s.repeat,
                list(s.marks),
                s.direction,
                s.part.value,
            ]
            for s in tape.segments
        ],
        "events": tape.events,
        # the changes of live bytes follow from the events, but in a folded tape
        "deltas": tape.deltas if any(segment.repeat > 1 for segment in tape.segments) else None,
        "sizes": tape.sizes,
        "categories": numbers([category.value for category in tape.categories]),
        "operations": numbers(tape.operations),
        "modules": numbers(tape.modules),
        "products": sorted(tape.products),
        "workspaces": sorted(tape.workspaces),
        "streams": [list(pair) for pair in sorted(tape.streams.items())],
        "rank": tape.rank,
        "strings": list(strings),
    }
    return json.dumps(document, separators=(",", ":")).encode()


Reader = Callable[[Any, str], tuple[Tape, TapeInfo]]  # of a document, which the second names in complaints


def load(path: str | Path, others: Mapping[str, Reader] | None = None) -> tuple[Tape, TapeInfo]:
    """Read a tape; ``others`` read files of other formats that hold one. Raises MemplanError with one
    sentence for whatever else the file holds."""
    where = shown(str(path))
    document = _document(Path(path), where)
    kind = document.get("format") if isinstance(document, dict) else None
    other = (others or {}).get(kind) if isinstance(kind, str) else None
    return (other or _read)(document, where)


def decode(content: bytes, where: str) -> tuple[Tape, TapeInfo]:
    """A tape from a tape file's content; ``where`` names it in complaints."""
    return _read(_parse(content, where), where)


def _read(document: Any, where: str) -> tuple[Tape, TapeInfo]:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise MemplanError(f"{where} is no tape; `memplan trace MODEL --tape FILE` writes one")
    version = document.get("version")
    if version not in (1, VERSION) or isinstance(version, bool):
        raise MemplanError(
            f"{where} is a tape of version {shown(version)}, but this memplan reads version "
            f"{VERSION}; write it again with this memplan"
        )
    try:
        return _tape(document), TapeInfo.model_validate(document["info"])
    except (KeyError, IndexError, TypeError, ValueError, ValidationError) as error:
        why = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        if isinstance(error, TypeError):
            why = "it has values of other kinds than a tape has"
        why = printable(why)
        raise MemplanError(f"{where} is a damaged tape: {why}") from None


def _document(path: Path, where: str) -> Any:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise MemplanError(f"the tape {where} can't be read: {why}") from None
    return _parse(content, where)


def _parse(content: bytes, where: str) -> Any:
    try:
        if content.startswith(b"\x1f\x8b"):
            unzip = zlib.decompressobj(wbits=31)
            content = unzip.decompress(content, _MAX_BYTES + 1)
            if not unzip.eof and len(content) <= _MAX_BYTES:
                raise MemplanError(f"the tape {where} is cut short")
        if len(content) > _MAX_BYTES:
            raise MemplanError(f"{where} is larger than {_MAX_BYTES >> 20} MiB, so it is no tape")
        return read_json(content)
    except zlib.error:
        raise MemplanError(f"the tape {where} is damaged: its compression is broken") from None
    except TooManyParts as error:
        raise MemplanError(f"{where} {error}, so it is no tape") from None
    except (ValueError, RecursionError):  # no JSON, no UTF-8, nested too deeply
        raise MemplanError(f"{where} is no valid JSON, so it is no tape; is it cut short?") from None


def _tape(document: dict[str, Any]) -> Tape:
    strings = document["strings"]
    _check(
        isinstance(strings, list) and all(isinstance(text, str) for text in strings), "strings are no text"
    )

    def column(name: str, least: int | None = 0) -> list[int]:
        values: list[int] = document[name]
        _check(
            isinstance(values, list) and all(type(value) is int for value in values), f"{name} are no numbers"
        )
        _check(least is None or min(values, default=least) >= least, f"{name} are negative")
        largest = max(max(values, default=0), -min(values, default=0))
        _check(largest <= _MAX_SIZE, f"{name} are beyond any card")
        return values

    def texts(name: str) -> list[str]:
        return [strings[number] for number in column(name)]

    if document["version"] == 1:
        document = {**document, **_parts_by_name(document)}
    tape = Tape(
        provenance=str(document["provenance"]),
        events=column("events", least=None),
        sizes=column("sizes"),
        categories=[Category(text) for text in texts("categories")],
        operations=texts("operations"),
        modules=texts("modules"),
        products=set(column("products")) if "products" in document else set(),
        workspaces=set(column("workspaces")),
        streams=dict(_pairs(document["streams"])),
        rank=document["rank"],
        segments=[_segment(row) for row in document["segments"]],
    )
    storages = len(tape.sizes)
    marked = (*tape.products, *tape.workspaces, *tape.streams)
    _check(max(marked, default=0) < max(storages, 1), "a product, a workspace or a stream has no storage")
    _check(type(tape.rank) is int and tape.rank >= 0, "its rank is no number")
    for name in ("categories", "operations", "modules"):
        _check(len(getattr(tape, name)) == storages, f"it has {storages} sizes and other numbers of {name}")
    _check(not any(size % ALLOCATION_GRANULARITY for size in tape.sizes), "its sizes are not rounded")
    _check_order(tape)
    changes = document["deltas"]
    tape.deltas = [tape.sizes[event] if event >= 0 else -tape.sizes[~event] for event in tape.events]
    if changes is not None:
        tape.deltas = column("deltas", least=None)
        _check(len(tape.deltas) == len(tape.events), "it has more events than changes")
    _check_changes(tape)
    return tape


def _pairs(rows: Any) -> list[tuple[int, int]]:
    known = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 2 for row in rows)
    _check(known, "its streams are no list of pairs")
    pairs = [(storage, stream) for storage, stream in rows]
    _check(all(type(one) is int and one >= 0 for pair in pairs for one in pair), "its streams are no numbers")
    return pairs


def _parts_by_name(document: dict[str, Any]) -> dict[str, Any]:
    """What version 1 left to be told from names."""
    strings, kinds = document["strings"], document["operations"]
    found = [index for index, kind in enumerate(kinds) if strings[kind] == "cublas_workspace"]
    rows = []
    for row in document["segments"]:
        phase, name = row[:2]
        part = Part.UPDATE if (phase, name) == (Phase.OPTIMIZER.value, "step") else Part.STEP
        if phase == Phase.SETUP.value:
            part = Part.LOADED if name in ("weights", "layer weights") else Part.RESTING
        rows.append([*row, part.value])
    return {"segments": rows, "workspaces": found, "streams": [], "rank": 0}


def _segment(row: Any) -> Segment:
    _check(isinstance(row, list) and len(row) == 9, "a segment is no list of nine")
    phase, name, layer, start, stop, repeat, marks, direction, part = row
    _check(isinstance(name, str), "a segment has no name")
    _check(isinstance(marks, list), "a segment's marks are no list")
    _check(layer is None or type(layer) is int, "a segment's layer is no number")
    _check(all(type(value) is int for value in (start, stop, repeat, *marks)), "a segment has no numbers")
    _check(start <= stop and repeat >= 1 and direction in (1, -1), "a segment is turned around")
    _check(repeat <= _MAX_REPEAT, f"a segment is repeated more than {_MAX_REPEAT:,} times")
    of_setup = Part(part) not in (Part.STEP, Part.UPDATE)
    _check(of_setup is (phase == Phase.SETUP.value), "a segment's part does not belong to its phase")
    return Segment(Phase(phase), name, layer, start, stop, repeat, tuple(marks), direction, Part(part))


def _check_order(tape: Tape) -> None:
    """Every storage is born once and dies at most once, afterwards; segments follow one another."""
    born = bytearray(len(tape.sizes))
    for event in tape.events:
        index = event if event >= 0 else ~event
        _check(index < len(born), "an event is about no storage")
        _check(born[index] == (0 if event >= 0 else 1), "a storage is released before it is allocated")
        born[index] += 1
    folded = any(segment.repeat > 1 for segment in tape.segments)
    ends = [0, *(end for s in tape.segments for end in (s.start, s.stop)), len(tape.events)]
    if folded:  # leaves out the repetitions that were played to prove that they are alike
        _check(all(a <= b for a, b in pairwise(ends)), "its segments overlap")
    else:
        _check(all(a == b for a, b in list(pairwise(ends))[::2]), "its segments don't follow one another")
    _check(bool(tape.segments), "it has no segments")
    events = sum(segment.repeat * (segment.stop - segment.start) for segment in tape.segments)
    _check(events <= _MAX_EVENTS, f"its repetitions make more than {_MAX_EVENTS:,} events")


def _check_changes(tape: Tape) -> None:
    """Of no category less than nothing lives at any time, in no repetition."""
    live = dict.fromkeys(Category, 0)
    for segment in tape.segments:
        net, least = dict.fromkeys(Category, 0), dict.fromkeys(Category, 0)
        for position in range(segment.start, segment.stop):
            event = tape.events[position]
            category = tape.categories[event if event >= 0 else ~event]
            net[category] += tape.deltas[position]
            least[category] = min(least[category], net[category])
        for category, change in net.items():
            lowest = live[category] + min(0, (segment.repeat - 1) * change) + least[category]
            _check(lowest >= 0, f"more {category.value.replace('_', ' ')} go than there are")
            live[category] += segment.repeat * change


def _check(sound: bool, complaint: str) -> None:
    if not sound:
        raise ValueError(complaint)
