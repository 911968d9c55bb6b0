"""Who works in a folder: a lock that the system takes back when its process ends, however it ends.

The folder itself is locked (``flock``), so that nothing is left in it.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "memplan-verify-"
_SETTLED = 60.0  # seconds after which a folder that was made is locked


@contextmanager
def alone(folder: Path) -> Iterator[bool | None]:
    """Lock a folder until the end. True: it is locked now, False: another process holds it, None: that can't
    be told there (no folder, a file system or a system without such locks)."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield None
        return
    try:
        answer: bool | None = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            answer = False
        except OSError:
            answer = None
        yield answer
    finally:
        os.close(handle)


@contextmanager
def working_folder() -> Iterator[Path]:
    """A folder for temporary files, gone at the end; those that killed processes of this user left go
    first."""
    sweep(Path(tempfile.gettempdir()))
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name,
        alone(Path(name)),
    ):
        yield Path(name)


def sweep(folder: Path) -> None:
    """Delete the working folders in ``folder`` whose processes are gone."""
    try:
        found_there = list(folder.iterdir())
    except OSError:
        return
    for path in found_there:
        if not re.fullmatch(rf"{_PREFIX}[a-z0-9_]{{8}}", path.name):
            continue
        try:
            found = path.lstat()
        except OSError:
            continue
        mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if not mine or time.time() - found.st_mtime < _SETTLED:
            continue
        with alone(path) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)
