"""Files that memplan writes: there as a whole or not at all."""

from __future__ import annotations

import gzip
import os
import tempfile
from pathlib import Path

from memplan.errors import MemplanError
from memplan.importers.fields import shown


def write_whole(path: str | Path, content: bytes, what: str) -> None:
    """Write a file beside its place first, then in its place; a device or a pipe is written to as it is.

    Raises MemplanError, which calls the file ``what``.
    """
    try:
        target = Path(path)
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(content)
        else:
            _replace(target.resolve(), content)  # a link stays one, and what it leads to is replaced
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise MemplanError(f"{what} can't be written to {shown(str(path))}: {why}") from None


def zipped(path: str | Path, content: bytes) -> bytes:
    """The content as it belongs into a file of this name: compressed if it ends in ``.gz``. The same content
    makes the same file."""
    return gzip.compress(content, mtime=0) if str(path).endswith(".gz") else content


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:100]}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            Path(file.name).chmod(0o666 & ~mask)  # temporary files are their owner's alone
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
