"""The part of docs/accuracy.md about data/ranks.json."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

SECTION = """\
## Several GPUs

The real engines on cards that are not there: `python benchmarks/ranks/run.py` launched the scripts of
benchmarks/plain with accelerate, for tensor parallel with torchrun, {rows} times ({versions}; {engines}), on
the first layers of real models, and the first rank ran against a NCCL that sends nothing. Tensors at the peak
of a step, read off the dry run's
tape, are the plan's **to the byte in {tensors} of {rows}**; reserved bytes in {reserved}, within 1 % in
{within}. The scripts are transformers' own or TRL's; worlds of {worlds}; with and without checkpointing, one
and two passes a step. *Own defaults*: a stage as accelerate leaves it to DeepSpeed, without the settings of
transformers' example files. Of what is offloaded, tensors on the host are the plan's but for at most {host}
bytes that a training loop keeps there.

| model | layers | mode | strategy | GPUs | trainer | batch | tensors | | reserved | |
| --- | ---: | --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: |
{table}
{left}
"""

LEFT = """\
What is left: of ZeRO-3, a model that is made before the engine is not loaded quite so; with parameters on the
host, how long NCCL holds what it has sent hangs on its watchdog, and the plan has the longest, up to a tenth
more. Of adapters under ZeRO-2 and ZeRO-3, up to 4 % of what is reserved has no name yet; of flat parameters
that stay gathered while two passes accumulate (`SHARD_GRAD_OP`), 2.5 %. Three steps are played where the
second one reserves more than the first, as these runs have them. NCCL's own buffers lie beside the allocator
and are not counted.
"""


def section() -> str:
    """The section, from the file's rows."""
    rows = json.loads((ROOT / "data" / "ranks.json").read_text(encoding="utf-8"))["rows"]
    engines = Counter(row["recipe"]["parallel"] for row in rows)
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row["libraries"]
    worlds = sorted({row["recipe"]["gpus"] for row in rows})
    return SECTION.format(
        rows=len(rows),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        engines=", ".join(f"{count} of {name}" for name, count in sorted(engines.items())),
        tensors=sum(not _apart(row["tensors"]) for row in rows),
        reserved=sum(not _apart(row["reserved"]) for row in rows),
        within=sum(100 * abs(_apart(row["reserved"])) <= row["reserved"]["emulated"] for row in rows),
        worlds=", ".join(map(str, worlds[:-1])) + f" and {worlds[-1]}",
        host=f"{max(-_apart(row['host']) for row in rows if 'host' in row):,}",
        table="".join(map(_row, rows)),
        left=LEFT,
    )


def _apart(figure: dict[str, int]) -> int:
    return figure["predicted"] - figure["emulated"]


def _row(row: dict[str, Any]) -> str:
    recipe = row["recipe"]
    passes = recipe["gradient_accumulation_steps"]
    batch = f"{recipe['batch_size']} × {recipe['seq_len']}" + (f", {passes} passes" if passes > 1 else "")
    strategy = recipe["parallel"] + (f", offload {recipe['offload']}" if "offload" in recipe else "")
    if "dp_replicate" in recipe:
        strategy += f", {recipe['dp_replicate']} replicas"
    if "reshard_after_forward" in recipe:
        strategy += ", kept gathered"
    if {"overlap_comm", "reduce_bucket_size"} & recipe.keys():
        strategy += ", own defaults"
    cells = [row["model"], str(row["layers"]), recipe["mode"], strategy, str(recipe["gpus"])]
    cells += [recipe["trainer"], batch]
    for figure in (row["tensors"], row["reserved"]):
        cells += [f"{figure['emulated']:,}", f"{_apart(figure):+,}"]
    return f"| {' | '.join(cells)} |\n"
