"""Dry runs of trainers' own commands, unmodified: does each go through, in what time, and what does it need?

    python benchmarks/trainers/run.py                  every case of cases.json; writes data/dry_runs.json
    python benchmarks/trainers/run.py NAME ...         some of them; writes nothing
    python benchmarks/trainers/run.py --merge NAME ... some of them; writes their rows beside the others

Needs the environment of benchmarks/dry_gpu/README.md. A case that names an environment runs in that one, made
once under --environments: that of dry_gpu, and then `pip install` of each line of environments/NAME.txt.
A script of somebody else's is run from a checkout of its repository under --sources, by the repository's name
(sources.json says which commit was tried): it is read there and never copied.
Checkpoints are made by memplan stub, data sets here. Exit status 1 if a case does not go through.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "data" / "dry_runs.json"
ROWS = 64  # of a data set
PYPI = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}  # where alone PyTorch's CUDA build is
LLAMA_FACTORY = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    },
}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "AXOLOTL_DO_NOT_TRACK": "1",
}


def cases() -> list[dict[str, Any]]:
    """What cases.json lists."""
    listed: list[dict[str, Any]] = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))["cases"]
    return listed


def said(who: str, word: str, times: int) -> dict[str, str]:
    return {"role": who, "content": " ".join([word] * times)}


def chats() -> Iterator[dict[str, Any]]:
    for row in range(ROWS):
        yield {"messages": [said("user", "word", 50 + 10 * row), said("assistant", "answer", 50 + 8 * row)]}


def preferences() -> Iterator[dict[str, Any]]:
    for row in range(ROWS):
        yield {
            "prompt": [said("user", "word", 50 + 7 * row)],
            "chosen": [said("assistant", "good", 50 + 5 * row)],
            "rejected": [said("assistant", "bad", 50 + 3 * row)],
        }


def prompts() -> Iterator[dict[str, Any]]:
    for row in range(ROWS):
        yield {"prompt": [said("user", "word", 50 + row)]}


def captions() -> Iterator[dict[str, Any]]:
    for row in range(ROWS // 8):
        yield {"file_name": f"{row}.png", "text": " ".join(["word"] * (5 + row))}


def grey(width: int, height: int) -> bytes:
    """A PNG of one colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    told = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of red, green and blue
    lines = zlib.compress((b"\0" + b"\x80" * 3 * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", told) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def data(folder: Path) -> dict[str, str]:
    """Data sets in files, by the name that stands for their folder: of lines, but for a text's."""
    found = {}
    for name, rows in (("CHAT", chats()), ("PREFERENCES", preferences()), ("PROMPTS", prompts())):
        place = folder / name.lower()
        place.mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / "train.jsonl").write_text(text, encoding="utf-8")
        found[name] = str(place)
    # a set of its own for evaluation
    (split := folder / "split").mkdir()
    for part in ("train", "test"):
        (split / f"{part}.jsonl").write_bytes(Path(found["CHAT"], "train.jsonl").read_bytes())
    (prose := folder / "text").mkdir()
    (prose / "train.txt").write_text((" ".join(["word"] * 100) + "\n") * 100 * ROWS, encoding="utf-8")
    (pictures := folder / "pictures").mkdir()
    for row in captions():
        (pictures / row["file_name"]).write_bytes(grey(1200, 1100))
    listed = "".join(json.dumps(row) + "\n" for row in captions())
    (pictures / "metadata.jsonl").write_text(listed, encoding="utf-8")
    found |= {"SPLIT": str(split), "TEXT": str(prose), "PICTURES": str(pictures)}
    # LLaMA-Factory asks for a list of them
    listed = json.dumps({"chats": {"file_name": "train.jsonl", **LLAMA_FACTORY}})
    Path(found["CHAT"], "dataset_info.json").write_text(listed, encoding="utf-8")
    return found


def environment(name: str, folder: Path) -> Path:
    """The Python of an environment, which is made if it is not there yet. Raises CalledProcessError."""
    place = folder.absolute() / name
    python, made = place / "bin" / "python", place / "made"
    if not made.exists():
        print(f"making {place}", flush=True)
        lines = (HERE / "environments" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        install = [str(ROOT / "benchmarks" / "dry_gpu" / "install.sh"), str(place)]
        subprocess.run(install, check=True, env={**os.environ, **asked_of(lines)})
        for line in lines:
            if words := shlex.split(line, comments=True):
                pip = [str(python), "-m", "pip", "install", "--quiet", *words]
                subprocess.run(pip, check=True, env={**os.environ, **PYPI}, stdin=subprocess.DEVNULL)
        made.touch()
    return python


def asked_of(lines: list[str]) -> dict[str, str]:
    """What install.sh is told where an environment's file begins with ``# Python 3.12``, pyenv's newest then,
    or with ``# PyTorch torch==…``."""
    found = {}
    for line in lines:
        if version := re.fullmatch(r"# Python (\d+\.\d+)", line):
            root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
            there = sorted(root.glob(f"versions/{version[1]}.*/bin/python"))
            found["PYTHON"] = str(there[-1]) if there else f"python{version[1]}"
        elif packages := re.fullmatch(r"# PyTorch (torch==.*)", line):
            found["PYTORCH"] = packages[1]
    return found


def checkout(case: dict[str, Any], sources: Path | None) -> Path:
    """Where the script lies that is somebody else's. Raises SystemExit."""
    told = json.loads((HERE / "sources.json").read_text(encoding="utf-8"))["sources"][case["source"]]
    if sources is not None and (place := sources.absolute() / str(case["source"])).is_dir():
        return place
    raise SystemExit(
        f"{case['name']} runs a script of {told['url']}, of {told['at']}: say with --sources FOLDER where a "
        f"checkout lies, as FOLDER/{case['source']}"
    )


def dry_run(
    case: dict[str, Any], folder: Path, sets: dict[str, str], python: Path, source: Path
) -> dict[str, Any]:
    """A case's row: memplan's answer, or the sentence that it ends with. ``python``: of its environment.
    ``source``: the checkout of its script."""
    memplan = [sys.executable, "-m", "memplan"]
    model = folder / "-".join([case.get("environment", "usual"), case["model"], *case.get("stub", [])])
    out = folder / "out"
    out.mkdir(exist_ok=True)
    if not model.exists():
        # of what memplan's own list has not: a configuration, or a folder of them
        given = HERE / "configs" / case["model"]
        given = given if given.is_dir() else HERE / "configs" / f"{case['model']}.json"
        named = str(given) if given.exists() else case["model"]
        stub = [*memplan, "stub", named, str(model), "--python", str(python), *case.get("stub", [])]
        subprocess.run(stub, check=True, capture_output=True)
    places = {
        **sets,
        "MODEL": str(model),
        "OUT": str(out),
        "PLAIN": str(ROOT / "benchmarks" / "plain"),
        "HERE": str(HERE),
        "SOURCE": str(source),
    }
    command = shlex.split(case["command"].format(**places))
    path = os.pathsep.join((str(python.parent), os.environ["PATH"]))
    began = time.monotonic()
    done = subprocess.run(
        [*memplan, "dry-run", "--json", "--gpu", case["gpu"], "--", *command],
        cwd=folder,
        env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    row = {**case, "date": date.today().isoformat(), "seconds": round(time.monotonic() - began, 1)}
    if done.returncode == 2 or not done.stdout:
        return {**row, "why": done.stderr.strip().splitlines()[-1], "said": done.stderr[-3000:]}
    answer = json.loads(done.stdout)
    kept = (
        "memplan_version",
        "gpu",
        "count",
        "needed_bytes",
        "verdict",
        "loaded",
        "steps",
        "libraries",
        "notes",
    )
    return {**row, "why": None, **{name: answer[name] for name in kept}}


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case's newest row, in the order of cases.json: with its date and versions."""
    rows = {row["name"]: row for row in [*old, *new]}
    return [rows[case["name"]] for case in cases() if case["name"] in rows]


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases (default: all, which are written)")
    parser.add_argument("--merge", action="store_true", help="write those that are run, beside the others")
    parser.add_argument(
        "--environments", type=Path, metavar="FOLDER", help="where those lie that cases name, and are made"
    )
    parser.add_argument(
        "--sources", type=Path, metavar="FOLDER", help="of checkouts, for the scripts of others"
    )
    asked = parser.parse_args()
    chosen = [case for case in cases() if not asked.names or case["name"] in asked.names]
    if len(chosen) < len(asked.names):
        parser.error(f"cases.json has only {', '.join(case['name'] for case in cases())}")
    pythons = {"": Path(sys.executable)}
    for name in sorted({case["environment"] for case in chosen if "environment" in case}):
        if asked.environments is None:
            parser.error(f"the environment {name} is needed: say with --environments FOLDER where it lies")
        pythons[name] = environment(name, asked.environments)
    sources = {case["name"]: checkout(case, asked.sources) if "source" in case else HERE for case in chosen}
    rows = []
    with tempfile.TemporaryDirectory(prefix="trainers-") as place:
        sets = data(Path(place))
        for case in chosen:
            python = pythons[case.get("environment", "")]
            row = dry_run(case, Path(place), sets, python, sources[case["name"]])
            told = row.pop("said", "")
            rows.append(row)
            needed = row.get("needed_bytes")
            words = row["why"] or f"{row['verdict']}, {needed:,} bytes" if needed else row.get("verdict")
            print(f"{case['name']:24} {row['seconds']:6.1f} s  {words}", flush=True)
            if row["why"]:
                print(told, file=sys.stderr)
    failed = sum(row["why"] is not None for row in rows)
    print(f"{len(rows)} dry-run, {failed} did not go through")
    if asked.merge:
        rows = merged(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"], rows)
    if asked.merge or not asked.names:
        RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
