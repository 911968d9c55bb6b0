"""docs/kernels.md, from the files that benchmarks/kernels.py writes, and from plans."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from memplan.asked.recipe import Recipe
from memplan.kernels.strips import FEW_ROWS
from memplan.planning.plan import plan

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
        plan(model, Recipe(kernels=kernels, **options), gpus=[]).peak.tensor_bytes
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
    """One run: its device, its ceilings, what is missing, and a table for each part."""
    versions = ", ".join(
        f"{name} {number}" for name, number in record["versions"].items() if number != "not installed"
    )
    limits = record["ceilings"]
    lines = [
        f"### {record['device']['name']}, {record['started']}",
        "",
        f"{versions}; {record['rounds']} rounds. A copy moves {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s, a "
        f"bf16 product computes {limits['product_flop_per_s'] / 1e12:.0f} TFLOP/s. Times are medians in µs, "
        "with the 10th to the 90th percentile, what they reach of that ceiling, and the most that a call "
        "allocates.",
    ]
    for said, names in (
        ("Left out", [f"{name} ({reason})" for name, reason in record["absent"].items()]),
        ("Parts that failed", [f"{name} ({reason})" for name, reason in record["failed"].items()]),
        ("Not finished in the time given", record["cut_short"]),
    ):
        if names:
            lines += ["", f"{said}: {', '.join(names)}."]
    for part in dict.fromkeys(result["part"] for result in record["results"]):
        results = [result for result in record["results"] if result["part"] == part]
        lines += ["", f"#### {part}", ""]
        if part in NOTES:
            lines += [NOTES[part], ""]
        lines += [summary(results), "", *table(results, limits)]
    return "\n".join(lines) + "\n"


NOTES = {
    "nf4_dequantize": "torchao's format is its own, at the same shape.",
    "nf4_quantize": "torchao's format is its own, with double quantisation.",
    "nf4_linear": "`strips` are of at most so many bytes, and sizes that cut a weight alike are timed once; "
    "`dense` multiplies by a weight that is 16-bit already. Unsloth's buffer for a forward's weight stays "
    "allocated and is not in its peaks.",
    "loss": "Linear + cross entropy with a frozen head, forward and backward to the hidden states; last in a "
    "case is Liger's chunk in tokens. `products` are the two products alone, so many tokens at a time: what "
    "the fastest loss takes over the fastest of them is what one of our own could gain at most.",
}

# by the first word of a candidate's name
OURS = ("memplan", "table", "comparisons", "strips", "fused")
STOCK = ("bitsandbytes", "stock")
CEILINGS = ("dense", "products")  # not to be had in training


def of(kinds: tuple[str, ...], times: dict[str, Any]) -> list[str]:
    """The candidates of some kinds, the fastest first."""
    return sorted(
        (name for name in times if name.split()[0] in kinds), key=lambda name: times[name]["median_us"]
    )


def competing(times: dict[str, Any]) -> list[str]:
    """All but the ceilings, the fastest first."""
    return of(tuple({name.split()[0] for name in times}.difference(CEILINGS)), times)


def lead(times: dict[str, Any], names: list[str]) -> tuple[str, float, bool] | None:
    """Of candidates with the fastest first: the fastest, by what share the next takes longer, and whether
    their spreads overlap. None of fewer than two.
    """
    if len(names) < 2:
        return None
    first, second = times[names[0]], times[names[1]]
    return names[0], second["median_us"] / first["median_us"] - 1, first["p90_us"] >= second["p10_us"]


def tally(results: list[dict[str, Any]], choose: Callable[[dict[str, Any]], list[str]]) -> str:
    """How often each of the chosen candidates is the fastest, and how often by no more than the spread."""
    leads = [lead(result["times"], choose(result["times"])) for result in results]
    wins = Counter(found[0] for found in leads if found)
    close = Counter(found[0] for found in leads if found and found[2])
    return ", ".join(
        f"{name} in {count}" + (f" ({close[name]} within the spread)" if close[name] else "")
        for name, count in wins.most_common()
    )


def summary(results: list[dict[str, Any]]) -> str:
    """Who is fastest, of all and of our own."""
    everyone, own = tally(results, competing), tally(results, partial(of, OURS))
    words = [f"Fastest of {len(results)} cases: {everyone}."] if everyone else []
    return " ".join([*words, *([f"Of memplan's own: {own}."] if own else [])])


def table(results: list[dict[str, Any]], limits: dict[str, float]) -> list[str]:
    """A part's results, a line each."""
    names = list(dict.fromkeys(name for result in results for name in (*result["times"], *result["failed"])))
    verdicts = [verdict(result) for result in results]
    heads = [head for head in verdicts[0] if any(found[head] for found in verdicts)]
    lines = [
        "| " + " | ".join(["case", *heads, *names]) + " |",
        "| --- |" + " ---: |" * (len(heads) + len(names)),
    ]
    for result, found in zip(results, verdicts, strict=True):
        cells = [
            " ".join(str(value) for value in result["case"].values()),
            *(found[head] for head in heads),
            *(cell(name, result, limits) for name in names),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def verdict(result: dict[str, Any]) -> dict[str, str]:
    """What a case says, by column; empty where it says nothing."""
    times = result["times"]
    found = dict.fromkeys(("fastest", "ahead of the next by", "stock takes", "over the products", "bits"), "")
    names, stock, products = competing(times), of(STOCK, times), of(("products",), times)
    best = lead(times, names)
    if best:
        found["fastest"] = best[0]
        found["ahead of the next by"] = f"{best[1]:.0%}" + (" (within the spread)" if best[2] else "")
    ours = of(OURS, times) or [name for name in names if name not in stock]
    if stock and ours:
        found["stock takes"] = _times(times, stock[0], ours[0])
    if names and products:
        found["over the products"] = _times(times, names[0], products[0])
    if "equal" in result:
        found["bits"] = "equal" if result["equal"] else "**not equal**"
    elif result.get("distance"):
        name = max(result["distance"], key=result["distance"].__getitem__)
        found["bits"] = f"within {result['distance'][name]:.1e} ({name})"
    return found


def _times(times: dict[str, Any], one: str, other: str) -> str:
    """How many times as long one takes as the other."""
    return f"{times[one]['median_us'] / times[other]['median_us']:.2f} × {other}"


def cell(name: str, result: dict[str, Any], limits: dict[str, float]) -> str:
    """A candidate's time, what it reaches of the ceiling, and its peak."""
    if name not in result["times"]:
        return str(result["failed"].get(name, "–"))
    time, peak = result["times"][name], result["peak_bytes"][name]
    words = [f"{time['median_us']:.0f} ({time['p10_us']:.0f}–{time['p90_us']:.0f})"]
    for amount, ceiling in (("bytes", "copy_bytes_per_s"), ("flop", "product_flop_per_s")):
        if amount in result:
            words.append(f"{result[amount] / time['median_us'] * 1e6 / limits[ceiling]:.0%}")
    if peak is not None:
        words.append(f"{peak / 2**20:.1f} MiB")
    return ", ".join(words)
