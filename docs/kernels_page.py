"""docs/kernels.md, from the files that benchmarks/kernels.py writes, and from plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memplan.kernels.strips import FEW_ROWS
from memplan.planner import plan
from memplan.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "measurements" / "kernels"

TEMPLATES = Path(__file__).parent / "templates"

PLANS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama-3.3-70b", {"seq_len": 2048}),
    ("llama-3.3-70b", {"seq_len": 2048, "kbit_prep": False}),
    ("llama-3.3-70b", {"seq_len": 2048, "kbit_prep": False, "loss": "chunked"}),
    ("llama-3.3-70b", {"seq_len": 8192, "kbit_prep": False, "loss": "chunked"}),
    ("llama-3.1-8b", {"seq_len": 8192, "kbit_prep": False, "loss": "chunked"}),
    ("llama-3.1-8b", {"seq_len": 2048, "kbit_prep": False, "gradient_checkpointing": False}),
    ("llama-3.1-8b", {"seq_len": 4096, "kbit_prep": False, "gradient_checkpointing": False}),
)


def page() -> str:
    """docs/kernels.md."""
    template = (TEMPLATES / "kernels.md").read_text(encoding="utf-8")
    return template.format(
        few_rows=FEW_ROWS,
        plans="\n".join(planned(model, options) for model, options in PLANS),
        measured=measured(records(RESULTS)).rstrip(),
    )


def planned(model: str, options: dict[str, Any]) -> str:
    """A row of predicted peaks."""
    stock, ours = (
        plan(model, Recipe(kernels=kernels, **options), gpus=[]).peak.allocated_bytes
        for kernels in ("stock", "memplan")
    )
    words = [
        "PEFT's preparation" if options.get("kbit_prep", True) else "`--no-kbit-prep`",
        *(["`--loss chunked`"] if options.get("loss") else []),
        *(["`--no-gradient-checkpointing`"] if options.get("gradient_checkpointing") is False else []),
    ]
    sizes = " | ".join(f"{size / 2**30:.2f} GiB" for size in (stock, ours, stock - ours))
    return f"| {model} | {options['seq_len']} | {' '.join(words)} | {sizes} |"


def records(folder: Path) -> list[dict[str, Any]]:
    """All runs, oldest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda record: record["started"])


def measured(runs: list[dict[str, Any]]) -> str:
    """What the files say, a section for each run."""
    if not runs:
        return (TEMPLATES / "kernels_not_measured.md").read_text(encoding="utf-8")
    return "\n".join(section(record) for record in runs)


def section(record: dict[str, Any]) -> str:
    """One run: its device, its ceilings, and a table for each part."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    limits = record["ceilings"]
    lines = [
        f"### {record['device']['name']}, {record['started']}",
        "",
        f"{versions}; {record['rounds']} rounds. A copy moves {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s, a "
        f"bf16 product computes {limits['product_flop_per_s'] / 1e12:.0f} TFLOP/s. Times are medians in µs, "
        "with the 10th to the 90th percentile.",
    ]
    for part in dict.fromkeys(result["part"] for result in record["results"]):
        lines += ["", f"#### {part}", ""]
        lines += table([result for result in record["results"] if result["part"] == part], limits)
    return "\n".join(lines) + "\n"


THEIRS = ("bitsandbytes", "dense", "stock")


def table(results: list[dict[str, Any]], limits: dict[str, float]) -> list[str]:
    """A part's results, a line each."""
    names = list(results[0]["times"])
    heads = ["case", *names, *(f"peak {name}" for name in names), "equal bits", "of the ceiling"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for result in results:
        times, peaks = result["times"], result["peak_bytes"]
        best = min(times[name]["median_us"] for name in names if name not in THEIRS)
        cells = [
            " ".join(str(value) for value in result["case"].values()),
            *(f"{t['median_us']:.0f} ({t['p10_us']:.0f}–{t['p90_us']:.0f})" for t in times.values()),
            *("–" if peaks[name] is None else f"{peaks[name] / 2**20:.1f} MiB" for name in names),
            {True: "yes", False: "**no**", None: ""}[result.get("equal")],
            _reached(result, limits, best),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _reached(result: dict[str, Any], limits: dict[str, float], best_us: float) -> str:
    """What our fastest candidate reaches of what the card can do."""
    for amount, ceiling in (("bytes", "copy_bytes_per_s"), ("flop", "product_flop_per_s")):
        if amount in result:
            return f"{result[amount] / best_us * 1e6 / limits[ceiling]:.0%}"
    return ""
