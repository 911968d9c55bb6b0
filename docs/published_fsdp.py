"""The part of docs/accuracy.md about data/published_fsdp_comparison.json."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

COMPARISON = Path(__file__).resolve().parent.parent / "data" / "published_fsdp_comparison.json"

SECTION = """\
## Held against published runs on several GPUs

Provenance: *published*, byte-exact, by fms-acceleration: Mistral-7B-v0.1 on two and four A100-80GB under
FSDP1 (accelerate, `TRANSFORMER_BASED_WRAP`, `BACKWARD_PRE`), 4,096 packed tokens a row, AdamW over foreach
lists, the libraries of a year and a half before; the most that the first rank had allocated. `python
benchmarks/published_fsdp.py` plans the {planned} of {rows} rows whose setup can be said: **all within
{worst:.4f} %** once one thing is named that these versions do otherwise.

Full fine-tuning peaks in the optimizer's update, {full} rows; kernels of others don't run there, so rows
that have them are in the table as well. What is missing, 3,072 to 23,040 bytes, are numbers of the
Trainer's and of FSDP's. LoRA and QLoRA: transformers 4.48 checkpointed *around* the layer that FSDP has
wrapped, reentrantly. So FSDP's forward runs again in backward, on inputs that are leaves of graphs of their
own, and its hooks (`_register_post_backward_reshard_only_hook`) keep them, and the gradients that they are
given, until backward is over: when the first layer's backward runs, the last, those of all other layers are
there. Today a layer checkpoints inside of what FSDP wraps, and they go one by one: what today's libraries
take is *predicted today*. The rest, 99,840 and 261,120 bytes, was not traced to a tensor.

| mode | GPUs | batch | kernels | published | predicted today | with what was held | error, bytes |
| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |
{table}
Not planned: {reasons}.
"""


def section() -> str:
    """The section, from the file's rows."""
    rows = json.loads(COMPARISON.read_text(encoding="utf-8"))["rows"]
    planned = [row for row in rows if "reason" not in row]
    reasons = Counter(row["reason"] for row in rows if "reason" in row)
    return SECTION.format(
        rows=len(rows),
        planned=len(planned),
        worst=max(100 * abs(_apart(row)) / row["published_bytes"] for row in planned),
        full=sum(row["phase"] == "optimizer" for row in planned),
        table="".join(map(_row, planned)),
        reasons="; ".join(f"{count} rows, {reason}" for reason, count in reasons.most_common()),
    )


def _apart(row: dict[str, Any]) -> int:
    apart: int = row["accounted_bytes"] - row["published_bytes"]
    return apart


def _row(row: dict[str, Any]) -> str:
    kernels = "others'" if "FOAK" in row["kernels_and_data"] else "stock"
    sizes = [f"{row[f'{name}_bytes']:,}" for name in ("published", "predicted", "accounted")]
    cells = [row["mode"], str(row["world_size"]), str(row["batch"]), kernels, *sizes, f"{_apart(row):+,}"]
    return f"| {' | '.join(cells)} |\n"
