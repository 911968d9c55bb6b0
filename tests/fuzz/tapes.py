"""Tape files: those that the program writes, changed as JSON, as bytes, and as compressed bytes."""

from __future__ import annotations

import gzip
import json
import zlib
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from example_tapes import example_tape
from small_specs import SPECS

from memplan.asked.recipe import Recipe
from memplan.planning.predicted import predicted_tape, write
from memplan.report.perfetto import trace_json
from memplan.tape import Tape
from memplan.tape.file import TapeInfo, encode, load, save

from .command import command
from .harness import Fault
from .mutate import encoded, flipped, nested, odd, often
from .sense import holds, sound_tape, strict_json

SHARE = 0.15

FORMS: tuple[tuple[str, ...], ...] = ((), ("--json",), ("--markdown",))


@cache
def corpus() -> tuple[dict[str, Any], ...]:
    """Documents of folded and of played tapes."""
    recipe = Recipe(trainer="peft", seq_len=64)
    tapes: list[Tape] = [example_tape(2), write(SPECS["llama"](12), recipe.resolved())]
    tapes.append(predicted_tape(SPECS["gemma2"](2), Recipe(trainer="peft", mode="full", seq_len=16)))
    info = TapeInfo(
        memplan_version="0", model="a/b", recipe=recipe.model_dump(mode="json"), libraries={"torch": "2"}
    )
    return tuple(json.loads(encode(tape, info)) for tape in tapes)


def make(random: Random) -> Any:
    """A file's content, as a JSON value or as bytes."""
    document = random.choice(corpus())
    if random.random() < 0.3:  # what a folded tape says of its repetitions is easily got wrong
        rows = [list(row) for row in document["segments"]]
        random.choice(rows)[5] = random.choice((0, 1, 2, 10**4, 10**5, 10**5, 10**6, 10**15, 10**400))
        document = document | {"segments": rows}
    if random.random() < 0.3:
        sizes = [size * random.choice((1, 1, 3, 1 << 50)) for size in document["sizes"]]
        document = document | {"sizes": sizes}
    content: Any = often(random, document, 2) if random.random() < 0.6 else document
    match random.randrange(20):
        case 0 | 1:
            content = flipped(random, encoded(content))
        case 2 | 3 | 4:
            content = gzip.compress(encoded(content), mtime=0)
        case 5:
            content = flipped(random, gzip.compress(encoded(content), mtime=0))
        case 6:
            content = random.choice((odd(random), nested(150), b"[" * 200_000, b'{"a":' * 100_000))
        case 7 if random.random() < 0.3:
            content = bomb(random.choice((b"[],", b"0,", b'"",')))
    return content


@cache
def bomb(pattern: bytes) -> bytes:
    """A small file of valid JSON that unpacks to 256 MiB, and to more as Python's values."""
    block = pattern * ((1 << 20) // len(pattern))
    packer = zlib.compressobj(wbits=31)
    head = packer.compress(b'{"format": "memplan tape", "version": 1, "events": [0' + pattern[-1:])
    return b"".join(
        [head, *(packer.compress(block) for _ in range(256)), packer.compress(b"0]}"), packer.flush()]
    )


def check(value: Any) -> None:
    """Read it, and do with it what commands do."""
    path = Path("tape.json")
    path.write_bytes(encoded(value))
    tape, info = load(path)
    sound_tape(tape)
    save(tape, "again.json.gz", info)
    again, told = load("again.json.gz")
    holds((again, told) == (tape, info), "a tape that is written is another when read")
    save(example_tape(2), "other.json")
    command("diff", "tape.json", "other.json", *FORMS[path.stat().st_size % len(FORMS)])
    if any(segment.repeat > 1 for segment in tape.segments):
        return
    try:
        strict_json(trace_json(tape, "a tape").decode())
    except ValueError as error:
        raise Fault("a tape that is read can't be drawn", str(error)) from None
