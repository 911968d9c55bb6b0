"""``python -m tests.fuzz``: all fuzzers, and a table of what became of the inputs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import configs
from .run import FUZZERS, Found, hunt, table


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all fuzzers together (default: 20000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=FUZZERS, action="append", help="some of the fuzzers")
    parser.add_argument("--number", type=int, help="one input, shown; with --only")
    parser.add_argument("--corpus", type=Path, help="a folder of further config.json files to start from")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args(argv)
    if asked.corpus is not None:
        configs.add(asked.corpus)
    found: list[Found] = []
    for name in asked.only or FUZZERS:
        inputs = (
            asked.inputs if asked.only and len(asked.only) == 1 else round(asked.inputs * FUZZERS[name].SHARE)
        )
        numbers = range(inputs) if asked.number is None else [asked.number]
        found.append(hunt(name, asked.seed, numbers, asked.jobs, tell=sys.stderr))
    sys.stdout.write(table(found, asked.seed))
    return int(any(one.faults for one in found))


if __name__ == "__main__":
    sys.exit(main())
