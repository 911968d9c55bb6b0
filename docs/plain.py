"""The part of docs/accuracy.md about data/plain.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

SECTION = """\
## Plain scripts

Above, the verifier's own programs are emulated, which build their models with the tracer's code: a fact
that is wrong in both would agree with itself. So here are scripts as users write them
(`benchmarks/plain`): `from_pretrained`, the Hugging Face Trainer or TRL's SFTTrainer, nothing of
memplan's. `python benchmarks/plain/run.py` ran {runs} of them on an emulated card ({device}; {versions}).
Bytes are `torch.cuda.max_memory_allocated` of the second step and `max_memory_reserved` of the run;
beside them is what the plan has more or less. {within} of {runs} are within 64 KiB and 0.5 %. {allocated} are
equal to the byte in what is allocated, {reserved} in what is reserved.

| script | model | options | allocated | | reserved | |
| --- | --- | --- | ---: | ---: | ---: | ---: |
{rows}
At 8,192 tokens 3.5 to 8.3 GiB more are reserved than are allocated where logits are whole (`qwen2.5-7b`), as
the plan says: people's reports of nearly none are of other code. TRL's loss never makes them whole, and loses
a third of a GiB.

A plan has what the Trainer's loop keeps beside the step, number by number, and the batches that wait to be
accumulated ([trainers.md](trainers.md#what-a-trainers-loop-keeps)). What is left: where a third step differs
from the second, blocks that lie elsewhere (`steps` in `data/plain.json`). DoRA in QLoRA: its tensors at the
peak are equal (`memplan dry-run --tape`, `memplan diff`); 1 MiB is of a block that is not split, in the
plan's simulated allocator only. Experts that a checkpoint holds one by one (Mixtral, Qwen, GLM) are merged
while they are loaded, and gpt-oss's are unpacked: in 16 bits while others arrive, by threads of transformers'
whose order is the machine's, and what is reserved differs from run to run with them, so these runs are
without (`HF_DEACTIVATE_ASYNC_LOAD=1`).
"""


def section() -> str:
    """The section, from the file's rows."""
    rows = json.loads((ROOT / "data" / "plain.json").read_text(encoding="utf-8"))["rows"]
    libraries = rows[0]["libraries"]
    return SECTION.format(
        runs=len(rows),
        device=rows[0]["device"].removeprefix("dry "),
        versions=", ".join(f"{name} {version}" for name, version in libraries.items()),
        within=sum(
            abs(_apart(row["allocated"])) <= 64 << 10
            and abs(_apart(row["reserved"])) <= 0.005 * row["reserved"]["emulated"]
            for row in rows
        ),
        allocated=sum(not _apart(row["allocated"]) for row in rows),
        reserved=sum(not _apart(row["reserved"]) for row in rows),
        rows="".join(map(_row, rows)),
    )


def _apart(figure: dict[str, int]) -> int:
    return figure["predicted"] - figure["emulated"]


def _row(row: dict[str, Any]) -> str:
    cells = [row["script"], row["model"], f"`{row['run']}`"]
    for figure in (row["allocated"], row["reserved"]):
        cells += [f"{figure['emulated']:,}", f"{_apart(figure):+,}"]
    return f"| {' | '.join(cells)} |\n"
