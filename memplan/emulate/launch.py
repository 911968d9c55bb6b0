"""Start a program on a card that is not there, and wait for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from memplan.asked.gpus import Gpu
from memplan.emulate import build, program
from memplan.emulate.cards import description
from memplan.ending import in_order

HOOK = Path(__file__).resolve().parent / "hook"
_MARK = "MEMPLAN_RUN"  # in the environment of all that a program starts
_GRACE = 5.0  # seconds that a program has to end once it is asked to


@dataclass(frozen=True)
class Watching:
    """What the program's processes write of themselves: to which ``folder``, after how many optimizer
    ``steps`` and which ``wanted`` stretches ("evaluation", "saving"); whether with a ``snapshot`` for
    PyTorch's viewer, and with each allocation of the last step for a ``tape``. ``routing`` of a mixture of
    experts: tokens "even" among them or "skewed". ``ranks``: those that run; none: all."""

    folder: Path
    steps: int
    wanted: tuple[str, ...] = ()
    snapshot: bool = False
    tape: bool = False
    routing: str = "even"
    ranks: tuple[int, ...] = (0,)


def environment(
    gpu: Gpu, command: list[str], *, count: int = 1, taken: int = 0, watching: Watching | None = None
) -> dict[str, str]:
    """What a command's environment has to be, with ``count`` cards. Raises MemplanError if it can't be
    dry-run."""
    card = description(gpu, taken, count)
    libraries = build.libraries(program.find(command))
    found = {
        **os.environ,
        "MEMPLAN_CARD": card,
        "MEMPLAN_CARD_LIBRARIES": str(libraries),
        "LD_LIBRARY_PATH": _before(str(libraries), "LD_LIBRARY_PATH"),
        "PYTHONPATH": _before(str(HOOK), "PYTHONPATH"),
        "TRITON_LIBCUDA_PATH": str(libraries),
        # what Inductor chooses by times that mean nothing is none of a GPU's business
        "TORCHINDUCTOR_CACHE_DIR": str(libraries.parent / "inductor"),
    }
    if watching is not None:
        told = {**asdict(watching), "folder": str(watching.folder), "memplan": sys.executable}
        found["MEMPLAN_WATCH"] = json.dumps(told)
    return found


def run(
    command: list[str], env: dict[str, str], *, timeout: float | None = None, quiet_stdout: bool = True
) -> int | None:
    """The program's exit status, None if it was ended after ``timeout`` seconds. What it prints goes to
    standard error unless ``quiet_stdout`` is off. It and all that it started are gone afterwards, whatever
    happens."""
    stdout = sys.stderr if quiet_stdout else None
    run_id = uuid4().hex
    with (
        in_order(),
        subprocess.Popen(
            command, env={**env, _MARK: run_id}, start_new_session=True, stdout=stdout
        ) as process,
    ):
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process, f"{_MARK}={run_id}".encode())


def _end(process: subprocess.Popen[bytes], mark: bytes) -> None:
    """End what is left of it: its process group, and those with ``mark`` in their environment, for launchers
    put theirs into sessions of their own."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        for pid in _marked(mark):
            with suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) != process.pid:
                    os.kill(pid, number)
        until = time.monotonic() + _GRACE
        while time.monotonic() < until and (process.poll() is None or _marked(mark)):
            time.sleep(0.05)


def _marked(mark: bytes) -> set[int]:
    """Those that run with it; one that has ended and waits for its parent has no environment any more."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in place.read_bytes().split(b"\0"):
                found.add(int(place.parent.name))
    return found


def _before(place: str, variable: str) -> str:
    return os.pathsep.join(filter(None, (place, os.environ.get(variable))))
