"""Files that memplan writes: there as a whole or not at all."""

from __future__ import annotations

import errno
import gzip
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memplan.errors import MemplanError, reason, shown

_MOST_LINKS = 40  # as Linux follows


def write_whole(path: str | Path, content: bytes, what: str) -> None:
    """Write a file beside its place first, then in its place, with the permissions of the one that was there.
    A link stays one, and what it leads to is replaced; a device or a pipe is written to as it is, and so is
    what the shell has opened (``--tape /dev/stdout >> log``): the rest of that file is not ours.

    Raises MemplanError, which calls the file ``what``.
    """
    try:
        there = _status(path)
        descriptor = None if there is None else _opened(path, there)
        if descriptor is not None:
            _through(descriptor, content)
        elif there is None or stat.S_ISREG(there.st_mode):
            _replace(Path(path).resolve(), content, there)
        elif stat.S_ISDIR(there.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        else:
            with os.fdopen(_open(path, there), "wb", buffering=0) as file:
                _all(file.fileno(), content)
    except (OSError, ValueError, RuntimeError) as error:
        raise MemplanError(f"{what} can't be written to {shown(str(path))}: {reason(error)}") from None


def zipped(path: str | Path, content: bytes) -> bytes:
    """The content as it belongs into a file of this name: compressed if it ends in ``.gz``. The same content
    makes the same file."""
    return gzip.compress(content, mtime=0) if str(path).endswith(".gz") else content


def same_twice(paths: list[str]) -> tuple[str, str] | None:
    """The first two of these names, if any, that are written to one place: ``x``, ``./x``, a link to it."""
    known: dict[str, str] = {}
    for path in paths:
        place = os.path.realpath(path) if "\0" not in path else path
        if place in known:
            return known[place], path
        known[place] = path
    return None


@contextmanager
def beside(folder: Path, prefix: str, content: bytes, former: os.stat_result | None = None) -> Iterator[Path]:
    """A new file of the folder, whole and on the disk, to be given its name; deleted if it still has none
    at the end. It gets owner and permissions of ``former``, which it will replace, or the usual ones.

    Its name can't be foretold, and nothing that has it already is opened, nor a link followed (O_EXCL,
    O_NOFOLLOW).
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=prefix, delete=False) as file:
        path = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            _permit(file.fileno() if os.chmod in os.supports_fd else path, former)
            yield path
        finally:
            path.unlink(missing_ok=True)


def _permit(file: int | Path, former: os.stat_result | None) -> None:
    if former is None:
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(file, 0o666 & ~mask)  # noqa: PTH101 - temporary files are their owner's alone
        return
    if hasattr(os, "chown"):
        for owner in (former.st_uid, -1):  # only root gives files away, but groups may be ours
            with suppress(OSError):
                os.chown(file, owner, former.st_gid)
    mode = stat.S_IMODE(former.st_mode) & 0o777
    if os.stat(file).st_gid != former.st_gid:  # noqa: PTH116 - what one group may is not for another
        mode &= ~stat.S_IRWXG
    os.chmod(file, mode)  # noqa: PTH101 - a descriptor is no path


def _status(path: str | Path) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except FileNotFoundError:
        return None


def _opened(path: str | Path, there: os.stat_result) -> int | None:
    """The descriptor by which the shell has opened this file for us to write to."""
    named = _descriptor(str(path))
    for number in (1, 2) if named is None else (named,):
        with suppress(OSError):
            if os.path.samestat(os.fstat(number), there):
                return number
    return None


def _descriptor(path: str) -> int | None:
    """The number in ``/dev/fd/3``, and in a link that leads there."""
    for _ in range(_MOST_LINKS):
        named = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", path)
        if named is not None:
            return int(named[1])
        try:
            path = str(Path(path).parent / os.readlink(path))  # noqa: PTH115 - one link at a time
        except OSError:  # it is none
            return None
    return None


def _open(path: str | Path, there: os.stat_result) -> int:
    """A device or a pipe, opened; a pipe without waiting for somebody at its other end."""
    if not stat.S_ISFIFO(there.st_mode):
        return os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OSError(error.errno, "nobody reads from this pipe") from None
    os.set_blocking(descriptor, True)
    return descriptor


def _through(descriptor: int, content: bytes) -> None:
    """In the order in which it is printed: what stands in Python's buffers goes first."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    _all(descriptor, content)


def _all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _replace(path: Path, content: bytes, former: os.stat_result | None) -> None:
    if former is not None and not os.access(path, os.W_OK):  # a rename would pass over that
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with beside(path.parent, ".memplan.", content, former) as file:  # of a name that is as long as may be
        file.replace(path)
