"""Example files of the big trainers: a file's plan against a dry run of it by its trainer's own command.

    python benchmarks/files/run.py --environments FOLDER            every case; writes data/files.json
    python benchmarks/files/run.py --environments FOLDER NAME ...   those whose file has NAME in it; writes
                                                                    nothing, or with --merge their rows
                                                                    beside the others
    python benchmarks/files/run.py --environments FOLDER --predictions [NAME ...]
                                                                    what the plan says now, beside what was
                                                                    emulated then; writes data/files.json

A file is as tests/run_files has it, but for what is edited: the model is a stub, the data set one of rows
that fill the sequence, nothing is reported, saved or evaluated; and what cases.json says of it. A row has its
edits. Needs the environments of benchmarks/trainers. Exit status 1 if a run does not go through, or if its
tensors at the peak are other than the plan's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.trainers.run import QUIET, environment  # noqa: E402

RESULTS = ROOT / "data" / "files.json"
ROWS, WORDS = 64, 9000  # of the data set; a word is a token of a stub's tokenizer
CASE = {"axolotl": "axolotl", "llama_factory": "llamafactory", "trl": ""}  # the environment of each
SETTINGS = {**QUIET, "WANDB_DISABLED": "true", "DISABLE_VERSION_CHECK": "1"}
Edits = Mapping[str, Any]


def cases() -> list[dict[str, Any]]:
    """What cases.json lists."""
    listed: list[dict[str, Any]] = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))["cases"]
    return listed


def example(case: Mapping[str, Any]) -> dict[str, Any]:
    """The file of a case, as it was read from its project."""
    found = json.loads((ROOT / "tests" / "run_files" / f"{case['trainer']}.json").read_text(encoding="utf-8"))
    file: dict[str, Any] = next(one["file"] for one in found if one["name"] == case["file"])
    return file


def _trl(folder: Path) -> Edits:
    return {
        "model_name_or_path": "MODEL", "dataset_name": str(folder / "texts"),
        "output_dir": str(folder / "out"), "report_to": "none", "eval_strategy": "no",
    }  # fmt: skip


def _llama_factory(folder: Path) -> Edits:
    return {
        "model_name_or_path": "MODEL", "dataset": "chats", "dataset_dir": str(folder / "chats"),
        "output_dir": str(folder / "out"), "plot_loss": False,
    }  # fmt: skip


def _axolotl(folder: Path) -> Edits:
    rows = {"path": str(folder / "chats" / "train.jsonl"), "ds_type": "json", "type": "alpaca"}
    return {
        "base_model": "MODEL", "datasets": [rows], "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"), "val_set_size": 0,
        "excess_length_strategy": "truncate", "evals_per_epoch": None, "special_tokens": None,
    }  # fmt: skip


EDITS: Mapping[str, Callable[[Path], Edits]] = {
    "axolotl": _axolotl,
    "llama_factory": _llama_factory,
    "trl": _trl,
}
COMMANDS = {
    "axolotl": ["axolotl", "train"],
    "llama_factory": ["llamafactory-cli", "train"],
    "trl": ["trl", "sft", "--config"],
}


def data(folder: Path) -> None:
    """Rows that are longer than any sequence, as each trainer reads them."""
    words = " ".join(["word"] * WORDS)
    texts, chats = folder / "texts", folder / "chats"
    for place, row in (
        (texts, {"text": words}),
        (chats, {"instruction": "word", "input": "", "output": words}),
    ):
        place.mkdir()
        (place / "train.jsonl").write_text(f"{json.dumps(row)}\n" * ROWS, encoding="utf-8")
    # LLaMA-Factory asks for a list of them
    listed = {"texts": {"file_name": str(texts / "train.jsonl"), "columns": {"prompt": "text"}}}
    listed["chats"] = {"file_name": "train.jsonl"}
    (chats / "dataset_info.json").write_text(json.dumps(listed), encoding="utf-8")


def _memplan(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(python.parent), os.environ["PATH"]))
    return subprocess.run(
        [sys.executable, "-m", "memplan", *arguments],
        cwd=ROOT,
        env={**os.environ, **SETTINGS, "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def edited(case: Mapping[str, Any], folder: Path, python: Path) -> tuple[Path, dict[str, Any]]:
    """A case's file as it is run, and its edits; ``python``: of its trainer's environment."""
    model = folder / f"{CASE[case['trainer']]}-{case['model']}"
    if not model.exists():
        _memplan(python, "stub", case["model"], str(model), "--python", str(python)).check_returncode()
    edits = {**EDITS[case["trainer"]](folder), **case.get("edits", {})}
    file = folder / "run.yaml"
    asked = {**example(case), **edits}
    asked = {key: str(model) if value == "MODEL" else value for key, value in asked.items()}
    file.write_text(json.dumps(asked, indent=1), encoding="utf-8")  # which YAML can be
    made = {key: value for key, value in edits.items() if example(case).get(key) != value}
    return file, json.loads(json.dumps(made).replace(f"{folder}/", ""))


def renewed(one: dict[str, Any], case: Mapping[str, Any], folder: Path, python: Path) -> dict[str, Any]:
    """A row with what its plan says now."""
    if one["why"] is not None:
        return one
    file, _ = edited(case, folder, python)
    planned = _memplan(python, str(file), "--json")
    planned.check_returncode()
    plan = json.loads(planned.stdout)
    allocator = plan["allocator"]
    said = {
        "allocated": allocator["allocated_bytes"],
        "tensors": plan["peak"]["tensor_bytes"],
        "reserved": allocator["reserved_bytes"],
    }
    figures = {key: {**one[key], "predicted": nbytes} for key, nbytes in said.items()}
    return {**one, "memplan_version": plan["memplan_version"], **figures}


def row(case: Mapping[str, Any], folder: Path, python: Path, gpu: str) -> dict[str, Any]:
    """A case's row: both sides in bytes, or why there is none. ``python``: of its trainer's environment."""
    file, edits = edited(case, folder, python)
    one = {
        **{key: case[key] for key in ("trainer", "file", "model")},
        "edits": edits,
        "date": date.today().isoformat(),
        "why": None,
    }
    tapes = [str(folder / "planned.tape"), str(folder / "emulated.tape")]
    planned = _memplan(python, str(file), "--json", "--tape", tapes[0])
    if planned.returncode:
        return {**one, "why": planned.stderr.strip()}
    began = time.monotonic()
    command = [*COMMANDS[case["trainer"]], str(file)]
    done = _memplan(python, "dry-run", "--json", "--gpu", gpu, "--tape", tapes[1], "--", *command)
    seconds = round(time.monotonic() - began, 1)
    if done.returncode == 2 or not done.stdout:
        return {**one, "why": done.stderr.strip().splitlines()[-1], "said": done.stderr[-5000:]}
    answer, plan = json.loads(done.stdout), json.loads(planned.stdout)
    sides = json.loads(_memplan(python, "diff", *tapes, "--json").stdout)
    allocator = plan["allocator"]
    steps = answer["steps"]
    return {
        **one,
        "seconds": seconds,
        "gpu": answer["gpu"],
        "memplan_version": answer["memplan_version"],
        "libraries": answer["libraries"],
        "notes": answer["notes"],
        "steps": [{key: step[key] for key in ("allocated_bytes", "reserved_bytes")} for step in steps],
        "allocated": {
            "predicted": allocator["allocated_bytes"],
            "emulated": steps[1]["allocated_bytes"],
        },
        "tensors": {
            "predicted": sides["a"]["allocated_bytes"],
            "emulated": sides["b"]["allocated_bytes"],
        },
        "reserved": {"predicted": allocator["reserved_bytes"], "emulated": answer["reserved_bytes"]},
    }


def equal(one: Mapping[str, Any]) -> bool:
    """Whether a row's tensors at the peak are the plan's."""
    return one["why"] is None and not apart(one, "tensors")


def apart(one: Mapping[str, Any], figure: str = "allocated") -> int:
    """What a row's plan has more."""
    return int(one[figure]["predicted"] - one[figure]["emulated"])


