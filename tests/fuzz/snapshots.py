"""Memory snapshots: pickles of documents that are changed, pickles whose bytes are, and programs of opcodes."""

from __future__ import annotations

import os
import pickle
import struct
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from small_specs import SPECS

from memplan.planner import plan
from memplan.recipe import make_recipe
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
        run = plan(SPECS["llama"](1), make_recipe(seq_len=8, alloc_conf=settings), gpus=[]).run()
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
    document = whole | {"device_traces": [trace[first : first + random.choice((0, 5, 40))]], "segments": segments[:3]}
    document = often(random, document if random.random() < 0.7 else whole)
    if kind < 0.3 and isinstance(document, dict):
        document[random.choice(("external_annotations", "segments", "more"))] = [Payload()]
    content = pickle.dumps(document, protocol=random.choice((2, 3, 4, 5)))
    return flipped(random, content) if random.random() < 0.25 else content


def program(random: Random) -> bytes:
    """Opcodes as they come, some with huge lengths and memo indices, some that would call something."""
    opcodes = (
        lambda: random.choice((b"(", b"]", b"}", b")", b"N", b".", b"0", b"1", b"2", b"\x94", b"\x88", b"\x8f", b"e", b"t",
                               b"s", b"u", b"a", b"\x85", b"\x86", b"\x87", b"l", b"d", b"o", b"R", b"b", b"\x81", b"Q")),
        lambda: random.choice((b"r", b"j", b"X", b"B", b"T", b"J", b"\x8b")) + struct.pack("<I", _large(random, 32)),
        lambda: random.choice((b"\x8d", b"\x8e", b"\x96", b"\x95")) + struct.pack("<Q", _large(random, 64)),
        lambda: random.choice((b"q", b"h", b"K", b"\x8a", b"U", b"\x8c", b"\x80")) + random.randbytes(1),
        lambda: random.choice((b"I", b"L", b"p", b"g", b"F", b"V")) + str(_large(random, 64)).encode() + b"\n",
        lambda: random.choice((b"cos\nmkdir\n", b"cposix\nmkdir\n", b"ios\nmkdir\n")) + b"(X\x07\x00\x00\x00planted" + b"tR",
        lambda: b"cbuiltins\nexec\n(X\x1f\x00\x00\x00__import__('os').mkdir('planted')tR"[: random.choice((15, 60))],
        lambda: random.choice((b"]", b"(", b"\x85", b")\x85", b"]\x94h\0", b"2\x86", b"(lp0\n", b"]a")) * random.choice((3, 500, 300_000)),
        lambda: b"}(X\x08\0\0\0segments]X\x0d\0\0\0device_traces]u",
    )  # fmt: skip
    return b"\x80" + random.choice(b"\x02\x04\x05").to_bytes(1, "little") + b"".join(
        random.choice(opcodes)() for _ in range(random.choice((1, 2, 4, 30)))
    ) + random.choice((b".", b""))


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
