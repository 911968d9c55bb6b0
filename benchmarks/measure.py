"""The plain scripts on a real GPU: alone on it, and as one rank of several by the real engines.

    python benchmarks/measure.py [--seconds N] [--jobs N] [--only TEXT] [--out FOLDER]
    memplan dry-run --no-watch --gpu h200 -- python benchmarks/measure.py --out FOLDER    the same, emulated
    python benchmarks/measure.py --compare [--emulated FOLDER]    all rows, the plan; writes data/scripts.json

The cases are those of benchmarks/plain and benchmarks/ranks, and the scripts import nothing of memplan's. Of
several ranks the first trains on the card that is there, with PyTorch's process group for NCCL, its streams
and its allocator; NCCL's own functions are stubs that return at once (memplan/emulate/card/libraries.c), so
what other ranks would send is whatever lies in memory, and what is computed from it means nothing. How much
is allocated does not depend on it. NCCL's own buffers, and how long it takes to send, are not in these
figures. cuDNN's attention is off, for plans have FlashAttention.

Writes what torch.cuda says of each step, with the device and the versions: *measured*. Needs accelerate,
transformers, TRL, PEFT, bitsandbytes, datasets, pydantic and a C compiler, and DeepSpeed for ZeRO. Cases are
taken in turns of scripts and engines until ``--seconds`` are over; ``--jobs`` run at a time, which
torch.cuda's figures of a process don't show. ``--resume`` passes over cases that the folder has. Exit status
1 if a case failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from memplan import Recipe
from memplan.asked.lengths import Lengths
from memplan.cuda.card import Card
from memplan.emulate import build, launch, program
from memplan.importers.hf import spec_from_config
from memplan.importers.resolve import resolve_config
from memplan.planning import predicted
from memplan.predict.parameters import resolve_recipe
from memplan.verify.job import cut

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = ROOT / "data" / "measurements" / "scripts"
COMPARED = ROOT / "data" / "scripts.json"
CAPABILITIES = {"NVIDIA H200": (9, 0), "NVIDIA H100 80GB HBM3": (9, 0)}
PATIENCE = 240.0  # seconds for one case
NCCL = "libnccl.so.2"


def table(name: str) -> ModuleType:
    """The module that lists the cases of ``name``."""
    spec = importlib.util.spec_from_file_location(f"{name}_cases", HERE / name / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Case(NamedTuple):
    """``of``: which table has it. ``arguments``: the script's, without where the checkpoint and peaks are."""

    of: str
    name: str
    kind: str
    model: str
    layers: int | None
    script: str
    arguments: tuple[str, ...]
    recipe: dict[str, Any]
    launched: tuple[str, ...] = ()


def cases(only: str | None) -> list[Case]:
    """The scripts and engines in turns. Mixtures of experts on several ranks are left out: their routers
    would read what others have not sent."""
    found = []
    plain = table("plain")
    for one in plain.cases():
        lengths = ("--lengths", *map(str, one["lengths"])) if "lengths" in one else ()
        recipe = {"trainer": plain.TRAINERS[one["script"]], **one["recipe"]}
        place = one["name"], one["script"], one["model"], one.get("layers")
        found.append(Case("plain", *place, f"{one['script']}.py", (*one["run"].split(), *lengths), recipe))
    for one in table("ranks").cases():
        if "a3b" not in one.model:
            launched = ("-m", "accelerate.commands.launch", *one.launched[2:])
            place = one.name, one.engine, one.model, one.layers
            found.append(Case("ranks", *place, one.script, one.arguments, one.recipe, launched))
    waiting: dict[str, list[Case]] = {}
    for case in found:
        if only is None or only in case.name:
            waiting.setdefault(case.kind, []).append(case)
    listed = []
    while any(waiting.values()):
        listed += [of_kind.pop(0) for of_kind in waiting.values() if of_kind]
    return listed


def found(folder: Path, *, emulated: bool) -> dict[str, list[dict[str, Any]]]:
    """The rows of a folder's files by their names; without those that failed."""
    files = map(_read, sorted(folder.glob("*.json")))
    rows: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        if file.get("emulated", False) is emulated:
            for row in file["rows"]:
                if "failed" not in row:
                    rows.setdefault(row["name"], []).append(row)
    return rows


