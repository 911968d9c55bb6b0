"""Compile the libraries of a card that is not there, for the PyTorch and bitsandbytes of a program.

Each of NVIDIA's libraries that their shared objects need is made under its own name, with every symbol that
they ask of it: the few that matter are written out in ``card/``, the rest do nothing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from memplan.emulate import elf
from memplan.emulate.program import Program
from memplan.errors import MemplanError, reason, shown

SOURCES = Path(__file__).resolve().parent / "card"
# where what matters of a library is written; of all others in libraries.c, under a macro of its name
WRITTEN = {"cudart": "runtime.c", "cuda": "driver.c"}
# whose functions are there whether or not PyTorch asks for them: other extensions do, or look them up by name
DECLARED = {"cudart": "cuda_runtime_api.h", "cuda": "cuda.h"}
LIBRARY = re.compile(r"lib(cu\w+|nccl|nvrtc|nvshmem|nvidia|nvToolsExt|nvJitLink)[\w-]*\.so")
DRIVER, MANAGEMENT = "libcuda.so.1", "libnvidia-ml.so.1"
# what a library's other functions return: success, but where sizes would be read back that nobody has set:
# "not supported" as cusolver_common.h, cusparse.h and cufft.h have it
REFUSED = {"cusolver": 9, "cusparse": 10, "cufft": 16}
CARD = "libmemplan_card.so"
ORDER = "order"  # the file that lists them as they have to be loaded
# By CUDA's release, NVIDIA's packages with the headers whose structures card/ fills in, which stay the same
# within it. What a C compiler sees of crt/ is macros, the same in both.
CRT = "nvidia-cuda-crt==13.0.88"
HEADERS = {12: ("nvidia-cuda-runtime-cu12==12.8.90", CRT), 13: ("nvidia-cuda-runtime==13.0.96", CRT)}


@dataclass
class Wanted:
    """What is asked of a library: symbols, and the version that they carry, if any."""

    version: str | None = None
    symbols: set[str] = field(default_factory=set)


def libraries(program: Program) -> Path:
    """The folder of the libraries for a program, made if it is not there yet. Raises MemplanError if they
    can't be made."""
    if program.cuda[0] not in HEADERS:
        raise MemplanError(
            f"PyTorch {program.torch_version} is built for CUDA {program.cuda[0]}, and emulated are CUDA "
            f"{' and '.join(map(str, HEADERS))}: install a build for one of them"
        )
    objects, told = _objects(program), _told(program)
    folder = _cache() / _key(objects, told)
    if (folder / ORDER).is_file():
        return folder
    try:
        with _making(folder) as made:
            build(made, objects, _headers(program), [*compiler(), *told])
    except OSError as error:
        raise MemplanError(
            f"the card's libraries can't be written to {shown(str(folder))}: {reason(error)}"
        ) from error
    except subprocess.CalledProcessError as error:
        words = " ".join(str(error.stderr or error).split())[-200:]
        raise MemplanError(f"the card's libraries can't be compiled: {words}") from error
    return folder


