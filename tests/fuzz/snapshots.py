"""Memory snapshots: pickles of changed documents, pickles with changed bytes, and programs of opcodes."""

from __future__ import annotations

import os
import pickle
import struct
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from small_specs import SPECS

from memplan.asked.recipe import Recipe
from memplan.planning.plan import plan
from memplan.snapshot import load_snapshot, save_snapshot
from memplan.snapshot.layout import snapshot_of
from memplan.snapshot.replay import replay
from memplan.snapshot.simulated import placement

from .harness import PLANTED
from .mutate import flipped, often
from .sense import holds

SHARE = 0.15


class Payload:
    """Makes a folder when it is unpickled by whoever calls what it finds."""

    def __reduce__(self) -> Any:
        return os.mkdir, (PLANTED,)


@cache
def corpus() -> tuple[bytes, ...]:
    """Snapshots that the program wrote, with segments of either kind."""
    found = []
    for settings in ("", "expandable_segments:True"):
        run = plan(SPECS["llama"](1), Recipe(trainer="peft", seq_len=8, alloc_conf=settings), gpus=[]).run()
        save_snapshot(snapshot_of(run.tape, placement(run)), "snapshot.pickle")
        found.append(Path("snapshot.pickle").read_bytes())
        Path("snapshot.pickle").unlink()
    return tuple(found)


def make(random: Random) -> bytes:
    """A file's content."""
    kind = random.random()
    if kind < 0.25:
        return program(random)
    whole = pickle.loads(random.choice(corpus()))
    trace, segments = whole["device_traces"][0], whole["segments"]
    first = random.randrange(len(trace))  # a short one is as good, and is soon made smaller
    document = whole | {
        "device_traces": [trace[first : first + random.choice((0, 5, 40))]],
        "segments": segments[:3],
    }
    document = often(random, document if random.random() < 0.7 else whole)
    if kind < 0.3 and isinstance(document, dict):
        document[random.choice(("external_annotations", "segments", "more"))] = [Payload()]
    content = pickle.dumps(document, protocol=random.choice((2, 3, 4, 5)))
    return flipped(random, content) if random.random() < 0.25 else content


PLAIN = (b"(", b"]", b"}", b")", b"N", b".", b"0", b"1", b"2", b"\x94", b"\x88", b"\x8f", b"e", b"t", b"s",
         b"u", b"a", b"\x85", b"\x86", b"\x87", b"l", b"d", b"o", b"R", b"b", b"\x81", b"Q")  # fmt: skip
WITH_BYTE = (b"q", b"h", b"K", b"\x8a", b"U", b"\x8c", b"\x80")
WITH_32_BITS = (b"r", b"j", b"X", b"B", b"T", b"J", b"\x8b")
WITH_64_BITS = (b"\x8d", b"\x8e", b"\x96", b"\x95")
WITH_LINE = (b"I", b"L", b"p", b"g", b"F", b"V")
REPEATED = (b"]", b"(", b"\x85", b")\x85", b"]\x94h\0", b"2\x86", b"(lp0\n", b"]a")
CALLS = tuple(
    name + b"\n(X" + struct.pack("<I", len(text)) + text + b"tR"
    for name, text in (
        (b"cos\nmkdir", PLANTED.encode()),
        (b"cposix\nmkdir", PLANTED.encode()),
        (b"cbuiltins\nexec", f"__import__('os').mkdir('{PLANTED}')".encode()),
    )
)
FRAME = b"}(X\x08\0\0\0segments]X\x0d\0\0\0device_traces]u"  # of a snapshot without anything


def program(random: Random) -> bytes:
    """Opcodes as they come, some with huge lengths and memo indices, some that would call something."""
    opcodes = (
        lambda: random.choice(PLAIN),
        lambda: random.choice(WITH_BYTE) + random.randbytes(1),
        lambda: random.choice(WITH_32_BITS) + struct.pack("<I", _large(random, 32)),
        lambda: random.choice(WITH_64_BITS) + struct.pack("<Q", _large(random, 64)),
        lambda: random.choice(WITH_LINE) + b"%d\n" % _large(random, 64),
        lambda: random.choice(REPEATED) * random.choice((3, 500, 300_000)),
        lambda: random.choice(CALLS),
        lambda: FRAME,
    )
    length = random.choice((1, 2, 4, 30))
    parts = [b"\x80" + bytes([random.choice((2, 4, 5))]), *(random.choice(opcodes)() for _ in range(length))]
    return b"".join([*parts, random.choice((b".", b""))])


def _large(random: Random, bits: int) -> int:
    return random.choice((0, 1, 255, 1 << 20, 1 << 27, 1 << 29, (1 << (bits - 1)) - 1, (1 << bits) - 1))


def check(value: bytes) -> None:
    """Read it, write it again, and play its history."""
    path = Path("a.pickle")
    path.write_bytes(value)
    snapshot = load_snapshot(path)
    save_snapshot(snapshot, "again.pickle")
    holds(load_snapshot("again.pickle") == snapshot, "a snapshot that is written is another when read")
    replay(snapshot)
