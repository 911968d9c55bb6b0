"""Ending in order when this process is told to end, so that what it started ends, too."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """SIGTERM, as from ``timeout``, and SIGHUP, as from a terminal that is closed, unwind what runs, where
    they would drop it. A signal that is ignored (``nohup``) stays so."""
    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield
        return

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
