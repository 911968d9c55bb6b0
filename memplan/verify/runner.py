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
from memplan.verify import ranks
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
    """Train in a child process, or in one a GPU, and return what it measured. ``tell`` hears what the child,
    the first of several, says: a kind ("state", "step") and a value. After ``seconds`` children are ended.

    Raises Refused, RunDied, TimeIsUp; on any exception, KeyboardInterrupt too, the children are gone, and so
    they are when this process is told to end (SIGTERM, SIGHUP).
    """
    with in_order(), working_folder() as folder:
        children: list[_Child] = []
        try:
            # what a child leaves there goes with it
            environment = {**_environment(job), "TMPDIR": str(folder)}
            port = ranks.free_port() if job.recipe.gpus > 1 else 0
            for rank in range(job.recipe.gpus):
                told = ranks.environment(job, environment, rank, port) if port else environment
                children.append(_Child(rank, folder, told))
            first_to_fail = _listen(children, job, tell, seconds)
        finally:
            for child in children:
                _end(child.process)
        if first_to_fail is None:
            measured = {child.rank: child.measured() for child in children}
        else:  # the others waited for it
            measured = {first_to_fail.rank: first_to_fail.measured()}
            measured |= {child.rank: child.measured() for child in children if child.told_all}
        if len(children) == 1:
            return measured[0]
        return ranks.together(measured, None if first_to_fail is None else first_to_fail.rank)


class _Child:
    """A process that trains, and what it has said."""

    def __init__(self, rank: int, folder: Path, environment: dict[str, str]) -> None:
        self.rank = rank
        self.refused: str | None = None
        self._several = "WORLD_SIZE" in environment
        self.sent: str | None = None  # its result, where it could not write it
        self._result = folder / (f"result-{rank}.json" if rank else "result.json")
        self._complaints = folder / f"stderr-{rank}"
        with self._complaints.open("wb") as complaints:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(self._result)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends the child in order
            )

    @property
    def told_all(self) -> bool:
        """Whether it has measured something."""
        return self.sent is not None or self._result.is_file()

    def measured(self) -> Measurement:
        """Its result. Raises Refused, RunDied."""
        if self.refused is not None and self.process.returncode == STATUS_REFUSED:
            raise Refused(self.refused)
        if self._result.is_file():
            return read(self._result)
        if self.sent is not None:
            return parse(json.loads(self.sent), "what the training process sent")
        who = "the training process" + (f" of rank {self.rank}" if self._several else "")
        complaints = self._complaints.read_text(errors="replace")
        raise RunDied(_obituary(who, self.process.returncode, complaints))


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


def _listen(children: list[_Child], job: Job, tell: Tell | None, seconds: float | None) -> _Child | None:
    """Until all children have closed their output, or one that failed has, and the others had time to notice.
    The first that failed, of several."""
    lines: queue.Queue[tuple[_Child, str | None]] = queue.Queue()
    for child in children:
        assert child.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: its status will say so
            child.process.stdin.write(job.model_dump_json() + "\n")
            child.process.stdin.flush()
        threading.Thread(target=_read, args=(child, lines), daemon=True).start()
    end = None if seconds is None else time.monotonic() + seconds
    talking = len(children)
    failed: _Child | None = None
    while talking:
        if end is not None and time.monotonic() >= end:
            if failed is not None:
                break
            raise TimeIsUp(f"the run was ended after {seconds:.0f} s")
        try:
            child, line = lines.get(timeout=_TICK)
        except queue.Empty:
            continue
        if line is None:
            talking -= 1
            _wait(child.process)
            if failed is None and len(children) > 1 and not _trained(child):
                failed, end = child, time.monotonic() + _GRACE
        elif line.startswith(SIGN):
            message = json.loads(line.removeprefix(SIGN))
            if message["kind"] == "refused":
                child.refused = message["value"]
            elif message["kind"] == "result":
                child.sent = message["value"]
            elif tell is not None and child is children[0]:
                tell(message["kind"], message["value"])
    return failed


def _wait(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        raise RunDied("the training process would not end") from None


def _trained(child: _Child) -> bool:
    return child.told_all and child.measured().outcome.kind == "trained"


def _read(child: _Child, lines: queue.Queue[tuple[_Child, str | None]]) -> None:
    assert child.process.stdout is not None
    with contextlib.suppress(ValueError, OSError):  # closed by the parent
        for line in child.process.stdout:
            lines.put((child, line))
    lines.put((child, None))


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


def _obituary(who: str, status: int, complaints: str) -> str:
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    # the last line of a traceback says what happened, after the exception's name
    last = f": {re.sub(_EXCEPTION, '', lines[-1])[:200]}" if lines else ""
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (did the host run out of memory?)" if -status == signal.SIGKILL else ""
        return f"{who} was killed by {name}{hint}{last if not hint else ''}"
    return f"{who} ended with status {status} and no result{last}"
