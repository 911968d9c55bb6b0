"""Compile the libraries of a card that is not there, for the PyTorch and bitsandbytes of this environment.

Each of NVIDIA's libraries that their shared objects need is made under its own name, with every symbol that
they ask of it: the few that matter are written out in the C files here, the rest return success.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
# where what matters of a library is written; of all others in libraries.c, under a macro of its name
WRITTEN = {"cudart": "runtime.c", "cuda": "driver.c"}
LIBRARY = re.compile(r"lib(cu\w+|nccl|nvrtc|nvshmem|nvidia)[\w-]*\.so")
DRIVER, MANAGEMENT = "libcuda.so.1", "libnvidia-ml.so.1"
CARD = "libdry_card.so"


@dataclass
class Wanted:
    """What is asked of a library: symbols, and the version that they carry, if any."""

    version: str | None = None
    symbols: set[str] = field(default_factory=set)


def wanted(objects: list[Path]) -> dict[str, Wanted]:
    """By the file name of each of NVIDIA's libraries, what the shared objects ask of it."""
    libraries: dict[str, Wanted] = {}
    symbols: dict[str | None, set[str]] = defaultdict(set)
    for path in objects:
        for name in re.findall(r"\(NEEDED\).*\[(.+)\]", _readelf("-d", path)):
            if LIBRARY.match(name):
                libraries.setdefault(name, Wanted())
        file = ""
        for line in _readelf("-V", path).splitlines():
            if found := re.search(r"File: (\S+)", line):
                file = found[1]
            elif file in libraries and (found := re.search(r"Name: (\S+)", line)):
                libraries[file].version = found[1]
        for line in _readelf("--dyn-syms", path).splitlines():
            fields = line.split()
            if len(fields) > 7 and fields[6] == "UND":
                name, _, version = fields[7].partition("@")
                symbols[version or None].add(name)
    for file, library in libraries.items():
        library.symbols = symbols[library.version]
        if library.version is None:  # NCCL's, cuFile's: theirs are those that begin with the name
            library.symbols = {name for name in symbols[None] if name.lower().startswith(_stem(file).lower())}
    return libraries


def build(out: Path, headers: Path) -> None:
    """Write the libraries into the folder ``out``, with NVIDIA's headers in ``headers``. Raises
    CalledProcessError if something does not compile."""
    site = Path(sysconfig.get_path("purelib"))
    objects = [*site.glob("torch/lib/*.so"), *site.glob("bitsandbytes/libbitsandbytes_cuda130.so")]
    _compile(out / CARD, headers, HERE / "card.c")
    libraries = {**wanted(objects), DRIVER: Wanted(symbols=_driver(headers)), MANAGEMENT: Wanted()}
    for file, library in libraries.items():
        stem = _stem(file)
        source = HERE / WRITTEN.get(stem, "libraries.c")
        rest, script = out / f"{stem}.c", out / f"{stem}.map"
        names = sorted(library.symbols - _defined(source, headers))
        rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
        options = [f"-D{stem.upper()}", f"-Wl,-soname,{file}"]
        if library.version is not None:
            script.write_text(f"{library.version} {{ global: *; }};\n")
            options.append(f"-Wl,--version-script={script}")
        _compile(out / file, headers, source, rest, *options, out / CARD, "-Wl,-rpath,$ORIGIN")


def _stem(file: str) -> str:
    return LIBRARY.match(file)[1]  # type: ignore[index]


def _driver(headers: Path) -> set[str]:
    """All of the driver's functions, which programs look up by name when they run."""
    names = re.findall(r"^CUresult CUDAAPI (cu\w+)\(", (headers / "cuda.h").read_text(), re.MULTILINE)
    return {_renamed(headers).get(name, name) for name in names}


def _defined(source: Path, headers: Path) -> set[str]:
    """The functions that a C file defines, by the names that they have in its library."""
    names = re.findall(r"^\w[\w *]*?(\w+)\(", source.read_text(), re.MULTILINE)
    return {_renamed(headers).get(name, name) for name in names}


@cache
def _renamed(headers: Path) -> dict[str, str]:
    """``cuda.h`` calls the newest version of a function by its plain name."""
    text = (headers / "cuda.h").read_text()
    return dict(re.findall(r"#\s*define (cu\w+)\s+(cu\w+_v\d+)\s*$", text, re.MULTILINE))


def _readelf(what: str, path: Path) -> str:
    return subprocess.run(["readelf", "-W", what, path], capture_output=True, text=True, check=True).stdout


def _compile(to: Path, headers: Path, *arguments: Path | str) -> None:
    flags = ["-shared", "-fPIC", "-O1", "-w", f"-I{headers}", f"-I{HERE}"]
    subprocess.run(["gcc", *flags, *arguments, "-ldl", "-o", to], check=True)
