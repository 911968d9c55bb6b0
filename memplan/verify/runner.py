"""Runs a job in a process of its own, and ends that process whatever happens here. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memplan.ending import in_order
from memplan.errors import MemplanError
from memplan.verify.child import ALLOCATOR_SETTINGS, SIGN, STATUS_REFUSED
from memplan.verify.job import Job
from memplan.verify.locks import working_folder
from memplan.verify.measurement import Measurement, parse, read

_EXCEPTION = r"^[\w.]+(?:Error|Exception|Exit|Warning): "
_GRACE = 5.0  # seconds to end in when told to
_TICK = 0.2

# Python looks for modules in the current folder first, and a file there called like a library is not that
# library. Python 3.11 has PYTHONSAFEPATH against it; on 3.10 the folder, which comes before all others, is
# taken off before anything is imported (sys is built in).
_CHILD = """import sys
if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]
from memplan.verify.child import main
sys.exit(main())"""

Tell = Callable[[str, Any], None]


class Refused(MemplanError):
    """The run was not begun: the device, a library or a file does not do. Says why."""


class RunDied(MemplanError):
    """The training process ended without a result."""


class TimeIsUp(MemplanError):
    """The run did not end in time and was ended."""


def run_job(job: Job, *, tell: Tell | None = None, seconds: float | None = None) -> Measurement:
    """Train in a child process and return what it measured. ``tell`` hears what the child says: a kind
    ("state", "step") and a value. After ``seconds`` the child is ended.

    Raises Refused, RunDied, TimeIsUp; on any exception, KeyboardInterrupt too, the child is gone, and so
    it is when this process is told to end (SIGTERM, SIGHUP).
    """
    with in_order(), working_folder() as folder:
        result = folder / "result.json"
        with (folder / "stderr").open("w+b") as complaints:
            child = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(result)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                env={**_environment(job), "TMPDIR": str(folder)},  # what it leaves there goes with it
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends the child in order
            )
            try:
                refused, sent = _listen(child, job, tell, seconds)
                status = child.wait(_GRACE)
            except subprocess.TimeoutExpired:
                raise RunDied("the training process would not end") from None
            finally:
                _end(child)
            if status == STATUS_REFUSED and refused is not None:
                raise Refused(refused)
            if not result.is_file() and sent is not None:
                return parse(json.loads(sent), "what the training process sent")
            if not result.is_file():
                complaints.seek(0)
                raise RunDied(_obituary(status, complaints.read().decode(errors="replace")))
            return read(result)


def _environment(job: Job) -> dict[str, str]:
    """The child's: its allocator is set as the recipe says, which is what the plan is for, not as this shell
    happens to be. Before torch 2.9 the variable had the other name.

    An empty entry of PYTHONPATH, which a colon too many makes, would be the current folder."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    others = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_SETTINGS}
    return {
        **others,
        **(dict.fromkeys(ALLOCATOR_SETTINGS, job.recipe.alloc_conf) if job.recipe.alloc_conf else {}),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",  # for what the child starts itself, see _CHILD
        "TOKENIZERS_PARALLELISM": "false",
    }


def _listen(
    child: subprocess.Popen[str], job: Job, tell: Tell | None, seconds: float | None
) -> tuple[str | None, str | None]:
    """Until the child closes its output. What it was refused for, if it was, and the result if it could not
    write it."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once: its status will say so
        child.stdin.write(job.model_dump_json() + "\n")
        child.stdin.flush()
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(child, lines), daemon=True).start()
    end = None if seconds is None else time.monotonic() + seconds
    refused = sent = None
    while True:
        if end is not None and time.monotonic() >= end:
            raise TimeIsUp(f"the run was ended after {seconds:.0f} s")
        try:
            line = lines.get(timeout=_TICK)
        except queue.Empty:
            continue
        if line is None:
            return refused, sent
        if not line.startswith(SIGN):
            continue
        message = json.loads(line.removeprefix(SIGN))
        if message["kind"] == "refused":
            refused = message["value"]
        elif message["kind"] == "result":
            sent = message["value"]
        elif tell is not None:
            tell(message["kind"], message["value"])


def _read(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    with contextlib.suppress(ValueError, OSError):  # closed by the parent
        for line in child.stdout:
            lines.put(line)
    lines.put(None)


def _end(child: subprocess.Popen[str]) -> None:
    """Politely, then not."""
    for ending in (child.terminate, child.kill):
        if child.poll() is not None:
            break
        ending()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _obituary(status: int, complaints: str) -> str:
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    # the last line of a traceback says what happened, after the exception's name
    last = f": {re.sub(_EXCEPTION, '', lines[-1])[:200]}" if lines else ""
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (did the host run out of memory?)" if -status == signal.SIGKILL else ""
        return f"the training process was killed by {name}{hint}{last if not hint else ''}"
    return f"the training process ended with status {status} and no result{last}"
