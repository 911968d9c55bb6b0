"""docs/files.md, from memplan/runfiles and data/files.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memplan import rooms, runfiles
from memplan.errors import MemplanError
from memplan.runfiles import RunFile
from memplan.runfiles._keys import Keys

TEMPLATE = Path(__file__).parent / "templates" / "files.md"
ROWS = Path(__file__).parents[1] / "data" / "files.json"
SPECIAL = ("sample_packing", "attn_implementation")  # edits that change the step

# Files that between them have every key of their kind looked at.
_AXOLOTL = {
    "base_model": "x",
    "attn_implementation": "flash_attention_2",
    "lora_r": 8,
    "lora_target_linear": True,
}
PROBES: Mapping[str, tuple[dict[str, Any], ...]] = {
    "axolotl": (
        {**_AXOLOTL, "adapter": "qlora", "load_in_4bit": True, "lora_mlp_kernel": True},
        {**_AXOLOTL, "plugins": ["axolotl.integrations.liger.LigerPlugin", "cut_cross_entropy"]},
    ),
    "llama_factory": ({"stage": "sft", "quantization_bit": 4, "disable_gradient_checkpointing": False},),
    "trl": ({"use_peft": True, "load_in_4bit": True}, {"use_peft": False}),
    "training_arguments": ({},),
    "deepspeed": ({"zero_optimization": {"stage": 2}},),
    "accelerate": ({},),
}


def page() -> str:
    """The page."""
    kinds = [_kind(name, runfiles.find(name)) for name in rooms.names("runfiles")]
    rows = json.loads(ROWS.read_text(encoding="utf-8"))["rows"]
    return (
        TEMPLATE.read_text(encoding="utf-8")
        .replace("{kinds}\n", "\n".join(kinds))
        .replace("{rows}", "".join(map(_row, rows)).rstrip())
        .replace("{count}", str(len(rows)))
        .replace("{equal}", str(sum(row["why"] is None and not _apart(row, "tensors") for row in rows)))
        .replace("{blocks}", str(sum(row["why"] is None and not _apart(row, "allocated") for row in rows)))
        .replace("{reserved}", str(sum(row["why"] is None and not _apart(row, "reserved") for row in rows)))
        .replace("{versions}", "; ".join(dict.fromkeys(_versions(row) for row in rows if row["why"] is None)))
        .replace("{card}", rows[0]["gpu"].removeprefix("NVIDIA "))
    )


def _apart(row: Mapping[str, Any], figure: str) -> int:
    return int(row[figure]["predicted"] - row[figure]["emulated"])


def _versions(row: Mapping[str, Any]) -> str:
    said = ", ".join(f"{name} {version}" for name, version in row.get("libraries", {}).items())
    return f"{rooms.thing('runfiles', row['trainer'], 'RUNFILE', 'kind').title}: {said}"


def _row(row: Mapping[str, Any]) -> str:
    title = rooms.thing("runfiles", row["trainer"], "RUNFILE", "kind").title
    edits = row["edits"]
    special = [f"`{key}: {json.dumps(edits[key])}`" for key in SPECIAL if key in edits]
    cells = [title, f"`{row['file']}`", row["model"], ", ".join(special) or "–"]
    if row["why"] is not None:
        return f"| {' | '.join([*cells, row['why'], *'–––––'])} |\n"
    for figure in ("tensors", "allocated", "reserved"):
        cells += [f"{row[figure]['emulated']:,}", f"{_apart(row, figure):+,}"]
    return f"| {' | '.join(cells)} |\n"


def _kind(name: str, runfile: RunFile) -> str:
    taken, told = _keys(name, runfile)
    what = (runfile_doc(name) or "").partition("\n\n")[0].replace("\n", " ")
    lines = [f"## {runfile.title}\n", f"{what} Run with `{runfile.launch}`.\n"]
    if runfile.own:
        lines.append(f"Known by: {_listed(runfile.own)}.\n")
    for word, keys in (("Read", taken), ("Told", told), ("Ignored", set(runfile.ignored) - taken - told)):
        if keys:
            lines.append(f"**{word}**: {_listed(keys)}.\n")
    by_reason: dict[str, list[str]] = {}
    for key, why in runfile.refuses.items():
        by_reason.setdefault(why, []).append(key)
    if by_reason:
        lines.append("**Refused**:\n")
        lines += [f"- {_listed(keys)}: {why}" for why, keys in by_reason.items()]
        lines.append("")
    return "\n".join(lines)


def runfile_doc(name: str) -> str | None:
    """What the file of a kind says of itself."""
    from importlib import import_module

    return import_module(f"memplan.runfiles.{name}").__doc__


def _keys(name: str, runfile: RunFile) -> tuple[set[str], set[str]]:
    """Keys that are read, and those of which something is said."""
    known: set[str] = set()
    apart: set[str] = set()
    for probe in PROBES.get(name, ()):
        keys = Keys("", probe, lambda: "")
        try:
            runfile.read(keys)
        except MemplanError as error:
            raise AssertionError(f"{name}: {error}") from None
        known |= keys.looked_at
        apart |= keys.apart
    refused = set(runfile.refuses)
    return known - apart - refused, apart - refused


def _listed(keys: Any) -> str:
    return ", ".join(f"`{key}`" for key in sorted(keys))
