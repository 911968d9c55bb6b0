"""Standard output and standard error: everything that is printed leaves through here or through
:mod:`memplan.report.console`, so that two things hold whatever is printed.

Names, files and errors of others are shown and not obeyed: a terminal acts on the control characters in what
it is sent (ECMA-48), and marks of direction turn around what stands beside them (Unicode's report 36).

The answer arrives or the command fails; what is said beside it, on standard error, is said if it can be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TextIO

from memplan.errors import MemplanError, reason

# Categories of Unicode that move the cursor, command the terminal, reorder lines or can't be encoded.
_held: list[str] = []  # remarks that an answer brings along
_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def visible(text: str) -> str:
    """The text, with a sign in the place of each character that is none itself: one line, of equal length."""
    return text if text.isprintable() else "".join(map(_sign, text))


def _sign(character: str) -> str:
    from unicodedata import category

    code = ord(character)
    if category(character) not in _UNSEEN:
        return character
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode has a picture of each
    return "\u2421" if code == 0x7F else "\ufffd"


def lines(text: str) -> str:
    """The same of a text of several lines, which stay."""
    return "\n".join(map(visible, text.split("\n")))


def say(text: str) -> None:
    """Write a text, which ends its own lines, to standard output. Raises MemplanError if that fails."""
    with writing():
        sys.stdout.write(lines(text))


def aside(text: str) -> None:
    """Write a text, which ends its own lines, to standard error, if that can be: no answer depends on it."""
    try:
        sys.stderr.write(lines(text))
        sys.stderr.flush()
    except OSError:
        _drop(sys.stderr)


def remark(sentence: str) -> None:
    """The same of one sentence, under memplan's name."""
    aside(f"memplan: {visible(typable(sentence))}\n")


def remark_with_answer(sentence: str) -> None:
    """The same once an answer is written: a question that gets none is told why in one sentence."""
    _held.append(sentence)


def drop_remarks() -> None:
    """Nothing more is to be said with an answer."""
    _held.clear()


def typable(sentence: str) -> str:
    """The sentence with the commands that it names as they can be typed where it is read."""
    return sentence.replace("`memplan ", f"`{_called()} ") if "`memplan " in sentence else sentence


@cache
def _called() -> str:
    """How memplan is called: by its name where the shell finds that, else as it was called this time."""
    from shutil import which

    program = Path(sys.argv[0] if sys.argv else "")
    if which("memplan") is None and program.name == "memplan":
        return str(program)
    if which("memplan") is None and program.parts[-2:] == ("memplan", "__main__.py"):
        return f"{min(sys.executable, os.path.relpath(sys.executable), key=len)} -m memplan"
    return "memplan"


@contextmanager
def writing() -> Iterator[None]:
    """Where an answer is written: raises MemplanError if it can't be, BrokenPipeError if nobody reads it."""
    while _held:
        remark(_held.pop(0))
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise MemplanError(f"the answer can't be written to standard output: {reason(error)}") from None


def ready() -> bool:
    """Put the standard streams in order before anything else is opened. False if standard output is closed.

    The first file that is opened gets the lowest number that is free: with one of the three closed, what
    libraries print would be written into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - open as long as the process
    if sys.stdout is None:
        return False
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # ASCII and Latin-1 terminals lack "×" and "█"
    return True


def settle() -> None:
    """Drop what can't be written: at its end Python would try again, complain, and exit with 120."""
    _flush(sys.stdout)
    _flush(sys.stderr)


def _flush(stream: TextIO) -> None:
    try:
        stream.flush()
    except (AttributeError, OSError, ValueError):
        _drop(stream)


def _drop(stream: TextIO) -> None:
    """Give a stream that is closed, full or without a reader another place to flush to."""
    with suppress(AttributeError, OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
