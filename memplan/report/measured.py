"""All measurements together: a campaign's rows on the terminal, the measured section of docs/accuracy.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.text import Text

from memplan.report.console import QUIET, Cell, heading, note, table
from memplan.report.markdown import markdown_table, markdown_text
from memplan.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.verify.compare import Comparison
    from memplan.verify.measurement import Measurement

Pairs = Sequence[tuple["Measurement", "Comparison"]]

WAITING = (
    "No measurement on a GPU is among these: `memplan verify MODEL --out FOLDER` makes one where there is a "
    "GPU."
)
HOST = (
    "These trained for real on a CPU: the libraries' own code, 4-bit weights and optimizers, with every "
    "storage counted that PyTorch allocated. Operators for which CUDA's kernels allocate otherwise than a "
    "CPU's were given CUDA's allocations beside the CPU's results ([verify.md](verify.md)). So they test "
    "that training keeps and drops what the plan says; they do not test a GPU."
)
# Upper ends of the histogram's bins, in per cent of what was measured.
BINS = (0.0, 0.01, 0.1, 0.5, 1.0)
WORST = 10


def show_campaign(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print how the runs of a campaign ended."""
    head: list[Sequence[Cell]] = [
        [Text(cell, QUIET) for cell in ("run", "outcome", "predicted", "measured", "error")]
    ]
    body = [
        [
            row["name"],
            row["outcome"],
            _gib(row["predicted"]),
            _gib(row["measured"]),
            "" if row["percent"] is None else f"{row['percent']:+.3f} %",
        ]
        for row in rows
    ]
    heading(console, "Runs", "GiB allocated at the peak")
    table(console, [*head, *body], "<<>>>")
    kinds: dict[str, int] = defaultdict(int)
    for row in rows:
        kinds[row["outcome"]] += 1
    note(console, f"{len(rows)} runs: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()) + ".")
    for row in rows:
        if row["why"] and row["outcome"] not in ("left",):
            note(console, f"{row['name']}: {row['why']}")


def _gib(nbytes: int | None) -> str:
    return "" if nbytes is None else gib(nbytes)


# -- the section of docs/accuracy.md -----------------------------------------------------------------------


def section(pairs: Pairs) -> str:
    """Markdown: measurements on GPUs by device, then those on hosts, never mixed."""
    cards: dict[str, list[tuple[Measurement, Comparison]]] = defaultdict(list)
    hosts: list[tuple[Measurement, Comparison]] = []
    for measured, found in pairs:
        if measured.device.kind == "cuda":
            cards[measured.device.name].append((measured, found))
        else:
            hosts.append((measured, found))
    parts = ["## Measured on GPUs\n"]
    if not cards:
        parts.append(WAITING + "\n")
    for name, members in sorted(cards.items()):
        parts += [f"### {markdown_text(name)}\n", *_device(members)]
    if hosts:
        parts += ["## Trained on a CPU (*measured, CPU storages*)\n", HOST + "\n", *_device(hosts)]
    return "\n".join(parts)


def _device(members: Pairs) -> Iterator[str]:
    first = members[0][0]
    versions = ", ".join(f"{name} {number}" for name, number in first.libraries.items())
    days = sorted({measured.date.partition("T")[0] for measured, _ in members})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    driver = f", driver {first.device.driver}" if first.device.driver else ""
    runs = f"{len(members)} runs" if len(members) > 1 else "1 run"
    yield markdown_text(f"{runs}, {when}{driver}; the first with {versions}.") + "\n"
    errors = [abs(found.allocated.percent) for _, found in members if found.allocated.percent is not None]
    if errors:
        yield (
            "Error of the peak of allocated bytes: "
            f"median {median(errors):.4g} %, worst {max(errors):.4g} %.\n"
        )
        yield _table(["error", "runs", ""], "<><", _histogram(errors))
    yield _table(
        ["run", "recipe", "outcome", "predicted", "measured", "error", "reserved", "error"],
        "<<<>>>>>",
        [_line(measured, found) for measured, found in members],
    )
    worst = sorted(
        (pair for pair in members if pair[1].allocated.error),
        key=lambda pair: -abs(pair[1].allocated.percent or 0),
    )[:WORST]
    if worst:
        yield "Worst cases, and the largest kind of tensor that one side alone holds at its peak:\n"
        rows = [
            [found.title, f"{found.allocated.error:+,}", found.reason or "block sizes only"]
            for _, found in worst
        ]
        yield _table(["run", "bytes", "tensor"], "<><", rows)


def _histogram(errors: Sequence[float]) -> list[list[str]]:
    rows = []
    low = -1.0
    for high in (*BINS, float("inf")):
        count = sum(low < error <= high for error in errors)
        label = "0" if high == 0 else f"to {high:g} %" if high < float("inf") else f"over {low:g} %"
        rows.append([label, str(count), "█" * round(30 * count / len(errors))])
        low = high
    return rows


def _line(measured: Measurement, found: Comparison) -> list[str]:
    from memplan.asked.recipe import Recipe
    from memplan.report.wording import asked_and_default

    usual = Recipe(mode=measured.recipe.mode, trainer=measured.recipe.trainer).resolved()
    options = [name for name, value in measured.recipe if value != getattr(usual, name)]
    asked, _ = asked_and_default(measured.recipe, options)
    outcome = found.outcome
    if found.outcome == "out of memory":
        outcome += ", as predicted" if found.fits_predicted is False else ", predicted to fit"
    if found.outcome == "trained" and found.fits_predicted is False:
        outcome += ", predicted not to fit"
    if measured.run.cap_name:
        outcome += f" (cap: {measured.run.cap_name})"
    allocated, reserved = found.allocated, found.reserved
    return [
        found.title,
        ", ".join(asked[1:]),
        outcome,
        *(_number(number) for number in (allocated.predicted, allocated.measured)),
        _percent(allocated.percent),
        _number(reserved.measured),
        _percent(reserved.percent),
    ]


def _number(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _percent(percent: float | None) -> str:
    return "" if percent is None else "0" if percent == 0 else f"{percent:+.3f} %"


def _table(head: Sequence[str], alignment: str, rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(head, alignment, rows)) + "\n"
