"""The same question many times over, on all processors, where that is safe and saves time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_asked: Callable[[Any], Any] | None = None


def processes() -> int:
    """How many processes may share the work: one where a fork would leave threads behind, or can't be had, as
    in a worker of somebody's pool."""
    import multiprocessing

    if multiprocessing.current_process().daemon:
        return 1
    tasks = Path("/proc/self/task")
    if not hasattr(os, "sched_getaffinity") or not tasks.is_dir() or len(list(tasks.iterdir())) > 1:
        return 1
    return len(os.sched_getaffinity(0))


def each(ask: Callable[[Any], T], questions: Sequence[Any], workers: int) -> Iterator[T]:
    """The answers, in order. The workers are forked: what ``ask`` knows need not be sent to them."""
    if workers > 1 and len(questions) > 1:
        import multiprocessing

        try:
            pool = multiprocessing.get_context("fork").Pool(min(workers, len(questions)), _begin, (ask,))
        except (ImportError, OSError):  # no semaphores, or no more processes
            pass
        else:
            with pool:
                yield from pool.imap(_answer, questions)
            return
    yield from map(ask, questions)


def _begin(ask: Callable[[Any], Any]) -> None:
    global _asked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told as well, and ends them
    _asked = ask


def _answer(question: Any) -> Any:
    assert _asked is not None
    return _asked(question)