@contextmanager
def _making(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``folder`` once it is whole. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
    try:
        yield made
        try:
            made.replace(folder)
        except OSError:
            if not folder.is_dir():  # else another dry run was first
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def build(out: Path, objects: list[Path], headers: list[Path], compiler: list[str]) -> None:
    """Write the libraries that shared objects need into the folder ``out``. Raises CalledProcessError."""

    def compile_(to: str, *arguments: Path | str) -> None:
        flags = ["-shared", "-fPIC", "-O1", "-w", *(f"-I{place}" for place in (SOURCES, *headers))]
        subprocess.run(
            [*compiler, *flags, *map(str, arguments), "-ldl", "-lpthread", "-o", str(out / to)],
            check=True,
            capture_output=True,
            text=True,
        )

    compile_(CARD, SOURCES / "card.c", f"-Wl,-soname,{CARD}")
    found = {**wanted(objects), DRIVER: Wanted(), MANAGEMENT: Wanted()}
    for file, library in found.items():
        if (name := DECLARED.get(_stem(file))) is not None:
            header = next(path for place in headers if (path := place / name).is_file())
            library.symbols |= declared(header.read_text(encoding="utf-8"))
    for file, library in found.items():
        stem = _stem(file)
        source = SOURCES / WRITTEN.get(stem, "libraries.c")
        rest, script = out / f"{stem}.c", out / f"{stem}.map"
        nothing = f"(void) {{ return {REFUSED.get(stem, 0)}; }}"
        # weak: those that are written out take their place
        lines = [f"__attribute__((weak)) int {name}{nothing}\n" for name in sorted(library.symbols)]
        rest.write_text("".join(lines))
        options = [f"-D{stem.upper()}", f"-Wl,-soname,{file}"]
        if library.version is not None:
            script.write_text(f"{library.version} {{ global: *; }};\n")
            options.append(f"-Wl,--version-script={script}")
        compile_(file, source, rest, *options, out / CARD, "-Wl,-rpath,$ORIGIN")
        (out / f"{file.partition('.so')[0]}.so").symlink_to(file)  # as some ask for it
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


def declared(header: str) -> set[str]:
    """The functions of one of NVIDIA's headers, by the names that they have in its library: some have the
    newest version under a plain name."""
    renamed = dict(re.findall(r"#\s*define (cu\w+)\s+(cu\w+_v\d+)\s*$", header, re.MULTILINE))
    names = re.findall(r"\b(?:CUDAAPI|CUDARTAPI|CUDARTAPI_CDECL)\s+(\w+)\s*\(", header)
    return {renamed.get(name, name) for name in names}


def _stem(file: str) -> str:
    found = LIBRARY.match(file)
    assert found is not None, file
    return found[1]


def _objects(program: Program) -> list[Path]:
    found = sorted((program.torch / "lib").glob("*.so"))
    if program.bitsandbytes is not None:
        found += sorted(program.bitsandbytes.glob(f"libbitsandbytes_cuda{program.cuda[0]}?.so"))
    return found


def _told(program: Program) -> list[str]:
    """What the libraries say that they are, as the compiler is told: CUDA's release, and the versions of
    cuDNN and NCCL that PyTorch's package asks for."""
    major, minor = program.cuda
    versions = {"cudnn": ("9", "26", "0"), "nccl": ("2", "30", "7")}  # 2.15's, where a package names none
    for metadata in program.torch.parent.glob("torch-*.dist-info/METADATA"):
        text = metadata.read_text(encoding="utf-8", errors="replace")
        asked = re.findall(
            r"^Requires-Dist: nvidia-(cudnn|nccl)-cu\d+==(\d+)\.(\d+)\.(\d+)", text, re.MULTILINE
        )
        versions.update({name: tuple(numbers) for name, *numbers in asked})
    told = {"RELEASE": str(major * 1000 + minor * 10)}
    for name, numbers in versions.items():
        told.update(
            zip((f"{name}_{part}".upper() for part in ("major", "minor", "patch")), numbers, strict=True)
        )
    return [f"-D{name}={number}" for name, number in told.items()]


def _key(objects: list[Path], told: list[str]) -> str:
    """Of all that the libraries are made from."""
    digest = hashlib.sha256(f"{told} {platform.machine()}".encode())
    for source in (*sorted(SOURCES.iterdir()), Path(__file__), Path(elf.__file__)):
        digest.update(source.read_bytes())
    for path in objects:
        there = path.stat()
        digest.update(f"{path}:{there.st_size}:{there.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _cache() -> Path:
    place = os.environ.get("XDG_CACHE_HOME")
    return (Path(place) if place else Path.home() / ".cache") / "memplan" / "cards"


def compiler() -> list[str]:
    """A C compiler: the system's, else Zig's, as the package ziglang has it. Raises MemplanError."""
    for command in (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"], ["zig", "cc"]):
        if command and shutil.which(command[0]):
            return command
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise MemplanError(
        "the card's libraries need a C compiler: install gcc, or pip install ziglang beside memplan"
    )


def _headers(program: Program) -> list[Path]:
    """The folders with NVIDIA's headers: of the program's environment, where Triton has some, else fetched
    once. Raises MemplanError, OSError."""
    release = program.cuda[0]
    triton = program.torch.parent / "triton" / "backends" / "nvidia" / "include"
    there = [place for package in program.nvidia for place in sorted(package.glob("*/include"))]
    if found := _usable([*there, triton], release):
        return found
    fetched = _cache() / f"headers-{release}"
    if not fetched.is_dir():
        with _making(fetched) as made:
            _fetch(HEADERS[release], made)
    return _usable(sorted(fetched.glob("nvidia/*/include")), release)


def _usable(places: list[Path], release: int) -> list[Path]:
    """A folder with a release's headers and one with crt/, if both are there."""
    of_release = [place for place in places if _release(place / "cuda.h") == release]
    main = next((place for place in of_release if (place / "cuda_runtime_api.h").is_file()), None)
    crt = next((place for place in places if (place / "crt" / "host_defines.h").is_file()), None)
    return [main, crt] if main and crt else []


def _release(header: Path) -> int | None:
    """CUDA's release as cuda.h has it, None where there is none."""
    try:
        version = re.search(r"^#define CUDA_VERSION (\d+)", header.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(version[1]) // 1000 if version else None


def _fetch(packages: tuple[str, ...], to: Path) -> None:
    """Unpack packages from PyPI. Raises MemplanError."""
    tools = ([sys.executable, "-m", "pip"], ["uv", "pip"])
    for tool in tools:
        with suppress(OSError, subprocess.CalledProcessError):
            subprocess.run(
                [*tool, "install", "-q", "--no-deps", "--target", str(to), *packages],
                check=True,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
            )
            return
    raise MemplanError(
        "NVIDIA's headers can't be fetched from PyPI, and the program's environment has none: "
        f"pip install {' '.join(packages)} there"
    )
