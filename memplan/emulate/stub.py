"""A checkpoint of the right shapes that takes no disk, for programs that load one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memplan.asked.gpus import find_gpu
from memplan.emulate import launch
from memplan.emulate.program import interpreter
from memplan.errors import MemplanError, reason, shown

_PROBE = """
import sys
from importlib.util import find_spec
raise SystemExit(not all(map(find_spec, sys.argv[1:])))
"""
_FROM_HUB = launch.HOOK / "from_hub.py"
_MAKER = launch.HOOK / "make_checkpoint.py"
_PIPELINE_MAKER = launch.HOOK / "make_pipeline.py"


def stub(
    config: Callable[[], dict[str, Any]],
    folder: Path,
    python: str | None,
    *,
    hub_id: str | None = None,
    merged: bool = False,
) -> str:
    """Make a checkpoint in ``folder``, which must not be there or be empty: what the Hub has under
    ``hub_id``, of which no weights are fetched, or what ``config`` gives where the Hub can't be asked.
    ``python``: of an environment with transformers (default: memplan's own, else the one that is called
    ``python``). ``merged``: experts as transformers holds them, not as they are published.

    Returns what could not be made beside its weights, in a sentence, or nothing. Raises MemplanError; nothing
    is left behind then.
    """

    def make(program: Path, place: Path, made: Path) -> str:
        if hub_id is not None and not _ask(dict(os.environ), program, _FROM_HUB, hub_id, made).returncode:
            return ""
        wanted = config()
        _check_makeable(wanted)
        given = place / "config.json"
        given.write_text(json.dumps(wanted), encoding="utf-8")
        return _make(program, _MAKER, given, made, *(["merged"] if merged else []))

    return _in_place(folder, _having(python, "transformers"), make)


def stub_pipeline(given: Path, folder: Path, python: str | None) -> None:
    """Make a pipeline of diffusers in ``folder``, as the one in ``given`` has it whose weights are left out.
    ``python``: of an environment with diffusers. Raises MemplanError; nothing is left behind then."""
    _in_place(
        folder,
        _having(python, "transformers", "diffusers"),
        lambda program, _, made: _make(program, _PIPELINE_MAKER, given.absolute(), made),
    )


def _in_place(folder: Path, program: Path, make: Callable[[Path, Path, Path], str]) -> str:
    """What ``make`` says, whose folder takes its place when it is whole. Raises MemplanError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MemplanError(f"{shown(str(folder))} is there already and is no empty folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".memplan-stub-", dir=folder.parent) as place:
            (made := Path(place, "made")).mkdir()
            said = make(program, Path(place), made)
            if folder.exists():
                folder.rmdir()
            made.replace(folder)
    except OSError as error:
        raise MemplanError(f"{shown(str(folder))} can't be made: {reason(error)}") from error
    return said


def _check_makeable(config: dict[str, Any]) -> None:
    given = config.get("quantization_config") or {}
    how = given.get("quant_method", "bitsandbytes" if "load_in_4bit" in given else "mxfp4")
    if how != "mxfp4" and not (how == "bitsandbytes" and given.get("load_in_4bit")):
        raise MemplanError(
            f"checkpoints quantized by {shown(how)} can't be made: leave quantization_config out of "
            "config.json, and have the weights quantized when they are loaded"
        )


def _make(python: Path, maker: Path, given: Path, folder: Path, *how: str) -> str:
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    done = _ask({**os.environ, **quiet}, python, maker, given, folder, *how)
    if done.returncode and "cannot open shared object file" in done.stderr:
        # PyTorch's CUDA build without NVIDIA's packages: it is imported on a card that is not there
        card = launch.environment(find_gpu("a100"), [str(python)])
        done = _ask({**card, **quiet}, python, maker, given, folder, *how)
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise MemplanError(
            f"transformers can't make this model: {shown(words[-1]) if words else 'it does not say why'}"
        )
    return done.stdout.strip()


def _ask(env: dict[str, str], *command: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=env,
        stdin=subprocess.DEVNULL,
    )


def _having(python: str | None, *libraries: str) -> Path:
    """A Python that has torch and ``libraries``. Raises MemplanError."""
    wanted = (
        [python] if python is not None else [sys.executable, *filter(shutil.which, ("python", "python3"))]
    )
    for name in wanted:
        place = interpreter(name)
        probe = [str(place), "-c", _PROBE, "torch", *libraries]
        if subprocess.run(probe, check=False, capture_output=True).returncode == 0:
            return place
    raise MemplanError(
        f"a checkpoint is made with {', '.join(libraries)} and torch: name a Python that has them with "
        "--python, such as the one that runs your training"
    )
