"""Files that memplan writes: there as a whole or not at all."""

from __future__ import annotations

import gzip
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path

from memplan.errors import MemplanError, reason
from memplan.importers.fields import shown

# Names of streams that a process has open: they are written on with, wherever they lead.
_STREAM = re.compile(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/(\d+)")
_NAMED = {"stdout": 1, "stderr": 2}


def write_whole(path: str | Path, content: bytes, what: str) -> None:
    """Write a file beside its place first, then in its place; a device or a pipe is written to as it is.

    A file that is replaced keeps its permissions. Raises MemplanError, which calls the file ``what``.
    """
    try:
        target = Path(path)
        stream = _STREAM.fullmatch(str(target))
        if stream is not None:  # also where it leads to a file, which others write to
            with open(os.dup(_NAMED.get(stream[1]) or int(stream[2])), "wb") as file:  # noqa: PTH123
                file.write(content)
        elif target.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        elif target.exists() and not target.is_file():
            target.write_bytes(content)
        else:
            _replace(target.resolve(), content)  # a link stays one, and what it leads to is replaced
    except (OSError, ValueError, RuntimeError) as error:
        raise MemplanError(f"{what} can't be written to {shown(str(path))}: {reason(error)}") from None


def zipped(path: str | Path, content: bytes) -> bytes:
    """The content as it belongs into a file of this name: compressed if it ends in ``.gz``. The same content
    makes the same file."""
    return gzip.compress(content, mtime=0) if str(path).endswith(".gz") else content


@contextmanager
def beside(folder: Path, prefix: str, content: bytes) -> Iterator[Path]:
    """A new file of the folder, whole and on the disk, to be given its name; deleted if it still has none
    at the end."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=prefix, delete=False) as file:
        path = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            path.chmod(0o666 & ~mask)  # temporary files are their owner's alone
            yield path
        finally:
            path.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    with beside(path.parent, f".{path.name[:100]}.", content) as file:
        if path.exists():
            file.chmod(stat.S_IMODE(path.stat().st_mode))
        file.replace(path)
