"""docs/accuracy.md, from the results in data/."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from textwrap import fill
from typing import Any

import emulated
import measured
import plain
import published
import published_fsdp
import reports
import scripts
import several_gpus

ROOT = Path(__file__).resolve().parent.parent

HEAD = """\
# Accuracy

Made by `python docs/generate.py` from `data/reconciliation.json`, `data/emulated.json`, `data/plain.json`,
`data/ranks.json`, `data/scripts.json`, `data/measured_emulated.json`, `data/published_comparison.json`,
`data/published_fsdp_comparison.json` and `data/reports_comparison.json`, which `benchmarks/reconcile.py`,
`benchmarks/dry_gpu/compare.py`, `benchmarks/plain/run.py`, `benchmarks/ranks/run.py`,
`benchmarks/measure.py`, `benchmarks/dry_gpu/against_measured.py`, `benchmarks/published.py`,
`benchmarks/published_fsdp.py` and `benchmarks/reports.py` write, and
from the files of `data/measurements`, which `memplan verify` writes.

*Predicted* is the plan; *traced* is the real libraries' step under fake tensors on a CPU
([how-it-works.md](how-it-works.md)); *emulated* is the real step on PyTorch's CUDA build, without a GPU.
{gpus}

Which number is compared: with traces and published peaks the sum of live tensors (`peak.tensor_bytes`),
for a trace has no blocks; with emulated runs, plain scripts and measurements what the allocator counts,
which is what `torch.cuda.max_memory_allocated` says and memplan prints (`peak.allocated_bytes`).

## Predicted against traced

{count} cases, {date}, {versions}.
They are chosen by pairwise cover: every two values of any two options
(model, mode, optimizer, targets, adapter dtype, checkpointing, attention, loss, dtype, autocast, dropout,
DoRA, modules to save, upcasts, double quantisation, batch and length, accumulation, clipping …) meet in some
case, as far as the libraries let them. Layers have their true sizes; {deep} cases have all of their layers.

A case **agrees** when both peaks have the same bytes in the same phase, operation and layer.

| family | cases | agree | static bytes agree by category | every allocation of the step agrees |
| --- | ---: | ---: | ---: | ---: |
"""

BELOW = """
{deviations}

The last column asks more than the contract: the same allocations in the same order with the same live bytes
after each, all through the step. The split of a peak into categories is no part of it: the tracer tells
activations and temporaries apart by when a storage is born and dies, the plan by what made it, and
{categories} of {count} cases have the same split to the byte.

Each loss is traced in the code of the library that it comes from ([tracing.md](tracing.md#fused-losses)):

| loss | library | cases | agree | every allocation of the step agrees |
| --- | --- | ---: | ---: | ---: |
{losses}
### A 70B on a 48 GB card

Llama-3.3-70B, QLoRA r=8 on all linear layers, 1 × 2048 tokens, all 80 layers:

| recipe | predicted | traced | peak in |
| --- | ---: | ---: | --- |
"""

ABOUT_70B = """
The upcasts of `prepare_model_for_kbit_training` decide whether it fits a card with 48 GB.

"""


def page() -> str:
    """The page."""
    run = json.loads((ROOT / "data" / "reconciliation.json").read_text(encoding="utf-8"))
    results: list[dict[str, Any]] = run["results"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if name != "memplan")
    deep = sum(result["case"]["layers"] is None for result in results)
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        families[result["family"]].append(result)
    gpus = (
        fill(f"*Measured* ([below](#measured-on-gpus)): {measured.summary()}", 118)
        if measured.on_gpus()
        else "Nothing here is *measured* on a GPU by us: none has confirmed these numbers yet."
    )
    text = HEAD.format(gpus=gpus, count=len(results), versions=versions, date=run["date"], deep=deep)
    for family, members in [*sorted(families.items()), ("**all**", results)]:
        sums = [
            sum(bool(member.get(key)) for member in members)
            for key in ("agrees", "static_agrees", "step_agrees")
        ]
        text += f"| {family} | {len(members)} | {' | '.join(map(str, sums))} |\n"
    categories = sum(bool(result.get("categories_agree")) for result in results)
    text += BELOW.format(
        deviations=_deviations(),
        categories=categories,
        count=len(results),
        losses=_losses(results, run["versions"]),
    )
    for result in results:
        if result["case"]["model"] == "llama-3.3-70b":
            prepared = result["case"].get("kbit_prep", True)
            peaks = [f"{result[kind]['peak_bytes']:,}" for kind in ("predicted", "traced")]
            name = "with the upcasts (default)" if prepared else "without them (`--no-kbit-prep`)"
            if result["case"].get("kernels") == "memplan":
                name += ", memplan's kernels"
            text += f"| {name} | {peaks[0]} | {peaks[1]} | `{result['traced']['operation']}` |\n"
    sections = (emulated, plain, several_gpus, scripts, measured, published, published_fsdp, reports)
    return text + ABOUT_70B + "\n".join(part.section() for part in sections)


def _losses(results: list[dict[str, Any]], versions: dict[str, str]) -> str:
    rows = ""
    for loss, library in (("standard", "transformers"), ("chunked", "trl"), ("liger", "liger-kernel")):
        members = [result for result in results if result["case"].get("loss", "standard") == loss]
        sums = [sum(bool(member.get(key)) for member in members) for key in ("agrees", "step_agrees")]
        rows += f"| `{loss}` | {library} {versions[library]} | {len(members)} | {sums[0]} | {sums[1]} |\n"
    return rows


def _deviations() -> str:
    known = json.loads((ROOT / "benchmarks" / "deviations.json").read_text(encoding="utf-8"))["deviations"]
    if not known:
        return "Known deviations: none."
    rows = "".join(
        f"| `{each['case']}` | {each['tensor']} | {each['bytes']:+,} | {each['reason']} |\n" for each in known
    )
    return (
        f"Known deviations:\n\n| cases with | tensor | bytes | reason |\n| --- | --- | ---: | --- |\n{rows}"
    )