def _key(one: Mapping[str, Any]) -> tuple[str, str]:
    return one["trainer"], one["file"]


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case's newest row, in the order of cases.json."""
    rows = {_key(one): one for one in [*old, *new]}
    keys = [_key(case) for case in cases()]
    return [rows[key] for key in keys if key in rows]


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of files (default: all, which are written)")
    parser.add_argument("--environments", type=Path, metavar="FOLDER", required=True)
    parser.add_argument("--merge", action="store_true", help="write those that are run, beside the others")
    parser.add_argument("--predictions", action="store_true", help="renew the plan's side of rows only")
    parser.add_argument("--gpu", default="a100", help="the card (default: %(default)s)")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep there what is made, with both tapes"
    )
    asked = parser.parse_args()
    chosen = [
        case
        for case in cases()
        if not asked.names or any(name in f"{case['trainer']} {case['file']}" for name in asked.names)
    ]
    there: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    emulated = {_key(one): one for one in there}
    if asked.predictions:
        chosen = [case for case in chosen if _key(case) in emulated]
    rows = []
    with tempfile.TemporaryDirectory(prefix="files-") as place:
        folder = asked.keep or Path(place)
        data(folder)
        for case in chosen:
            name = CASE[case["trainer"]]
            python = environment(name, asked.environments) if name else Path(sys.executable)
            if asked.predictions:
                one = renewed(emulated[_key(case)], case, folder, python)
            else:
                one = row(case, folder, python, asked.gpu)
            told = one.pop("said", "")
            rows.append(one)
            figures = one["why"] or (
                f"{one['allocated']['emulated']:>14,} {apart(one):>+12,} "
                f"{apart(one, 'tensors'):>+12,} {apart(one, 'reserved'):>+12,}"
            )
            print(f"{case['trainer']:14} {case['file']:44} {figures}", flush=True)
            print(told, end="", file=sys.stderr)
    failed = sum(not equal(one) for one in rows)
    print(
        f"{len(rows)} files, {failed} apart or failed: allocated bytes, what the plan has more or "
        "less, of it in tensors, and so of reserved bytes"
    )
    if asked.merge or asked.predictions:
        rows = merged(there, rows)
    if asked.merge or asked.predictions or not asked.names:
        RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
