"""Trace the published rows with the library versions that they ran: see README.md beside this file."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from memplan.asked.recipe import Recipe
from memplan.tape import Tape, replay
from memplan.trace import trace

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
QLORA = {"baseline-peft-bnb": True, "accelerated-peft-bnb": False}  # PEFT's upcasts or none


def recipe(row: dict[str, Any]) -> Recipe:
    """What the row ran (benchmarks/published.py says where that is written)."""
    options: dict[str, Any] = {
        "mode": row["mode"],
        "attn": "flash_attention_2",
        "gradient_checkpointing": True,
        "use_reentrant": True,
        "optimizer": "adamw_torch",
        "batch_size": row["batch"],
        "seq_len": 4096,
    }
    if row["mode"] != "full":
        options |= {
            "r": 16,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
        }
    if row["framework_config"] in QLORA:
        options |= {"mode": "qlora", "autocast": True, "kbit_prep": QLORA[row["framework_config"]]}
    return Recipe(trainer="peft", **options)


def moments(tape: Tape) -> dict[str, int]:
    """The highest live bytes of each part of the step."""
    highest: dict[str, int] = {}
    live = 0
    for segment in tape.segments:
        name = segment.phase.value
        if name == "backward":
            name = "loss's backward" if segment.layer is None else "layers' backward"
        for delta in tape.deltas[segment.start : segment.stop]:
            live += delta
            if name != "setup":
                highest[name] = max(highest.get(name, 0), live)
    return highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="memplan's data folder")
    parser.add_argument("out", type=Path, help="the JSON file to write, for benchmarks/published.py --traced")
    args = parser.parse_args()
    models = json.loads((args.data / "model_specs.json").read_text("utf-8"))["models"]
    config = next(model["config"] for model in models if model["alias"] == "mistral-7b-v0.1")
    peaks: dict[str, Any] = {}
    for row in json.loads((args.data / "published_measurements.json").read_text("utf-8"))["rows"]:
        if not row["source"].startswith("fms") or row["framework_config"] not in {"none", *QLORA}:
            continue
        tape = trace({**config, "vocab_size": 32_001}, recipe(row))
        peak = replay(tape)
        peaks[row["ref"]] = {
            "bytes": peak.allocated_bytes,
            "phase": peak.phase.value,
            "operation": peak.operation,
            "moments": moments(tape),
        }
        print(row["ref"], peak.allocated_bytes - row["bytes"], flush=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    result = {"versions": f"{versions}, trl 0.13.0", "peaks": peaks}
    args.out.write_text(json.dumps(result, indent=1), "utf-8")


if __name__ == "__main__":
    main()
