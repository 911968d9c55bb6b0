"""Hold the plan of several GPUs against peaks that others published: data/published_fsdp.json.

    python benchmarks/published_fsdp.py        writes data/published_fsdp_comparison.json

The rows are fms-acceleration's benchmarks under FSDP1 (scripts/benchmarks there), the most that a rank had in
a whole run; benchmarks/published.py says where their recipes are from. bf16 is autocast in the scenarios with
4-bit weights, and under FSDP1 mixed precision then.

What a row's versions do otherwise than today's: transformers 4.48 calls ``checkpoint`` around the layer that
FSDP has wrapped, reentrantly, so that FSDP's forward runs again in backward, on inputs that are leaves of a
graph of their own. FSDP hooks into those whose parameters are frozen
(``_register_post_backward_reshard_only_hook``), and keeps the hooks, and with them these inputs and their
gradients, until the end of backward: all layers' but the first one's, whose backward is last, are there when
it runs. Today a layer checkpoints inside. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.importers.resolve import resolve
from memplan.planning import predicted
from memplan.predict.parameters import resolve_recipe
from memplan.tape import Phase, Tape, replay, timeline

DATA = Path(__file__).resolve().parent.parent / "data"
PUBLISHED = DATA / "published_fsdp.json"
COMPARISON = DATA / "published_fsdp_comparison.json"
MODEL = "mistralai/Mistral-7B-v0.1"
VOCABULARY = 32_001  # 32,000 and <pad>
OTHER_KERNELS = "FOAK"


def rows() -> list[dict[str, Any]]:
    """What was published."""
    found: list[dict[str, Any]] = json.loads(PUBLISHED.read_text(encoding="utf-8"))["rows"]
    return found


def unsayable(row: dict[str, Any]) -> str:
    """Why a row can't be planned; nothing if it can."""
    if row["model"] != MODEL:
        return f"another family than those with a plan: {row['model']}"
    if not isinstance(row["seq"], int):
        return "lengths vary, and which rows met is not said"
    return ""


def recipe_of(row: dict[str, Any]) -> Recipe:
    """The row's, as far as today's stack has it."""
    options: dict[str, Any] = {
        "mode": row["mode"],
        "autocast": row["mode"] == "qlora" or "autocast" in row["dtype"],
        "optimizer": "adamw_torch",
        "gradient_checkpointing": True,
        "attn": "flash_attention_2",
        "loss": "shifted",
        "batch_size": row["batch"],
        "seq_len": row["seq"],
        "parallel": "fsdp",
        "gpus": row["world_size"],
        "backward_prefetch": "backward_pre",
    }
    if row["mode"] != "full":
        targets = ("q_proj", "k_proj", "v_proj", "o_proj")
        options |= {"r": 16, "lora_alpha": 16.0, "lora_dropout": 0.1, "target_modules": targets}
    if row["mode"] == "qlora":
        options["kbit_prep"] = False  # with its upcasts FSDP1 stops
    return Recipe(trainer="peft", **options)


def last_layer_back(tape: Tape) -> int:
    """Bytes at the most while the first layer, whose backward is the last one, has it."""
    levels: list[int] = [
        point.allocated_bytes
        for point in timeline(tape)
        if point.phase is Phase.BACKWARD and point.layer == 0
    ]
    return max(levels)


def held(spec: ModelSpec, row: dict[str, Any]) -> int:
    """Inputs of all layers but one, and as many gradients."""
    tokens: int = row["batch"] * row["seq"]
    return 2 * (spec.num_hidden_layers - 1) * tokens * spec.hidden_size * 2


def compare(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the comparison: ``predicted_bytes`` of today's stack, and what is there at the published peak
    with the tensors that the row's versions hold besides (``accounted_bytes``)."""
    names = ("ref", "model", "mode", "world_size", "batch", "seq", "dtype", "kernels_and_data", "versions")
    entry = {name: row[name] for name in names} | {"published_bytes": row["bytes"]}
    if reason := unsayable(row):
        return entry | {"reason": reason}
    spec = resolve(row["model"]).spec.model_copy(update={"vocab_size": VOCABULARY})
    run = predicted.run(spec, resolve_recipe(spec, recipe_of(row)), rank=0)
    peak = replay(run.tape)
    updating = peak.phase is Phase.OPTIMIZER
    if OTHER_KERNELS in row["kernels_and_data"] and not updating:
        return entry | {"reason": "other kernels: fused cross entropy, norms, rotations and adapters"}
    entry |= {"predicted_bytes": run.free.allocated, "phase": peak.phase.value}
    accounted = run.free.allocated if updating else last_layer_back(run.tape) + held(spec, row)
    return entry | {"held_bytes": 0 if updating else held(spec, row), "accounted_bytes": accounted}


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    compared = [compare(row) for row in rows()]
    for one in compared:
        name = f"{one['mode']} on {one['world_size']}, batch {one['batch']}"
        if "reason" in one:
            continue
        apart = one["accounted_bytes"] - one["published_bytes"]
        sys.stdout.write(f"{name}: {apart:+,} of {one['published_bytes']:,}\n")
    COMPARISON.write_text(json.dumps({"rows": compared}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
