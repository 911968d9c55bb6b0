"""Inputs in a process of their own: one that kills it, hangs or fills memory is one fault and not the end."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import memplan
from memplan.errors import MemplanError

SECONDS, BYTES = 10, 1 << 30  # what one question may take, of the processor and of memory
PATIENCE = 60  # seconds by the clock, for one that waits instead of computing
LONGEST = 500  # characters of a sentence
PLANTED = "planted"  # the folder that payloads make when they are run

Check = Callable[[Any], None]

_INTERNAL = re.compile(
    r"\b[A-Z]\w*(Error|Exception|Warning)\b|pydantic|Traceback|<class |NoneType| object at 0x"
)
_PACKAGE = Path(memplan.__file__).parent
_LAUNCHES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn",
             "pickle.find_class", "socket.connect", "socket.getaddrinfo", "webbrowser.open")  # fmt: skip
_CHANGES = (
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
)


class Fault(Exception):
    """What memplan must never do. Faults of one ``kind`` are told once."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Result:
    """What became of one input. ``fault``: its kind, or None; ``detail`` is of the fault or of the refusal.
    Seconds of the processor and bytes of memory."""

    answered: bool
    fault: str | None = None
    detail: str = ""
    seconds: float = 0.0
    nbytes: int = 0


class Worker:
    """A process that is given one input after the other. Another one takes over where it was killed, and
    after some thousand inputs, for memplan may keep what it has found."""

    def __init__(self, seconds: int = SECONDS, patience: float = PATIENCE) -> None:
        self.seconds, self.patience = seconds, patience
        self._process: Any = None
        self._asked = 0

    def ask(self, check: Check, value: Any) -> Result:
        """Check one input."""
        if self._asked >= 2000:
            self.close()
        if self._process is None:
            self._start()
        self._asked += 1
        self._pipe.send((check, value))
        if not self._pipe.poll(self.patience):
            self.close()
            return Result(False, f"no answer in {self.patience} s", seconds=self.patience)
        try:
            return self._pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = -self._process.exitcode
            self.close()
        if code == signal.SIGXCPU:
            return Result(False, f"takes more than {self.seconds} s", seconds=self.seconds)
        return Result(False, f"ends Python: {signal.Signals(code).name if code > 0 else f'status {-code}'}")

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="memplan-fuzz-")
        context = get_context("spawn")  # tests may have threads, which can't be forked
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._folder, self.seconds), daemon=True)
        self._process.start()
        other.close()
        self._asked = 0
        self._pipe.recv()  # one that can't even start is no fault of an input: EOFError

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None
            shutil.rmtree(self._folder, ignore_errors=True)


def _serve(pipe: Connection, folder: str, most: int) -> None:
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR"):
        os.environ[name] = folder
    os.environ |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "PYDANTIC_DISABLE_PLUGINS": "__all__"}
    watch = _Watch(folder)
    sys.addaudithook(watch)
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            check, value = pipe.recv()
            here = Path(folder, "here")
            here.mkdir()
            os.chdir(here)
            pipe.send(_result(check, value, watch, most))
            os.chdir(folder)
            shutil.rmtree(here)


class _Watch:
    """What memplan does beside answering, from Python's audit events (docs.python.org, "Audit events table").
    It may write in its own folder."""

    def __init__(self, folder: str) -> None:
        self.folder = os.path.realpath(folder)
        self.armed = False
        self.seen: str | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in _LAUNCHES or ((writes or event in _CHANGES) and not self._ours(arguments[0])):
            self.seen = self.seen or f"{event} {arguments[0]!r}"

    def _ours(self, path: Any) -> bool:
        if isinstance(path, int) or os.fspath(path) in (os.devnull, os.fsencode(os.devnull)):
            return True
        return f"{os.path.realpath(os.fsdecode(path))}/".startswith(f"{self.folder}/")


def _result(check: Check, value: Any, watch: _Watch, most: int) -> Result:
    resting, began = _limit(most), time.process_time()
    fault, detail, answered = None, "", False
    watch.armed, watch.seen = True, None
    try:
        check(value)
        answered = True
    except Fault as error:
        fault, detail = error.kind, error.detail
    except MemplanError as error:
        detail = str(error)
        try:
            _refusal(error)
        except Fault as found:
            fault, detail = found.kind, found.detail
    except BaseException as error:
        fault, detail = f"{type(error).__name__} at {place(error)}", str(error)
    watch.armed = False
    seconds, nbytes = time.process_time() - began, _highest() - resting
    if watch.seen or Path(PLANTED).exists():
        fault, detail = "a side effect", watch.seen or "a payload was run"
    elif fault is None and nbytes > BYTES:
        fault, detail = "takes more than 1 GiB", f"{nbytes / BYTES:.2f} GiB"
    elif fault is None and seconds > most:
        fault, detail = f"takes more than {most} s", f"{seconds:.0f} s"
    return Result(answered, fault, detail[:300], seconds, nbytes)


def _refusal(error: MemplanError) -> None:
    at = place(error)
    try:
        sentence(str(error))
    except Fault as fault:
        raise Fault(f"{fault.kind} ({at})", fault.detail) from None
    cause: BaseException | None = error
    while cause := cause.__context__:  # "raise ... from None" hides it and keeps it
        if isinstance(cause, MemoryError):
            raise Fault(f"takes more memory than there is ({at})", str(error))


def sentence(text: str) -> None:
    """Check that it is one, fit for a user. Raises Fault. Control characters that it may quote are made
    visible where it is printed (:mod:`command`)."""
    if not text.strip():
        raise Fault("refuses without a word")
    if len(text) > LONGEST:
        raise Fault(f"a sentence of more than {LONGEST} characters", text)
    if _INTERNAL.search(text):
        raise Fault("a sentence names Python's own", text)


def place(error: BaseException) -> str:
    """The last line of memplan's own that an exception came through; its number would part equal faults."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    if not frames:
        return "?"
    return f"{Path(frames[-1].filename).relative_to(_PACKAGE).as_posix()}:{frames[-1].name}"


def _limit(seconds: int) -> int:
    """Set the limits of the next input; bytes that rest before it. The kernel ends what computes too long."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + seconds + 1, hard))
    size, resident = (int(pages) * resource.getpagesize() for pages in _proc("statm").split()[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES + BYTES // 2, hard))
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest (proc(5))
    return resident


def _highest() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", _proc("status"))
    return int(found[1]) << 10 if found else 0


def _proc(name: str) -> str:
    return Path("/proc/self", name).read_text()
