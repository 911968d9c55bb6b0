"""Compile the libraries of a card that is not there, for the PyTorch and bitsandbytes of a program.

Each of NVIDIA's libraries that their shared objects need is made under its own name, with every symbol that
they ask of it: the few that matter are written out in ``card/``, the rest do nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from memplan.emulate import elf
from memplan.emulate.program import Program
from memplan.errors import MemplanError, reason, shown

SOURCES = Path(__file__).resolve().parent / "card"
# where what matters of a library is written; of all others in libraries.c, under a macro of its name
WRITTEN = {"cudart": "runtime.c", "cuda": "driver.c"}
LIBRARY = re.compile(r"lib(cu\w+|nccl|nvrtc|nvshmem|nvidia)[\w-]*\.so")
DRIVER, MANAGEMENT = "libcuda.so.1", "libnvidia-ml.so.1"
# what a library's other functions return: success, but where sizes would be read back that nobody has set:
# "not supported" as cusolver_common.h, cusparse.h and cufft.h have it
REFUSED = {"cusolver": 9, "cusparse": 10, "cufft": 16}
CARD = "libmemplan_card.so"
ORDER = "order"  # the file that lists them as they have to be loaded
CUDA = 13  # the release whose structures card/ fills in
# what has NVIDIA's headers, where the program's environment has not; any release of CUDA 13 does
HEADERS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88")


@dataclass
class Wanted:
    """What is asked of a library: symbols, and the version that they carry, if any."""

    version: str | None = None
    symbols: set[str] = field(default_factory=set)


def libraries(program: Program) -> Path:
    """The folder of the libraries for a program, made if it is not there yet. Raises MemplanError if they
    can't be made."""
    if program.cuda[0] != CUDA:
        raise MemplanError(
            f"PyTorch {program.torch_version} is built for CUDA {program.cuda[0]}, and emulated is "
            f"CUDA {CUDA}: install a build for it (pip install torch takes one since 2.11)"
        )
    objects = _objects(program)
    folder = _cache() / _key(objects)
    if (folder / ORDER).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
        try:
            build(made, objects, _headers(program), _compiler())
            with suppress(OSError):  # another dry run was first
                made.replace(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        if not (folder / ORDER).is_file():
            raise FileNotFoundError(2, "it is there, but not whole: remove it", str(folder))
    except OSError as error:
        raise MemplanError(
            f"the card's libraries can't be written to {shown(str(folder))}: {reason(error)}"
        ) from error
    except subprocess.CalledProcessError as error:
        words = " ".join(str(error.stderr or error).split())[-200:]
        raise MemplanError(f"the card's libraries can't be compiled: {words}") from error
    return folder


def build(out: Path, objects: list[Path], headers: Path, compiler: list[str]) -> None:
    """Write the libraries that shared objects need into the folder ``out``. Raises CalledProcessError."""

    def compile_(to: str, *arguments: Path | str) -> None:
        flags = ["-shared", "-fPIC", "-O1", "-w", f"-I{headers}", f"-I{SOURCES}"]
        subprocess.run(
            [*compiler, *flags, *map(str, arguments), "-ldl", "-lpthread", "-o", str(out / to)],
            check=True,
            capture_output=True,
            text=True,
        )

    compile_(CARD, SOURCES / "card.c", f"-Wl,-soname,{CARD}")
    names = _Names(headers)
    found = {**wanted(objects), DRIVER: Wanted(symbols=names.driver()), MANAGEMENT: Wanted()}
    for file, library in found.items():
        stem = _stem(file)
        source = SOURCES / WRITTEN.get(stem, "libraries.c")
        rest, script = out / f"{stem}.c", out / f"{stem}.map"
        absent = sorted(library.symbols - names.defined(source))
        rest.write_text(
            "".join(f"int {name}(void) {{ return {REFUSED.get(stem, 0)}; }}\n" for name in absent)
        )
        options = [f"-D{stem.upper()}", f"-Wl,-soname,{file}"]
        if library.version is not None:
            script.write_text(f"{library.version} {{ global: *; }};\n")
            options.append(f"-Wl,--version-script={script}")
        compile_(file, source, rest, *options, out / CARD, "-Wl,-rpath,$ORIGIN")
    (out / ORDER).write_text("\n".join([CARD, *found]) + "\n")


def wanted(objects: list[Path]) -> dict[str, Wanted]:
    """By the file name of each of NVIDIA's libraries, what the shared objects ask of it."""
    found: dict[str, Wanted] = {}
    symbols: dict[str | None, set[str]] = defaultdict(set)
    for path in objects:
        asked = elf.asked(path)
        for name in filter(LIBRARY.match, asked.needed):
            found.setdefault(name, Wanted())
        for name, version in asked.versions.items():
            if name in found:
                found[name].version = version
        for marked, undefined in asked.symbols.items():
            symbols[marked] |= undefined
    for file, library in found.items():
        library.symbols = symbols[library.version]
        if library.version is None:  # NCCL's, cuFile's: theirs are those that begin with the name
            library.symbols = {name for name in symbols[None] if name.lower().startswith(_stem(file).lower())}
    return found


class _Names:
    """What NVIDIA's headers call the driver's functions: ``cuda.h`` has the newest version of one under its
    plain name."""

    def __init__(self, headers: Path) -> None:
        self.text = (headers / "cuda.h").read_text()
        self.renamed = dict(re.findall(r"#\s*define (cu\w+)\s+(cu\w+_v\d+)\s*$", self.text, re.MULTILINE))

    def driver(self) -> set[str]:
        """All of the driver's functions, which programs look up by name when they run."""
        names = re.findall(r"^CUresult CUDAAPI (cu\w+)\(", self.text, re.MULTILINE)
        return {self.renamed.get(name, name) for name in names}

    def defined(self, source: Path) -> set[str]:
        """The functions that a C file defines, by the names that they have in its library."""
        names = re.findall(r"^\w[\w *]*?(\w+)\(", source.read_text(), re.MULTILINE)
        return {self.renamed.get(name, name) for name in names}


def _stem(file: str) -> str:
    found = LIBRARY.match(file)
    assert found is not None, file
    return found[1]


def _objects(program: Program) -> list[Path]:
    found = sorted((program.torch / "lib").glob("*.so"))
    if program.bitsandbytes is not None:
        found += sorted(
            program.bitsandbytes.glob(f"libbitsandbytes_cuda{program.cuda[0]}{program.cuda[1]}.so")
        )
    return found


def _key(objects: list[Path]) -> str:
    """Of all that the libraries are made from."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    for path in (*objects, Path(__file__)):
        there = path.stat()
        digest.update(f"{path}:{there.st_size}:{there.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _cache() -> Path:
    place = os.environ.get("XDG_CACHE_HOME")
    return (Path(place) if place else Path.home() / ".cache") / "memplan" / "cards"


def _compiler() -> list[str]:
    """A C compiler: the system's, else the one of the package ziglang. Raises MemplanError."""
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        if shutil.which(name):
            return [name]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise MemplanError("the card's libraries need a C compiler: install gcc, or pip install ziglang")


def _headers(program: Program) -> Path:
    """The folder with NVIDIA's headers: of the program's environment, else fetched once. Raises MemplanError,
    CalledProcessError."""
    fetched = _cache() / "headers"
    places = [place / f"cu{CUDA}" / "include" for place in (*program.nvidia, fetched / "nvidia")]
    for place in places:
        if (place / "cuda_runtime_api.h").is_file() and (place / "crt").is_dir():
            return place
    fetched.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(fetched), *HEADERS]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        raise MemplanError(
            "NVIDIA's headers can't be fetched from PyPI, and the program's environment has none: "
            f"pip install {' '.join(HEADERS)} there"
        ) from error
    for wheel in fetched.glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(fetched)
        wheel.unlink()
    return places[-1]
