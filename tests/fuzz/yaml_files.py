"""Campaign files: those of benchmarks/, changed as values and as text, with tags, aliases and odd scalars."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from memplan.verify.campaign import expand, load

from .command import command
from .harness import PLANTED
from .mutate import flipped, odd, often
from .sense import holds

SHARE = 0.1

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@cache
def corpus() -> tuple[dict[str, Any], ...]:
    """The campaigns of the repository."""
    return tuple(
        yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(BENCHMARKS.glob("campaign*.yaml"))
    )


SCALARS = ("1:1:1", "0x" + "f" * 5000, ".inf", ".nan", "-.inf", "2026-11-25", "!!binary aGk=", "~", "on",
           "0o17", "1_000", "!!set {a}", "!!float x", "&a {self: *a}", "*nobody", "{<<: *nobody}", "{1: 2}",
           f"!!python/object/apply:os.mkdir [{PLANTED}]", f"!!python/object/new:os.mkdir [{PLANTED}]",
           "!!python/name:os.mkdir", "!!python/module:antigravity", "!<tag:yaml.org,2002:python/tuple> [1]",
           "!!timestamp 2026-99-99", "!!int abc", '"\\uD800"', '"\\x1b[2J"', "'" + "A" * 10_000 + "'",
           "9" * 20, "[" * 3000, "1e999", "? x", "%YAML 9")  # fmt: skip


def make(random: Random) -> bytes:
    """A file's content. The runs are few, for each is planned."""
    whole = random.choice(corpus())
    document = whole | {"runs": random.sample(whole["runs"], random.randint(1, 3))}
    document = often(random, document)
    if isinstance(document, dict) and random.random() < 0.3:
        for run in document.get("runs", ()) if isinstance(document.get("runs"), list) else ():
            if isinstance(run, dict) and isinstance(run.get("recipe"), dict):
                run["recipe"] = {
                    **run["recipe"],
                    random.choice(("seq_len", "r", "mode", "optimizer", "x")): odd(random),
                }
    text = yaml.safe_dump(document, allow_unicode=False)
    if random.random() < 0.25:  # in the place of a value
        lines = text.splitlines(keepends=True)
        number = random.randrange(len(lines))
        lines[number] = lines[number].partition(":")[0] + f": {random.choice(SCALARS)}\n"
        text = "".join(lines)
    elif random.random() < 0.05:
        text = (
            aliases(random.choice((3, 8, 12, 40)), random.choice(("about", "runs", "defaults", "more")))
            + text
        )
    content = text.encode("utf-8", "surrogatepass")
    return flipped(random, content) if random.random() < 0.1 else content


def aliases(depth: int, key: str) -> str:
    """Lists of lists of lists, nine each: small to write, and huge for whoever unfolds it."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, depth)]
    return "\n".join([*lines, f"{key}: *a{depth - 1}\n"])


def check(value: bytes) -> None:
    """List its runs, as ``memplan campaign --dry-run`` does."""
    path = Path("campaign.yaml")
    path.write_bytes(value)
    runs = expand(load(path))
    command("campaign", str(path), "--dry-run")
    for run in runs:
        holds(
            math.isfinite(run.seconds) and run.seconds > 0, "a run that takes no time, or no end", run.seconds
        )
        holds(run.job.predicted_bytes > 0, "bytes that are not positive", run.job.predicted_bytes)
        holds(run.key == run.model_copy().key, "a run is not equal to itself")