def planned(case: Case, device: str) -> dict[str, int]:
    """What the plan says of a case on that card: the most of any of its steps."""
    read = resolve_config(case.model)
    config = read.config if case.layers is None else cut(read.config, case.layers, case.model)
    spec = spec_from_config(config, read.name, read.hub_id)
    recipe = resolve_recipe(spec, Recipe(**case.recipe))
    lengths = None
    if "--lengths" in case.arguments and "--packing" not in case.arguments:
        given = case.arguments[case.arguments.index("--lengths") + 1 :]
        lengths = Lengths("the script", tuple(map(int, given)))
    rank = 0 if case.of == "ranks" else None
    run = predicted.run(spec, recipe, Card(CAPABILITIES[device]), lengths, rank)
    return {"allocated": run.free.allocated, "reserved": run.free.reserved}


def compared(folder: Path, emulated: Path | None) -> list[dict[str, Any]]:
    """A row for each case that was measured: the plan, each time that it was measured, and what an emulated
    card with the same libraries says, where ``emulated`` has it."""
    listed = {case.name: case for case in cases(None)}
    also = {} if emulated is None else found(emulated, emulated=True)
    before = {row["name"]: row for row in _read(COMPARED)["rows"]} if emulated is None else {}
    rows = []
    for name, times in found(folder, emulated=False).items():
        case, last = listed[name], times[-1]
        plan = planned(case, last["device"])
        row: dict[str, Any] = {
            **{
                key: last[key]
                for key in ("of", "name", "model", "script", "arguments", "device", "libraries")
            },
            "recipe": case.recipe,
        }
        alike = [one for one in also.get(name, ()) if one["libraries"] == last["libraries"]]
        if case.of == "ranks" and "fsdp" not in case.kind:
            alike = []  # DDP's order and DeepSpeed's steps hang on numbers that a card without values has not
        for kind, size in plan.items():
            row[kind] = {"predicted": size, "measured": [_most(one, kind) for one in times]}
            if alike:
                row[kind]["emulated"] = _most(alike[-1], kind)
            elif "emulated" in before.get(name, {}).get(kind, ()):
                row[kind]["emulated"] = before[name][kind]["emulated"]
        rows.append(row)
        sides = (f"{kind} {row[kind]['predicted'] - row[kind]['measured'][-1]:+,}" for kind in plan)
        sys.stdout.write(f"{name}: {', '.join(sides)}\n")
        sys.stdout.flush()
    return rows


