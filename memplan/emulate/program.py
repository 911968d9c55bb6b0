"""What a program runs with: its Python, and the PyTorch there. Found without importing any of it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import MemplanError, shown

_PROBE = """
import sys
sys.path = [place for place in sys.path if place]  # not the modules of the folder that it is asked in
import importlib.util, json
found = {"executable": sys.executable}
for name in ("torch", "bitsandbytes", "nvidia"):
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        found[name] = list(spec.submodule_search_locations)
print(json.dumps(found))
"""
# A sitecustomize of the Pythons behind a launcher, which may be one itself and build packages with others:
# each tells the same, and the first that has PyTorch ends before its program begins.
_TELL = f"""
import contextlib, os, sys
if not {{*map(os.path.realpath, sys.orig_argv[1:2])}} & {{os.environ["MEMPLAN_LAUNCHER"]}}:
    with open(os.environ["MEMPLAN_TOLD"], "w") as file, contextlib.redirect_stdout(file):
        exec({_PROBE!r})
    if "torch" in found:
        os._exit(0)
"""
# What starts programs in an environment that it knows: tried with the first two, which pass on what is set.
LAUNCHERS = ("uv", "poetry")
UNKNOWN = ("conda", "mamba", "micromamba", "pdm", "pipenv", "hatch", "pixi", "rye")
_INSTALL = "install PyTorch's CUDA build in its environment (pip install torch, on Linux)"


@dataclass(frozen=True)
class Program:
    """``torch``, ``bitsandbytes``: folders of the packages; ``cuda``: what that PyTorch is built for, as
    (major, minor); ``nvidia``: folders of NVIDIA's packages, if any are there."""

    torch: Path
    torch_version: str
    cuda: tuple[int, int]
    bitsandbytes: Path | None
    nvidia: tuple[Path, ...]


def find(command: list[str]) -> Program:
    """What a command runs with. Raises MemplanError with what to do if it can't be dry-run."""
    if not sys.platform.startswith("linux"):
        raise MemplanError(
            "a card can be emulated on Linux only: run memplan in a container, for example "
            "docker run -it -v $PWD:/work -w /work python:3.12 bash"
        )
    name = _program(command)
    told = _behind(command, name) if _is_launcher(name) else _asked(command, name)
    python = told.pop("executable")
    found = {name: [Path(place) for place in places] for name, places in told.items()}
    if "torch" not in found:
        raise MemplanError(f"{shown(python)} has no PyTorch: {_INSTALL}")
    torch = found["torch"][0]
    version, cuda = _built_for(torch)
    if cuda is None:
        raise MemplanError(f"the PyTorch of {shown(python)}, {version}, is a CPU build: {_INSTALL}")
    return Program(
        torch,
        version,
        cuda,
        found["bitsandbytes"][0] if "bitsandbytes" in found else None,
        tuple(found.get("nvidia", ())),
    )


