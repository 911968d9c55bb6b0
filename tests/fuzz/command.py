"""The command line, run in this process, and what holds of whatever it prints."""

from __future__ import annotations

import io
import unicodedata
from contextlib import redirect_stderr, redirect_stdout

from memplan.cli import main
from memplan.errors import MemplanError

from .harness import sentence
from .sense import holds, strict_json


def command(*argv: str, encoding: str = "utf-8") -> tuple[int, str]:
    """The exit status and what was printed. Raises MemplanError where it is 2."""
    status, out, err = _run(argv, encoding)
    plain(out + err)
    holds(status in (0, 1, 2), f"exit status {status}", err)
    holds(status != 1 or argv[0] in ("fit", "diff"), "exit status 1 of a command that has none", err)
    if status == 2 and argv:
        holds(not out, "an answer with a refusal", out[:200])
        one_line = err.startswith("memplan: ") and err.find("\n") == len(err) - 1
        holds(one_line, "a refusal of no one line", err)
        sentence(err.strip())
        raise MemplanError(err.strip())
    if not {"-h", "--help", "help", "-V", "--version"} & {*argv}:
        holds(bool(out), "no answer")
        if "--json" in argv:
            strict_json(out)
    return status, out


def plain(text: str) -> None:
    """Printed text has no control characters but ends of lines."""
    strange = {char for char in text if unicodedata.category(char) == "Cc" and char != "\n"}
    holds(not strange, "control characters in what is printed", strange)


def _run(argv: tuple[str, ...], encoding: str) -> tuple[int, str, str]:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, errors) for errors in ("strict", "backslashreplace"))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(argv)
        except SystemExit as end:  # argparse has printed its help
            status = int(end.code or 0)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding, "replace"))  # type: ignore[attr-defined]
    return status, texts[0], texts[1]
