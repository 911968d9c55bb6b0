"""Runs inside the program that is dry-run: watches PyTorch's allocator, counts optimizer steps, and ends the
program when enough have been seen. It stands alone, for the program's environment need not have memplan.

What it saw goes, as JSON, to a file of the folder that MEMPLAN_WATCH names, which memplan/emulate/answer.py
reads. Lines are of the program itself where one is on the stack, else of the library nearest to it.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import sysconfig
import threading
import time
import traceback
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

_HISTORY = 50_000_000  # entries of the allocator's history; a 70B's step has 60,000
_LARGEST = 12  # lines that are told
_LIBRARIES = tuple(
    os.path.join(path, "") for path in {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
)


class Watch:
    """One process of the program. Bytes; times in microseconds, of the clock of the allocator's history."""

    def __init__(self, folder: str, steps: int) -> None:
        self.out, self.asked, self.owner = os.path.join(folder, f"{os.getpid()}.json"), steps, os.getpid()
        self.torch: Any = None
        self.loaded: dict[str, int] | None = None
        self.began = 0  # when training did
        self.steps: list[dict[str, int]] = []
        self.ran_out: dict[str, Any] | None = None
        self.ran_out_at = 0
        self.error: str | None = None
        self.names: dict[int, str] = {}  # of modules, by id
        self.optimizers: dict[int, int] = {}  # those that were made, and their steps
        self.lead, self.depth = 0, 0
        self.stack: list[str] = []
        self.phase = "forward"
        self.marks: list[tuple[int, str, str]] = []  # from when on which phase and module
        self.over = False

    # -- where the program is --------------------------------------------------------------------------------

    def imported(self, torch: Any) -> None:
        """PyTorch is there: from here on it is watched, and the allocator once the card is used."""
        self.torch = torch
        if not torch.cuda.is_available():
            return
        from torch.nn.modules import module
        from torch.optim import optimizer

        make = optimizer.Optimizer.__init__

        def making(made: Any, *args: Any, **kwargs: Any) -> None:
            make(made, *args, **kwargs)
            self.optimizers.setdefault(id(made), 0)

        optimizer.Optimizer.__init__ = making
        optimizer.register_optimizer_step_pre_hook(self._updating)
        optimizer.register_optimizer_step_post_hook(self._updated)
        module.register_module_forward_pre_hook(self._entered)
        module.register_module_forward_hook(self._left, always_call=True)
        torch.cuda._lazy_call(self._first_use)
        atexit.register(self._ended)
        before = sys.excepthook

        def failed(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            self.error = kind.__name__
            before(kind, error, trace)

        sys.excepthook = failed

    def _first_use(self) -> None:
        torch = self.torch
        torch.cuda.memory._record_memory_history(
            "all", context="alloc", stacks="python", max_entries=_HISTORY
        )
        torch._C._cuda_attach_out_of_memory_observer(self._out_of_memory)

    def _mark(self, phase: str, module: str = "") -> None:
        self.marks.append((time.time_ns() // 1000, phase, module))

    def _entered(self, module: Any, _inputs: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and not self.stack:
            return  # recomputed in backward's thread, inside a layer whose name is looked up below
        if not self.stack:
            if self.loaded is None and module.training and self.torch.is_grad_enabled():
                self.loaded, self.began = self._stats(), time.time_ns() // 1000
                self._reset()
            if id(module) not in self.names:
                self.names.update({id(part): name for name, part in module.named_modules()})
            self.phase = "forward" if self.torch.is_grad_enabled() else "evaluation"
        self.stack.append(self.names.get(id(module), type(module).__name__))
        self._mark(self.phase, self.stack[-1])

    def _left(self, module: Any, _inputs: Any, _result: Any) -> None:
        if self.stack:
            self.stack.pop()
            after = "between steps" if self.phase == "evaluation" else "backward"
            self._mark(self.phase if self.stack else after, self.stack[-1] if self.stack else "")

    def _updating(self, optimizer: Any, *_: Any) -> None:
        self.depth += 1
        self._mark("update")

    def _updated(self, optimizer: Any, *_: Any) -> None:
        """A step of an optimizer; of several, rows are those of the one that stepped first, and the program
        ends when each has made as many as were asked for, or one ten times as many."""
        self.depth = max(self.depth - 1, 0)
        if self.depth or os.getpid() != self.owner or not self.torch.cuda.is_initialized():
            return  # one that wraps another: the outer one counts
        self.optimizers[id(optimizer)] = self.optimizers.get(id(optimizer), 0) + 1
        self.lead = self.lead or id(optimizer)
        done = min(self.optimizers.values()) >= self.asked
        done = done or max(self.optimizers.values()) >= 10 * self.asked
        self._mark("between steps")
        if self.lead != id(optimizer) and not done:
            return
        self.steps.append({**self._stats(), "ended": time.time_ns() // 1000})
        if done:
            self._write()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        self._reset()

    def _stats(self) -> dict[str, int]:
        """Of the card that has reserved the most."""
        cards = range(self.torch.cuda.device_count())
        stats = max(
            map(self.torch.cuda.memory_stats, cards), key=lambda it: it.get("reserved_bytes.all.peak", 0)
        )
        return {
            "allocated_bytes": stats.get("allocated_bytes.all.peak", 0),
            "reserved_bytes": stats.get("reserved_bytes.all.peak", 0),
            "resting_bytes": stats.get("allocated_bytes.all.current", 0),
            "retries": stats.get("num_alloc_retries", 0),
        }

    def _reset(self) -> None:
        for card in range(self.torch.cuda.device_count()):
            self.torch.cuda.reset_peak_memory_stats(card)

    def _out_of_memory(self, _device: int, asked: int, total: int, free: int) -> None:
        """The allocator calls this before it raises."""
        self.ran_out_at = time.time_ns() // 1000
        frames = [(f.filename, f.lineno or 0, f.name) for f in reversed(traceback.extract_stack())]
        stats = self.torch.cuda.memory_stats()
        self.ran_out = {
            "asked_bytes": asked,
            "free_bytes": free,
            "allocated_bytes": stats["allocated_bytes.all.current"],
            "reserved_bytes": stats["reserved_bytes.all.current"],
            "step": len(self.steps) + 1 if self.loaded else 0,
            "phase": self.marks[-1][1] if self.loaded and self.marks else "loading",
            "module": self.marks[-1][2] if self.marks else "",
            **_line([frame for frame in frames if not frame[0].startswith("<")]),
        }

    def _ended(self) -> None:
        if os.getpid() == self.owner and not self.over:
            self._write()

    # -- what it saw -----------------------------------------------------------------------------------------

    def _write(self) -> None:
        self.over = True
        torch = self.torch
        used = torch.cuda.is_initialized()
        found: dict[str, Any] = {
            "used": used,
            "loaded": self.loaded or (self._stats() if used else None),
            "steps": self.steps,
            "ran_out": self.ran_out,
            "error": self.error,
            "versions": _versions(),
            "world": int(os.environ.get("WORLD_SIZE") or 1),
            "device": torch.cuda.get_device_name() if used else None,
            "peak": self._peak() if used else None,
        }
        if used and os.environ.get("MEMPLAN_WATCH_SNAPSHOT"):
            torch.cuda.memory._dump_snapshot(f"{self.out}.pickle")
        with open(f"{self.out}.part", "w", encoding="utf-8") as file:
            json.dump(found, file)
        os.replace(f"{self.out}.part", self.out)

    def _peak(self) -> dict[str, Any] | None:
        """The highest point since training began, or the one where it ran out: when, and whose bytes."""
        traces = self.torch.cuda.memory._snapshot()["device_traces"]
        history = max(traces, key=len)  # of the card on which the most happens
        ended = self.ran_out is not None and max(self.ran_out["step"], 1) > len(self.steps)
        if ended:
            history = [event for event in history if event["time_us"] <= self.ran_out_at]
        best, at = 0, None
        for event, now, _ in _played(history):
            if event["action"] == "alloc" and (ended or (now > best and event["time_us"] >= self.began)):
                best, at = now, event
        if at is None:
            return None
        held = next(live for event, _, live in _played(history) if event is at)
        groups: dict[tuple[str, ...], list[int]] = {}
        lines: dict[tuple[str, ...], dict[str, Any]] = {}
        for event in held.values():
            line = {**_line(_frames(event)), "phase": self._when(event["time_us"])[0]}
            key = tuple(map(str, line.values()))
            lines[key] = line
            groups.setdefault(key, []).append(event["size"])
        largest = sorted(groups.items(), key=lambda item: -sum(item[1]))
        phase, module = self._when(at["time_us"]) if self.loaded else ("loading", "")
        return {
            "held_bytes": sum(map(sum, groups.values())),
            "step": 1 + sum(step["ended"] < at["time_us"] for step in self.steps),
            "phase": phase,
            "module": module,
            "asked_bytes": at["size"],
            **_line(_frames(at)),
            "largest": [
                {**lines[key], "bytes": sum(sizes), "count": len(sizes)} for key, sizes in largest[:_LARGEST]
            ],
        }

    def _when(self, time_us: int) -> tuple[str, str]:
        at = bisect_right(self.marks, time_us, key=lambda mark: mark[0])
        return self.marks[at - 1][1:] if at else ("loading", "")


def _played(history: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int, dict[int, Any]]]:
    """Each event, the bytes that are there after it, and what holds them, by address."""
    live: dict[int, Any] = {}
    now = 0
    for event in history:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            now += event["size"]
        elif event["action"] == "free_completed":
            gone = live.pop(event["addr"], None)
            now -= gone["size"] if gone else 0
        yield event, now, live


def _frames(event: dict[str, Any]) -> list[tuple[str, int, str]]:
    return [(frame["filename"], frame["line"], frame["name"]) for frame in event.get("frames", ())]


def _line(frames: list[tuple[str, int, str]]) -> dict[str, Any]:
    """Of frames, the innermost first: the program's own line, and the library's that is nearest to it."""
    frames = [frame for frame in frames if not frame[0].startswith(os.path.dirname(__file__))]
    own = next((frame for frame in frames if not frame[0].startswith(_LIBRARIES)), None)
    file, line, function = next((frame for frame in frames if not _of_torch(frame[0])), ("", 0, ""))
    return {
        "file": _short(file),
        "line": line,
        "function": function,
        "own": f"{_short(own[0])}:{own[1]}" if own is not None else "",
    }


def _of_torch(file: str) -> bool:
    return f"{os.sep}torch{os.sep}" in file or file.startswith("<")


def _short(file: str) -> str:
    for folder in _LIBRARIES:
        if file.startswith(folder):
            return file[len(folder) :]
    near = os.path.relpath(file) if file else file
    return file if near.startswith(os.pardir) else near


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def start(torch: Any) -> None:
    """Watch this process, and work out its whole numbers."""
    import memplan_cudnn
    import memplan_integers
    import memplan_ranks

    memplan_ranks.prepare(torch)
    if torch.cuda.is_available():
        memplan_cudnn.start(torch)
        torch.distributions.Distribution.set_default_validate_args(False)  # no scale is above zero
        memplan_integers.start(torch)
    Watch(os.environ["MEMPLAN_WATCH"], int(os.environ["MEMPLAN_WATCH_STEPS"])).imported(torch)