def _asked(command: list[str], name: str) -> dict[str, Any]:
    """What the Python of a program tells. Raises MemplanError."""
    python = interpreter(name)
    _check_flags(_first_line(name)[1:] or command[command.index(name) + 1 :])
    try:
        done = subprocess.run(
            [python, "-c", _PROBE],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise MemplanError(f"{shown(str(python))} does not run as a Python: {_last_words(error)}") from error
    return {**told, "executable": str(python)}


def _is_launcher(name: str) -> bool:
    """Whether a program starts another, in an environment that only it knows: ``uv run``, or a shim of
    pyenv's. Raises MemplanError for one that nobody has tried."""
    if Path(name).name in UNKNOWN:
        raise MemplanError(
            f"what {shown(name)} starts can't be told: activate its environment, and give memplan the "
            "command that it would start"
        )
    place = shutil.which(name)
    return Path(name).name in LAUNCHERS or (place is not None and Path(place).parent.name == "shims")


def _behind(command: list[str], name: str) -> dict[str, Any]:
    """What the Python that a launcher starts tells: the command is begun, and ends before the program does
    anything. Raises MemplanError."""
    place = shutil.which(name)
    if place is None:
        raise MemplanError(_missing(name))
    words = command[command.index(name) :]
    for at, word in enumerate(words):
        if _is_python(word):
            _check_flags(words[at + 1 :])
    with tempfile.TemporaryDirectory(prefix="memplan-program-") as folder:
        Path(folder, "sitecustomize.py").write_text(_TELL, encoding="utf-8")
        file = Path(folder, "told")
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH")))),
            "MEMPLAN_TOLD": str(file),
            "MEMPLAN_LAUNCHER": os.path.realpath(place),
        }
        # what it prints while it makes the environment is the user's to see
        subprocess.run(command, env=env, check=False, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        try:
            told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
        except (OSError, ValueError, IndexError) as error:
            raise MemplanError(f"{shown(name)} starts no Python: see above") from error
    return told


def _missing(name: str) -> str:
    if Path(name).is_file():
        return f"{shown(name)} can't be executed as it is: start it with python, or make it executable"
    return f"there is no program {shown(name)}"


def _program(command: list[str]) -> str:
    """The program of a command, behind `env` and what that sets. Raises MemplanError."""
    if Path(command[0]).name != "env":
        return command[0]
    words = iter(command[1:])
    for word in words:
        if word in ("-u", "--unset", "-C", "--chdir"):
            next(words, None)
        elif word in ("-i", "-", "--ignore-environment"):
            raise MemplanError(f"env {word} takes away what the card is made of: leave it out")
        elif not word.startswith("-") and "=" not in word:
            return word
    raise MemplanError("there is no program after env")


def _check_flags(words: list[str]) -> None:
    """Raise MemplanError for flags, among the words after Python's name, with which it does not let itself be
    watched."""
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            return
        if word == "--check-hash-based-pycs":
            next(rest, None)
        for at, letter in enumerate(word[1:] if not word.startswith("--") else "", 1):
            if letter in "mc":
                return
            if letter in "EIS":
                raise MemplanError(
                    f"Python can't be watched with {word}, which leaves out what watches: leave it out"
                )
            if letter in "WX":  # with a word of its own, or the next one
                if at == len(word) - 1:
                    next(rest, None)
                break


def interpreter(name: str) -> Path:
    """The Python that a program runs with: itself, or what its first line names. Raises MemplanError."""
    place = shutil.which(name)
    if place is None:
        raise MemplanError(_missing(name))
    if _is_python(place) or _is_python(str(Path(place).resolve())):
        return Path(place)
    words = _first_line(name)
    if not words:
        raise MemplanError(f"{shown(name)} is no Python program: start it as python -m …, or python FILE")
    found = shutil.which(words[0])
    if found is None or not Path(found).name.startswith("python"):
        raise MemplanError(
            f"which Python {shown(name)} runs with can't be told from its first line: start it as python -m …"
        )
    return Path(found)


def _is_python(word: str) -> bool:
    return re.fullmatch(r"python[\d.]*t?", Path(word).name) is not None


def _first_line(name: str) -> list[str]:
    """What a script's first line starts it with, behind `env` and its options, or, where that was too long
    for a first line, the second; nothing if it is no script."""
    place = shutil.which(name)
    assert place is not None
    with Path(place).open("rb") as file:
        first, second = file.readline(4096), file.readline(4096).decode(errors="replace")
    # as pip, uv and distlib write it; uv's may be relative to the script
    if first.startswith(b"#!/bin/sh") and (found := re.match(r"""'''exec' (.+) "\$0" "\$@"\s*$""", second)):
        relative = re.sub(r"""^"\$\(dirname [^/]*\)"/""", "", found[1])
        folder = "" if relative == found[1] else Path(place).resolve().parent
        return [str(Path(folder, *shlex.split(relative)))]
    words = first[2:].decode(errors="replace").split() if first.startswith(b"#!") else []
    if words and Path(words[0]).name == "env":
        behind = next((at for at, word in enumerate(words) if at and not word.startswith("-")), 0)
        return words[behind:]
    return words


def _built_for(torch: Path) -> tuple[str, tuple[int, int] | None]:
    """A PyTorch's version and its CUDA's, from torch/version.py."""
    try:
        text = (torch / "version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    version = re.search(r"^__version__ *(?::.*?)?= *'([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda *(?::.*?)?= *'(\d+)\.(\d+)", text, re.MULTILINE)
    return (
        version[1] if version else "of an unknown version",
        (int(cuda[1]), int(cuda[2])) if cuda else None,
    )


def _last_words(error: BaseException) -> str:
    said = getattr(error, "stderr", None) or str(error)
    return " ".join(str(said).split())[-160:]