def _read(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def _most(row: dict[str, Any], kind: str) -> int:
    return max(int(step[kind]) for step in row["steps"])


def silent_nccl(folder: Path) -> Path:
    """NCCL's library, whose functions do nothing, for the PyTorch that runs this."""
    found = program.find([sys.executable])
    symbols = build.wanted(sorted((found.torch / "lib").glob("*.so")))[NCCL].symbols
    rest, made = folder / "nccl.c", folder / NCCL
    rest.write_text("".join(f"__attribute__((weak)) int {name}(void) {{ return 0; }}\n" for name in symbols))
    versions = ["-DNCCL_MAJOR=2", "-DNCCL_MINOR=28", "-DNCCL_PATCH=9", "-DRELEASE=13000"]
    flags = ["-shared", "-fPIC", "-O1", "-w", "-DNCCL", *versions, f"-I{build.SOURCES}"]
    sources = [str(build.SOURCES / "libraries.c"), str(rest)]
    subprocess.run(
        [*build.compiler(), *flags, *sources, f"-Wl,-soname,{NCCL}", "-ldl", "-o", str(made)], check=True
    )
    return made


class Runs:
    """Where checkpoints and results are."""

    def __init__(self, folder: Path, until: float) -> None:
        self.folder, self.until = folder, until
        self.nccl = silent_nccl(folder)
        self.making: dict[Path, threading.Lock] = {}

    def checkpoint(self, case: Case) -> Path:
        """Of the right shapes; it takes no disk."""
        place = self.folder / f"{case.model.replace('/', '--')}-{case.layers or 'all'}"
        with self.making.setdefault(place, threading.Lock()):
            if not place.exists():
                layers = [] if case.layers is None else ["--layers", str(case.layers)]
                subprocess.run(
                    [sys.executable, "-m", "memplan", "stub", case.model, str(place), *layers],
                    env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": _paths(ROOT)},
                    check=True,
                    capture_output=True,
                    text=True,
                )
        return place

    def run(self, number: int, case: Case) -> dict[str, Any] | None:
        """A case's row; None if there was no time for it."""
        began = time.monotonic()
        if began > self.until:
            return None
        row: dict[str, Any] = {"of": case.of, "name": case.name, "model": case.model, "script": case.script}
        row["arguments"] = [*case.arguments]
        mine = self.folder / str(number)
        mine.mkdir()
        try:
            out = mine / "peaks.json"
            port = ("--main_process_port", str(29600 + number)) if case.launched else ()
            script = [str(HERE / "plain" / case.script), str(self.checkpoint(case)), "--out", str(out)]
            subprocess.run(
                [sys.executable, *case.launched, *port, *script, *case.arguments],
                env=self.environment(case, mine),
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PATIENCE,
            )
            found = json.loads(out.read_text(encoding="utf-8"))
            row |= {key: found[key] for key in ("allocated", "reserved", "steps", "device", "libraries")}
        except subprocess.CalledProcessError as error:
            row["failed"] = (error.stderr or "").strip().splitlines()[-60:]
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            row["failed"] = [f"{type(error).__name__}: {error}"]
        return {**row, "seconds": round(time.monotonic() - began, 1)}

    def environment(self, case: Case, mine: Path) -> dict[str, str]:
        """A case's: QUIET, and what benchmarks/card_alone/sitecustomize.py reads."""
        told = {"ranks": [0], "folder": str(mine), "hook": str(launch.HOOK)}
        found = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore",
            "MEMPLAN_PLAYED": json.dumps(told),
            "PYTHONPATH": _paths(HERE / "card_alone"),
            "PYTORCH_ALLOC_CONF": case.recipe.get("alloc_conf") or "",
        }
        return {**found, "LD_PRELOAD": str(self.nccl)} if case.launched else found


def _write(path: Path, record: dict[str, Any]) -> None:
    path.with_suffix(".part").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".part").replace(path)


def _paths(first: Path) -> str:
    return os.pathsep.join(filter(None, (str(first), os.environ.get("PYTHONPATH"))))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT", help="cases with this text in their names")
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no case after them")
    parser.add_argument("--jobs", type=int, default=4, help="cases at a time (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="pass over cases that the folder has")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--compare", action="store_true", help="hold what was measured against the plan")
    parser.add_argument(
        "--emulated", type=Path, metavar="FOLDER", help="and against these (default: as before)"
    )
    asked = parser.parse_args()
    if asked.compare:
        if asked.emulated is not None and not found(asked.emulated, emulated=True):
            parser.error(f"{asked.emulated} has no emulated runs")
        _write(COMPARED, {"schema_version": 1, "rows": compared(asked.out, asked.emulated)})
        return 0
    emulated = "MEMPLAN_CARD" in os.environ
    until = time.monotonic() + asked.seconds
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record: dict[str, Any] = {
        "schema_version": 1,
        "about": "Program output: benchmarks/measure.py. "
        + ("Emulated: the card is not there." if emulated else "Measured on the device that each row names."),
        "emulated": emulated,
        "started": started,
        "rows": [],
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"{started.replace(':', '').replace('+', '-').lower()}.json"
    had = found(asked.out, emulated=emulated) if asked.resume else {}
    writing = threading.Lock()

    def keep(runs: Runs, number: int, case: Case) -> None:
        row = runs.run(number, case)
        if row is None:
            return
        said = (
            "failed" if "failed" in row else f"{row['allocated']:,} allocated, {row['reserved']:,} reserved"
        )
        with writing:
            record["rows"].append(row)
            sys.stdout.write(f"{row['name']}: {said} ({row['seconds']} s)\n")
            sys.stdout.flush()
            _write(path, record)

    with tempfile.TemporaryDirectory(prefix="measure-") as folder, ThreadPoolExecutor(asked.jobs) as pool:
        runs = Runs(Path(folder), until)
        wanted = [case for case in cases(asked.only) if case.name not in had]
        for done in [pool.submit(keep, runs, *one) for one in enumerate(wanted)]:
            done.result()
    return int(any("failed" in row for row in record["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
