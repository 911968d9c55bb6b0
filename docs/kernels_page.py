"""docs/kernels.md, from the files that benchmarks/kernels.py writes, and from plans."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from memplan.asked.recipe import Recipe
from memplan.kernels.strips import FEW_ROWS, STRIP_BYTES
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
        plan(model, Recipe(trainer="peft", kernels=kernels, **options), gpus=[]).peak.tensor_bytes
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
    lines += ["", *conclusion(record), *targets(record), "", *findings(record)]
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
        cases = "1 case" if len(results) == 1 else f"{len(results)} cases"
        lines += [summary(results), "", f"<details><summary>{cases}</summary>", ""]
        lines += [*table(results, limits), "", "</details>"]
    return "\n".join(lines) + "\n"


# -- what was reached of what was aimed at -----------------------------------------------------------------

COPY_SHARE, OVER_BITSANDBYTES, OVER_SHORT, SHORT = 0.85, 1.3, 1.1, 1024  # the last in rows
FROM_ROWS = 512
LARGE = 32 << 20  # weights: an 8B's MLP has 56 Mi
STRIPS = f"strips {STRIP_BYTES >> 20} MiB"  # what a layer is multiplied in


def targets(record: dict[str, Any]) -> list[str]:
    """A table: what was aimed at before there was a GPU, what this run shows, and whether that is it."""
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in record["results"]:
        parts[result["part"]].append(result)
    dequantize, linear = parts["nf4_dequantize"], parts["nf4_linear"]
    nested = [result for result in dequantize if result["case"].get("nested")]
    copy = record["ceilings"]["copy_bytes_per_s"]

    def shares(name: str) -> list[float]:
        timed = [result for result in dequantize if name in result["times"]]
        return [result["bytes"] / _median(result, name) * 1e6 / copy for result in timed]

    rows = []
    for what, name in (("the kernel alone", "table"), ("the call", "memplan")):
        rows += [
            _aimed(
                f"dequantising, {what}: {COPY_SHARE:.0%} of the copy bandwidth",
                shares(name), COPY_SHARE, _share,
            ),
            _aimed(
                f"the same with nested scales: {OVER_BITSANDBYTES} × as fast as bitsandbytes",
                _gains(nested, "bitsandbytes", name), OVER_BITSANDBYTES, _gain,
            ),
        ]  # fmt: skip
    for direction in ("forward", "backward"):
        cases = [result for result in linear if result["case"].get("direction") == direction]
        longer = [result for result in cases if result["case"]["rows"] >= FROM_ROWS]
        short = [result for result in longer if result["case"]["rows"] <= SHORT]
        rows += [
            _aimed(
                f"linear, {direction}, from {FROM_ROWS} rows: never slower than bitsandbytes",
                _gains(longer, "bitsandbytes", STRIPS), 1.0, _gain,
            ),
            _aimed(
                f"the same up to {SHORT} rows: {OVER_SHORT} × as fast",
                _gains(short, "bitsandbytes", STRIPS), OVER_SHORT, _gain,
            ),
        ]  # fmt: skip
    rows.append(
        _aimed(
            "a QLoRA step of an 8B: faster than stock",
            _gains(parts["step_8b"], "stock", "memplan"),
            1.0,
            _gain,
        )
    )
    rows.append(_smaller("the same: smaller than stock", parts["step_8b"]))
    return ["| target | measured | reached |", "| --- | --- | --- |", *rows]


def _median(result: dict[str, Any], name: str) -> float:
    return float(result["times"][name]["median_us"])


def _gains(results: list[dict[str, Any]], stock: str, ours: str) -> list[float]:
    """How many times as fast ours is, by medians."""
    both = [result for result in results if {stock, ours} <= result["times"].keys()]
    return [_median(result, stock) / _median(result, ours) for result in both]


def _share(value: float) -> str:
    return f"{value:.0%}"


def _gain(value: float) -> str:
    return f"{value:.2f} ×"


def _aimed(target: str, values: list[float], least: float, form: Callable[[float], str]) -> str:
    if not values:
        return f"| {target} | – | not timed |"
    found = f"{form(min(values))} to {form(max(values))}, median {form(median(values))}"
    return f"| {target} | {found} | {_reached([value >= least for value in values])} |"


def _smaller(target: str, results: list[dict[str, Any]]) -> str:
    peaks = [
        result["peak_bytes"] for result in results if {"stock", "memplan"} <= result["peak_bytes"].keys()
    ]
    if not peaks:
        return f"| {target} | – | not timed |"
    saved = sorted({(peak["stock"] - peak["memplan"]) >> 20 for peak in peaks})
    words = " or ".join(f"{mib:,} MiB" for mib in saved) + " less"
    cases = [result["case"] for result in results]
    if not any(case["predicted_memplan_bytes"] < case["predicted_stock_bytes"] for case in cases):
        words += "; by their plans, too, the peaks of these recipes are elsewhere"
    return f"| {target} | {words} | {_reached([peak['memplan'] < peak['stock'] for peak in peaks])} |"


def _reached(verdicts: list[bool]) -> str:
    if all(verdicts):
        return f"in all {len(verdicts)} cases"
    return f"**missed** in {len(verdicts) - sum(verdicts)} of {len(verdicts)} cases"


def conclusion(record: dict[str, Any]) -> list[str]:
    """What whole steps say, if they all say it."""
    steps = [result for result in record["results"] if result["part"] in ("step_8b", "step_70b")]
    if max(_gains(steps, "stock", "memplan"), default=1) >= 1:
        return []
    return [
        "**Steps with memplan's kernels are slower than stock ones on this card.** They are for the memory "
        "that a plan says they save, not for speed.",
        "",
    ]


def findings(record: dict[str, Any]) -> list[str]:
    """What else the run says, a line each."""
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in record["results"]:
        parts[result["part"]].append(result)
    lines = []
    copy = record["ceilings"]["copy_bytes_per_s"]
    large = [
        result["bytes"] / _median(result, "table") * 1e6 / copy
        for result in parts["nf4_dequantize"]
        if "table" in result["times"] and prod(result["case"]["shape"]) >= LARGE
    ]
    if large:
        lines.append(
            f"- Dequantising {LARGE >> 20} Mi weights and more, the kernel alone reaches {min(large):.0%} to "
            f"{max(large):.0%} of the copy bandwidth."
        )
    apart = [
        _median(result, "memplan") - _median(result, "table")
        for result in parts["nf4_dequantize"]
        if {"memplan", "table"} <= result["times"].keys()
    ]
    if apart:
        lines.append(
            f"- Dequantising: the call takes {median(apart):.0f} µs more than its kernel (median): the "
            "result's allocation, the operator and the launch, on the host."
        )
    by_rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in parts["nf4_linear"]:
        by_rows[result["case"]["rows"]].append(result)
    medians = {
        rows: median(found)
        for rows, results in sorted(by_rows.items())
        if (found := _gains(results, "bitsandbytes", STRIPS))
    }
    if medians:
        told = ", ".join(f"{gain:.2f} at {rows:,}" for rows, gain in medians.items())
        lines.append(
            f"- Linear: {STRIPS} are so many times as fast as bitsandbytes (median): {told} rows. Each strip "
            "is a launch and a product more. That few rows lose most suggests that the host takes the time."
        )
    fused = _gains(parts["nf4_linear"], "fused", "dense")
    if fused:
        lines.append(
            f"- The fused product takes {min(fused):.0f} to {max(fused):.0f} times as long as the product "
            f"with a 16-bit weight (median {median(fused):.0f}). Nothing uses it unless told to."
        )
    for part, name in (("nf4_lora_linear", "A linear with its adapter"), ("step_8b", "Steps of an 8B"),
                       ("step_70b", "A step of a 70B")):  # fmt: skip
        slower = _gains(parts[part], "memplan", "stock")
        if slower:
            low, high = f"{min(slower):.2f}", f"{max(slower):.2f}"
            times = low if low == high else f"{low} to {high}"
            lines.append(f"- {name}: memplan takes {times} times as long as stock.")
    if not parts["loss"]:
        lines.append("- Losses were not timed.")
    return lines


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
