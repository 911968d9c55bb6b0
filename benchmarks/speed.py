"""How fast memplan is: the whole command from cold beside bare Python, plan() once everything is loaded, the
allocator's simulation, the frontier, one rank of several hundred, and a sweep over strategies, GPUs and
batches.

    python benchmarks/speed.py [--runs N]

"Cold" is a new process with files in the page cache and bytecode compiled: what a user waits for.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median

COMMAND_BUDGET = 0.200
WARM_BUDGETS = {"llama-3.2-1b": 0.005, "llama-3.3-70b": 0.010}
# Full fine-tuning on several GPUs, of one class of ranks: how many times fewer runs of each strategy.
SEVERAL = {"ddp": 1, "fsdp2": 1, "zero1": 4, "zero2": 4, "zero3": 8}
RANK_BUDGET, SWEEP_BUDGET = 0.015, 2.0
SIMULATION_BUDGET = 1.0
FRONTIER_BUDGET = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description="Times memplan.")
    parser.add_argument("--runs", type=int, default=20, help="runs of each (default: %(default)s)")
    runs = parser.parse_args().runs

    script = Path(sys.executable).with_name("memplan")
    memplan = [str(script)] if script.exists() else [sys.executable, "-m", "memplan"]
    question = ["llama-70b", "--mode", "qlora", "--r", "8"]
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, best and median of {runs} runs")
    report("cold: python -c pass", timed(lambda: process([sys.executable, "-c", "pass"]), runs))
    times = timed(lambda: process([*memplan, *question]), runs)
    report(f"cold: memplan {' '.join(question)}", times, COMMAND_BUDGET)

    from memplan import Recipe, plan
    from memplan.device.playback import simulate

    for model, budget in WARM_BUDGETS.items():
        for mode in ("qlora", "lora", "full"):
            recipe = Recipe(trainer="peft", mode=mode)
            report(f"warm: plan({model!r}, {mode})", timed(lambda: plan(model, recipe), runs), budget)  # noqa: B023

    for parallel, fewer in SEVERAL.items():
        recipe = Recipe(mode="full", parallel=parallel, gpus=512)
        times = timed(lambda: plan("llama-3.1-405b", recipe), max(runs // fewer, 1))  # noqa: B023
        report(f"warm: plan('llama-3.1-405b', {parallel} on 512)", times, RANK_BUDGET)
    for model in ("llama-3.1-8b", "llama-3.3-70b"):
        times = timed(lambda: swept(model), 1)  # noqa: B023
        report(f"sweep: {model}, {len(points())} points on several GPUs", times, SWEEP_BUDGET)

    from memplan.asked.gpus import find_gpu
    from memplan.importers.resolve import resolve
    from memplan.planning import predicted
    from memplan.planning.frontier import frontier
    from memplan.predict.parameters import resolve_recipe

    spec, card = resolve("llama-3.3-70b").spec, find_gpu("h200")
    run = predicted.run(spec, resolve_recipe(spec, Recipe(trainer="peft", mode="qlora")))
    loading = run.loading(None)
    simulated = timed(lambda: simulate(run.tape, loading, run.settings), runs)
    report(f"allocator: llama-3.3-70b, {len(run.tape.events)} events, twice", simulated, SIMULATION_BUDGET)
    recipes = [
        Recipe(trainer="peft", mode=mode, gradient_checkpointing=on, optimizer=optimizer)
        for mode in ("full", "lora", "qlora")
        for on in (True, False)
        for optimizer in ("adamw_torch_fused", "adamw_bnb_8bit")
    ]
    batches = [1, 2, 4, 8, 16, 32, 64, 128]
    times = timed(lambda: frontier(spec, recipes, card, batches, simulated=False), max(runs // 5, 1))
    report(f"frontier: llama-3.3-70b, {len(recipes) * len(batches)} points", times, FRONTIER_BUDGET)


def points() -> list[tuple[str, int, int]]:
    """Which strategy, how many cards, what batch."""
    return list(product(SEVERAL, (2, 4, 8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16)))


def swept(model: str) -> list[int]:
    """What ``memplan compare --sweep`` asks where no card is named."""
    from memplan import Recipe, plan

    return [
        plan(model, Recipe(mode="full", parallel=parallel, gpus=gpus, batch_size=batch)).peak.tensor_bytes
        for parallel, gpus, batch in points()
    ]


def process(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def timed(run: Callable[[], object], runs: int) -> list[float]:
    run()  # compiles bytecode, fills caches
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def report(label: str, times: list[float], budget: float | None = None) -> None:
    allowed = f"  (budget {budget * 1000:.0f} ms)" if budget else ""
    print(f"{label:45} {min(times) * 1000:8.1f} ms {median(times) * 1000:8.1f} ms{allowed}")


if __name__ == "__main__":
    main()
