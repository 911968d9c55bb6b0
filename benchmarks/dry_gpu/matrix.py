"""Does a dry run say the same with every PyTorch, CUDA and Python that people have? One environment each,
made here, tried and removed:

    python benchmarks/dry_gpu/matrix.py                all of them; writes data/dry_run_matrix.json
    python benchmarks/dry_gpu/matrix.py 2.10.0 ...     those with these versions of PyTorch; writes nothing
    python benchmarks/dry_gpu/matrix.py --here         that of this Python, where memplan is, too: for
                                                       machines of another kind; adds its row to theirs

With --environments FOLDER they are kept there, and those that are there are used.

memplan runs in its own Python, from elsewhere; Pythons are pyenv's. PyTorch comes from PyPI alone, with
NVIDIA's packages beside it (5 GB) where the environment says so. Exit status 1 if one does not go through.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "data" / "dry_run_matrix.json"
GPU = "4090"
NEEDED = (  # by PyTorch and by what the program imports, beside NVIDIA's
    "filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "numpy", "setuptools", "psutil",
    "huggingface-hub", "tokenizers", "safetensors", "pyyaml", "regex", "tqdm", "packaging",
)  # fmt: skip
PROGRAMS = ("transformers", "bitsandbytes", "accelerate")
OF_CPUS = "/libnvpl_"  # NVIDIA's BLAS and LAPACK for arm64 processors
PYPI = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@dataclass(frozen=True)
class Environment:
    """``beside``: with NVIDIA's packages, as ``pip install torch`` brings them."""

    torch: str
    python: str
    beside: bool = False

    @property
    def name(self) -> str:
        return f"{self.torch}-{self.python}{'-beside' if self.beside else ''}"


ENVIRONMENTS = (
    Environment("2.10.0", "3.10"),
    Environment("2.11.0", "3.11"),
    Environment("2.12.1", "3.12"),
    Environment("2.13.0", "3.13"),
    Environment("2.13.0", "3.12", beside=True),
    Environment("2.15.0", "3.12"),
)


def python(version: str) -> Path:
    """pyenv's newest Python of a version."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return sorted(root.glob(f"versions/{version}.*/bin/python"))[-1]


def make(wanted: Environment, folder: Path) -> None:
    """A virtual environment with what the program needs."""
    subprocess.run([python(wanted.python), "-m", "venv", folder], check=True)
    made = folder / "bin" / "python"

    def pip(*arguments: str) -> None:
        command = [str(made), "-m", "pip", "install", "--quiet", *arguments]
        subprocess.run(command, check=True, env={**os.environ, **PYPI}, stderr=subprocess.PIPE)

    if wanted.beside:
        pip(f"torch=={wanted.torch}")
    else:
        pip("--no-deps", f"torch=={wanted.torch}")
        ask = "import importlib.metadata as m; print(*m.requires('torch'), sep='\\n')"
        asked = subprocess.run([made, "-c", ask], check=True, capture_output=True, text=True).stdout
        pip("--no-deps", next(it.partition(";")[0] for it in asked.splitlines() if it.startswith("triton")))
    pip(*NEEDED)
    pip("--no-deps", *PROGRAMS)


def dry_run(program: Path, folder: Path) -> dict[str, Any]:
    """memplan's answer in short, what of NVIDIA's was loaded, or the sentence that it ends with."""
    began = time.monotonic()
    command = [sys.executable, "-m", "memplan", "dry-run", "--json", "--gpu", GPU, "--"]
    done = subprocess.run(
        [*command, program, HERE / "small.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    row: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    if done.returncode == 2 or not done.stdout:
        return {**row, "why": done.stderr.strip().splitlines()[-1]}
    answer = json.loads(done.stdout)
    told = next(json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"mapped"'))
    others = [
        path for path in told["mapped"] if not path.startswith(str(folder / "cache")) and OF_CPUS not in path
    ]
    kept = ("memplan_version", "gpu", "needed_bytes", "verdict", "libraries")
    return {
        **row,
        "why": f"{others[0]} was loaded" if others else None,
        "cuda": told["cuda"],
        "allocated_bytes": [step["allocated_bytes"] for step in answer["steps"]],
        "reserved_bytes": [step["reserved_bytes"] for step in answer["steps"]],
        **{name: answer[name] for name in kept},
    }


def here() -> int:
    """This Python's own environment. The exit status."""
    with tempfile.TemporaryDirectory(prefix="matrix-") as place:
        row = dry_run(Path(sys.executable), Path(place))
    python = ".".join(map(str, sys.version_info[:2]))
    own = asdict(Environment(version("torch"), python)) | {"machine": platform.machine()}
    print(json.dumps({**own, **row}))
    if row["why"] is None:
        record = json.loads(RESULTS.read_text(encoding="utf-8"))
        kept = [it for it in record["rows"] if {**it, **own} != it]
        record["rows"] = [*kept, {**own, **row}]
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if row["why"] is None else 1


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="of PyTorch (default: all)")
    parser.add_argument("--environments", type=Path, metavar="FOLDER", help="keep them there, and use them")
    parser.add_argument("--here", action="store_true", help="this Python's own environment")
    asked = parser.parse_args()
    if asked.here:
        return here()
    rows = []
    for wanted in ENVIRONMENTS:
        if asked.versions and wanted.torch not in asked.versions:
            continue
        with tempfile.TemporaryDirectory(prefix="matrix-") as place:
            folder = (asked.environments or Path(place)) / wanted.name
            program = folder / "bin" / "python"
            if not program.exists():
                make(wanted, folder)
            row = {**asdict(wanted), **dry_run(program, Path(place))}
        rows.append(row)
        words = row["why"] or f"CUDA {row['cuda']}  {row['verdict']}, {row['allocated_bytes'][-1]:,} bytes"
        beside = "  NVIDIA's beside" if wanted.beside else ""
        print(f"PyTorch {wanted.torch}  Python {wanted.python}{beside}  {words}", flush=True)
    failed = sum(row["why"] is not None for row in rows)
    print(f"{len(rows)} environments, {failed} did not go through")
    if not asked.versions:
        when = datetime.now(timezone.utc).date().isoformat()
        rows += [row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if "machine" in row]
        RESULTS.write_text(json.dumps({"date": when, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
