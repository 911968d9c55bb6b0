"""The part of docs/accuracy.md about data/scripts.json: scripts on a real card."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data"

SECTION = """\
## Scripts, and one rank of several, on a real card

*Measured* on an {device} ({libraries}): `python benchmarks/measure.py` ran the scripts of benchmarks/plain,
which import nothing of memplan's, {plain} of them alone on the card, and {ranks} as the first rank of several
GPUs, by the real engines: PyTorch's process group, its streams and its allocator on the real card, against
functions of NCCL that return at once. So what other ranks would send is whatever lies in memory, which is all
the same to how much is allocated; how long it takes to send, and NCCL's own buffers, are not in it. Plans are
for that card, whose cuBLAS workspaces are larger than the reference card's; the most of any step.

| | cases | allocated equal | within 0.1 % | worst | reserved equal | within 1 % | worst |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{summary}
{repeated} cases were run twice: {alike} of them reserved the same both times. Where they did
not, the host's pace decides which block is free when the next is asked for.
{emulated}
Farther than 1 % from the plan:

| case | | measured | predicted | |
| --- | --- | ---: | ---: | ---: |
{far}
{causes}
"""

EMULATED = """
An emulated card with the same libraries (torch 2.11) says the same to the byte of allocated in {allocated} of
the {cases} of these cases that it was asked about, and of reserved in {reserved}.
"""

CAUSES = """\
What is known of them: torch 2.11's `fully_shard` releases a layer earlier in TRL's step than 2.13's, which
plans are of (an emulated card with 2.11 says what was measured, one with 2.13 what is planned); with
parameters on the host, real copies end sooner than NCCL's watchdog looks, which is the longest that the
plan has. With adapters under ZeRO-3 these runs gather small parameters again in the second step; a dry run
that works out whole numbers, and the plan, find them there. What decides it is not known, and what is
computed here means nothing.
"""


def section() -> str:
    """The section, from the file's rows."""
    rows = json.loads((DATA / "scripts.json").read_text(encoding="utf-8"))["rows"]
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[_group(row)].append(row)
    twice = [row for row in rows if len(row["reserved"]["measured"]) > 1]
    emulated = [row for row in rows if "emulated" in row["allocated"]]
    libraries = ", ".join(f"{name} {version}" for name, version in rows[-1]["libraries"].items())
    return SECTION.format(
        device=rows[0]["device"],
        libraries=libraries,
        plain=sum(row["of"] == "plain" for row in rows),
        ranks=sum(row["of"] == "ranks" for row in rows),
        summary="".join(_summary(name, of) for name, of in groups.items()),
        repeated=len(twice),
        alike=sum(len(set(row["reserved"]["measured"])) == 1 for row in twice),
        emulated=EMULATED.format(
            cases=len(emulated),
            allocated=sum(_as_emulated(row, "allocated") for row in emulated),
            reserved=sum(_as_emulated(row, "reserved") for row in emulated),
        )
        if emulated
        else "",
        far="".join(_far(row, kind) for row in rows for kind in ("allocated", "reserved")),
        causes=CAUSES,
    )


def _group(row: dict[str, Any]) -> str:
    if row["of"] == "plain":
        return "alone on the card"
    return str(row["recipe"]["parallel"]) + (", on the host" if "offload" in row["recipe"] else "")


def _percent(row: dict[str, Any], kind: str) -> float:
    """By which the plan is off, of the run that it is nearest to."""
    figure = row[kind]
    off: list[float] = [100 * (figure["predicted"] - one) / one for one in figure["measured"]]
    return min(off, key=abs)


def _as_emulated(row: dict[str, Any], kind: str) -> bool:
    return row[kind]["emulated"] in row[kind]["measured"]


def _summary(name: str, rows: list[dict[str, Any]]) -> str:
    cells = [name, str(len(rows))]
    for kind, near in (("allocated", 0.1), ("reserved", 1.0)):
        off = [_percent(row, kind) for row in rows]
        cells += [str(sum(not one for one in off)), str(sum(abs(one) <= near for one in off))]
        cells.append(f"{max(off, key=abs):+.2f} %")
    return f"| {' | '.join(cells)} |\n"


def _far(row: dict[str, Any], kind: str) -> str:
    off = _percent(row, kind)
    if abs(off) <= 1:
        return ""
    measured = " and ".join(f"{one:,}" for one in dict.fromkeys(row[kind]["measured"]))
    return f"| {row['name']} | {kind} | {measured} | {row[kind]['predicted']:,} | {off:+.1f} % |\n"
