"""Print a traced step, event by event.

python benchmarks/trace_dump.py --config '{"model_type": "llama", ...}' --recipe '{"mode": "lora"}'
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memplan.asked.recipe import Recipe
from memplan.tape import Category, Phase, replay, static_bytes
from memplan.trace import trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a config.json: JSON text or a path")
    parser.add_argument("--recipe", default="{}", help="JSON of Recipe's options")
    parser.add_argument("--layers", type=int, help="instead of the configuration's number of layers")
    parser.add_argument("--setup", action="store_true", help="print what exists before the step, too")
    parser.add_argument("--quiet", action="store_true", help="print the summary only")
    parser.add_argument("--capability", default="8.0")
    options = parser.parse_args()
    text = options.config
    config = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    if options.layers:
        config["num_hidden_layers"] = options.layers
    started = time.perf_counter()
    major, minor = (int(part) for part in options.capability.split("."))
    tape = trace(
        config, Recipe(trainer="peft", **json.loads(options.recipe)), compute_capability=(major, minor)
    )
    seconds = time.perf_counter() - started
    live = 0
    for segment in tape.segments:
        shown = not options.quiet and (options.setup or segment.phase is not Phase.SETUP)
        if shown:
            print(f"== {segment.phase.value} {segment.name} layer={segment.layer} live={live}")
        for position in range(segment.start, segment.stop):
            event, delta = tape.events[position], tape.deltas[position]
            live += delta
            index = event if event >= 0 else ~event
            what = f"{tape.operations[index]} {tape.modules[index]}"
            if shown:
                sign = f"+{delta}" if event >= 0 else f"{delta}"
                detail = f"{what} [{tape.categories[index].value}]" if event >= 0 else f"    ({what})"
                print(f"{sign:>14} #{index:<6} {detail:<90} {live}")
    peak = replay(tape)
    static = {category.value: nbytes for category, nbytes in static_bytes(tape).items() if nbytes}
    print(f"static {static}")
    print(f"end {live}")
    where = f"{peak.phase.value} {peak.segment} layer={peak.layer} at {peak.operation} {peak.module}"
    print(f"peak {peak.allocated_bytes} in {where}")
    print(f"     { {c.value: peak.by_category[c] for c in Category if peak.by_category[c]} }")
    print(f"{len(tape.events)} events in {seconds:.1f} s")


if __name__ == "__main__":
    main()
