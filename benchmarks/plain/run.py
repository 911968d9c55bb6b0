"""Plain scripts on the card that is not there, held against the plan: what a user's own program takes.

    python benchmarks/plain/run.py                     every case of cases.json; writes data/plain.json
    python benchmarks/plain/run.py NAME ...            some of them; writes nothing, or with --merge their
                                                       rows beside the others
    python benchmarks/plain/run.py --predictions [NAME ...]   what the plan says now, beside what was emulated
                                                       then; writes data/plain.json

Needs the environment of benchmarks/dry_gpu/README.md. The scripts and what they load import nothing of
memplan's. Exit status 1 if a case's peak of allocated bytes is more than 64 KiB from the plan's, or its
reserved bytes more than 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from memplan import Recipe, plan

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "data" / "plain.json"
_TOLD = ("name", "script", "model", "run", "environment", "lengths")
ALLOCATED, RESERVED = 64 << 10, 0.005  # bytes; a share
TRAINERS = {
    "hf_trainer": "peft",
    "trl_sft": "trl",
    "trl_guide": "trl",
    "trl_vision": "trl",
}  # whose defaults a script's recipe has
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


def cases() -> list[dict[str, Any]]:
    """What cases.json lists."""
    listed: list[dict[str, Any]] = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))["cases"]
    return listed


def made(case: dict[str, Any], folder: Path) -> Path:
    """A case's checkpoint; ``layers``: how many it has, if not as many as its model."""
    layers = ["--layers", str(case["layers"])] if "layers" in case else []
    checkpoint = folder / "-".join([case["model"], *layers[1:]])
    if not checkpoint.exists():
        _memplan({}, "stub", case["model"], str(checkpoint), *layers)
    return checkpoint


def emulated_before() -> dict[str, dict[str, Any]]:
    """What :func:`emulated` said of each case, as its row has it."""
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return {row["name"]: {**row, "reserved": row["reserved"]["emulated"]} for row in rows}


def emulated(case: dict[str, Any], folder: Path, gpu: str) -> dict[str, Any]:
    """What a case's script wrote: bytes by step, the device, versions. Raises RuntimeError with the script's
    last words if it failed."""
    checkpoint = made(case, folder)
    out = folder / f"{case['name']}.json"
    settings = {
        "PYTORCH_ALLOC_CONF": case["recipe"].get("alloc_conf", ""),
        **case.get("environment", {}),
    }
    asked = [str(checkpoint), "--out", str(out), *case["run"].split()]
    script = [sys.executable, str(HERE / f"{case['script']}.py"), *asked]
    if _watched(case):  # shapes depend on values, which are worked out where the run is watched
        lengths = ["--lengths", *map(str, case["lengths"])] if "lengths" in case else []
        watched = ["--steps", "99", "--json", "--gpu", gpu, "--", *script, *lengths]
        told = json.loads(_memplan(settings, "dry-run", *watched))
        steps = [
            {kind: step[f"{kind}_bytes"] for kind in ("allocated", "reserved")} for step in told["steps"]
        ]
    else:
        _memplan(settings, "dry-run", "--no-watch", "--gpu", gpu, "--", *script)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if _watched(case):  # in which memplan, and not the script, takes what each step has at most
        found |= {"steps": steps, "reserved": max(step["reserved"] for step in steps)}
    return found


def _watched(case: dict[str, Any]) -> bool:
    """Whether its tensors are as long as values say: of rows that differ, of images."""
    return "lengths" in case or case["script"] == "trl_vision"


def _memplan(settings: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "memplan", *arguments],
        cwd=ROOT,
        env={**os.environ, **QUIET, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()[-800:]}")
    return done.stdout


def row(case: dict[str, Any], checkpoint: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Both sides of a case, in bytes: what the plan of the checkpoint's ``config.json`` says, and what the
    script took. Allocated is the second step's, which the plan plays; a third may place blocks otherwise. Of
    lengths that differ, and of images, whose batches lie elsewhere in each step, it is the most of any
    step."""
    recipe = {"trainer": TRAINERS[case["script"]], **case["recipe"]}
    lengths = case.get("lengths") if recipe.get("batches") != "packed" else None
    predicted = plan(checkpoint, Recipe(**recipe), gpus=[], lengths=lengths).allocator
    steps = found["steps"]
    any_step = lengths is not None or case["script"] == "trl_vision"
    allocated = max(step["allocated"] for step in steps) if any_step else steps[1]["allocated"]
    return {
        **{name: case[name] for name in _TOLD if name in case},
        "recipe": recipe,
        "allocated": {"predicted": predicted.allocated_bytes, "emulated": allocated},
        "reserved": {"predicted": predicted.reserved_bytes, "emulated": found["reserved"]},
        "steps": found["steps"],
        "device": found["device"],
        "libraries": found["libraries"],
        "date": found.get("date") or date.today().isoformat(),
    }


def equal(one: dict[str, Any]) -> bool:
    """Whether a row is within what is promised."""
    allocated, reserved = one["allocated"], one["reserved"]
    return bool(
        abs(allocated["predicted"] - allocated["emulated"]) <= ALLOCATED
        and abs(reserved["predicted"] - reserved["emulated"]) <= RESERVED * reserved["emulated"]
    )


def beside(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are there with these in their places, in the order of the cases. Each has its date."""
    there: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    known = {row["name"]: row for row in (*there, *rows)}
    return [known[case["name"]] for case in cases() if case["name"] in known]


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases (default: all, which are written)")
    parser.add_argument("--merge", action="store_true", help="write the rows of those that were run")
    parser.add_argument("--predictions", action="store_true", help="renew the plan's side of rows only")
    parser.add_argument("--gpu", default="a100", help="the card (default: %(default)s)")
    asked = parser.parse_args()
    chosen = [case for case in cases() if not asked.names or case["name"] in asked.names]
    if len(chosen) < len(asked.names):
        parser.error(f"cases.json has only {', '.join(case['name'] for case in cases())}")
    before = emulated_before() if asked.predictions else {}
    if asked.predictions:
        chosen = [case for case in chosen if case["name"] in before]
    rows, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="plain-") as folder:
        for case in chosen:
            try:
                found = before.get(case["name"]) or emulated(case, Path(folder), asked.gpu)
                one = row(case, made(case, Path(folder)), found)
            except RuntimeError as error:
                print(f"{case['name']:28} failed: {error}", flush=True)
                failed += 1
                continue
            rows.append(one)
            failed += not equal(one)
            told = " ".join(
                f"{kind} {one[kind]['emulated']:>14,} {one[kind]['predicted'] - one[kind]['emulated']:>+12,}"
                for kind in ("allocated", "reserved")
            )
            print(f"{case['name']:28} {told} {'' if equal(one) else '  APART'}", flush=True)
    print(f"{len(rows)} rows, {failed} apart or failed: bytes, and what the plan has more or less")
    if asked.merge or asked.predictions:
        rows = beside(rows)
    if asked.merge or asked.predictions or not asked.names:
        RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
