"""The libraries of a card that is not there, made without PyTorch: for CUDA 12 and 13, and never half."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memplan.emulate import build
from memplan.emulate.launch import HOOK
from memplan.emulate.program import Program, find, interpreter
from memplan.errors import MemplanError

GIB = 1 << 30
CARD = f"1:{80 * GIB}:0:9:0:132:232448:dry H100"


def compiled(*arguments: str | Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    subprocess.run(["gcc", "-w", *map(str, arguments)], check=True)


def program(folder: Path, cuda: tuple[int, int]) -> Program:
    return Program(folder / "torch", "2.0", cuda, None, ())


# What a program that was compiled with NVIDIA's headers reads of the card: the structures are the release's.
READS = """
#include <cuda_runtime_api.h>
#include <stdio.h>
int main(void) {
    struct cudaDeviceProp p;
    struct cudaPointerAttributes of;
    void *at, *driver;
    int version;
    cudaStreamIsCapturing(0, (enum cudaStreamCaptureStatus *)&version);
    cudaRuntimeGetVersion(&version);
    cudaGetDeviceProperties(&p, 0);
    cudaMalloc(&at, 1000);
    cudaPointerGetAttributes(&of, at);
    cudaGetDriverEntryPointByVersion("cuMemGetInfo", &driver, version, 0, NULL);
    size_t free_bytes = 0, total = 0;
    ((int (*)(size_t *, size_t *))driver)(&free_bytes, &total);
    printf("%d %s %d %d.%d %d %d %zu\\n", version, p.name, p.multiProcessorCount, p.major, p.minor, of.type,
           of.devicePointer == at, total - free_bytes);
    return cudaDeviceSynchronize();
}
"""


def answered(
    source: str, cuda: tuple[int, int], card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """What a program, compiled for the card's libraries, prints there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    headers = build._headers(program(tmp_path, cuda))
    (tmp_path / "reads.c").write_text(source)
    runtime = f"libcudart.so.{cuda[0]}"
    # what asks for the runtime, as PyTorch's libraries do: linked to one with the version that symbols carry
    (tmp_path / "map").write_text(f"{runtime} {{ global: *; }};")
    names = [
        "cudaStreamIsCapturing", "cudaRuntimeGetVersion", "cudaMalloc", "cudaPointerGetAttributes",
        "cudaDeviceSynchronize", "cudaGetDriverEntryPointByVersion", "cudaFuncGetAttributes",
        "__cudaRegisterFatBinary", "__cudaRegisterFunction",
        "cudaGetDeviceProperties" + ("_v2" if cuda[0] == 12 else ""),
    ]  # fmt: skip
    (tmp_path / "theirs.c").write_text("".join(f"int {name}(void) {{ return 0; }}" for name in names))
    theirs = tmp_path / runtime
    compiled(
        "-shared", "-fPIC", tmp_path / "theirs.c", f"-Wl,-soname,{runtime}",
        f"-Wl,--version-script={tmp_path / 'map'}", "-o", theirs,
    )  # fmt: skip
    reads = tmp_path / "reads"
    compiled(*(f"-I{place}" for place in headers), tmp_path / "reads.c", theirs, "-o", reads)
    out = tmp_path / "out"
    out.mkdir()
    told = build._told(program(tmp_path, cuda))
    build.build(out, [reads], headers, ["gcc", *told])
    done = subprocess.run(
        [reads],
        env={"LD_LIBRARY_PATH": str(out), "MEMPLAN_CARD": card},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [(12, 8), (13, 0)])
def test_what_a_program_reads_of_the_card(
    cuda: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = cuda[0] * 1000 + cuda[1] * 10
    assert answered(READS, cuda, CARD, tmp_path, monkeypatch) == f"{release} dry H100 132 9.0 2 1 1024\n"


# A library's binary with PTX for 9.0 and machine code for 8.0, 8.6 and 9.0, or without 8.6, as PyTorch's for
# arm64 is, and CUB's question for which of them a kernel is.
COMPILED_FOR = """
#include <cuda_runtime_api.h>
#include <stdio.h>
void **__cudaRegisterFatBinary(void *binary);
void __cudaRegisterFunction(void **, const char *, char *, const char *, int, void *, void *, void *, void *,
                            int *);
struct entry { unsigned short kind, version; unsigned bytes; unsigned long long following; unsigned unread[3],
               architecture; char more[32], code[64]; };
#define FOR(kind, architecture) { kind, 0x101, 64, 64, { 0, 0, 0 }, architecture }
static struct { unsigned magic; unsigned short version, bytes; unsigned long long following;
                struct entry entries[4]; }
    with = { 0xba55ed50, 1, 16, 512, { FOR(1, 90), FOR(2, 80), FOR(2, 86), FOR(2, 90) } },
    without = { 0xba55ed50, 1, 16, 384, { FOR(1, 90), FOR(2, 80), FOR(2, 90) } };
int main(void) {
    static char kernels[2][64];
    const void *binaries[] = { &with, &without };
    for (int i = 0; i < 2; i++) {
        struct { int magic, version; const void *data, *more; } wrapper = { 0x466243b1, 1, binaries[i], 0 };
        struct cudaFuncAttributes of;
        void **handle = __cudaRegisterFatBinary(&wrapper);
        __cudaRegisterFunction(handle, kernels[i], 0, "_ZN3cub11EmptyKernelIvEEvv", -1, 0, 0, 0, 0, 0);
        cudaFuncGetAttributes(&of, kernels[i]);
        printf("%d ", of.ptxVersion);
    }
    return 0;
}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "told"), [("8:0", "80 80 "), ("8:9", "86 80 "), ("9:0", "90 90 "), ("12:0", "120 120 ")]
)
def test_for_which_architecture_a_kernel_is_compiled(
    capability: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = CARD.replace(":9:0:", f":{capability}:")
    assert answered(COMPILED_FOR, (13, 0), card, tmp_path, monkeypatch) == told


def test_the_versions_that_pytorch_asks_for(tmp_path: Path) -> None:
    assert "-DRELEASE=12080" in build._told(program(tmp_path, (12, 8)))
    metadata = tmp_path / "torch-2.10.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Requires-Dist: nvidia-cudnn-cu12==9.10.2.21; platform_system == 'Linux'\n")
    told = build._told(program(tmp_path, (12, 8)))
    assert {"-DCUDNN_MAJOR=9", "-DCUDNN_MINOR=10", "-DCUDNN_PATCH=2"} < set(told)


def test_another_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MemplanError, match="built for CUDA 11, and emulated are CUDA 12 and 13"):
        build.libraries(program(tmp_path, (11, 8)))


def test_what_is_half_made_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "cards" / "key"

    def interrupted() -> None:
        with build._making(folder) as made:
            (made / "libcuda.so.1").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(folder.parent.iterdir()) == []
    with build._making(folder), build._making(folder) as other:  # two at once: the first one stays
        (other / "first").touch()
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert list(folder.parent.iterdir()) == [folder]


def test_releases_have_folders_of_their_own(tmp_path: Path) -> None:
    keys = {build._key([], build._told(program(tmp_path, cuda))) for cuda in ((12, 8), (12, 6), (13, 0))}
    assert len(keys) == 3


def test_without_network_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PATH", str(tmp_path))  # no uv
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        MemplanError, match=r"can't be fetched.*pip install nvidia-cuda-runtime-cu12==12.8.90"
    ):
        build._headers(program(tmp_path, (12, 8)))
    assert list((tmp_path / "cache").rglob("*.h")) == []


def test_without_a_compiler_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "gcc -m64")
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(MemplanError, match="install gcc, or pip install ziglang beside memplan"):
        build.compiler()
    monkeypatch.setattr(build, "find_spec", lambda name: name)
    assert build.compiler() == [sys.executable, "-m", "ziglang", "cc"]


def test_nvidia_s_libraries_are_not_loaded_by_path(tmp_path: Path) -> None:
    """As PyTorch loads them, where they lie beside it."""
    (tmp_path / "empty.c").write_text("int nothing(void) { return 0; }")
    ours, theirs = tmp_path / "ours", tmp_path / "site" / "nvidia" / "cu13" / "lib"
    ours.mkdir()
    theirs.mkdir(parents=True)
    (ours / "order").write_text("libmemplan_card.so\nlibcublas.so.13\n")
    for file in ((ours / "libmemplan_card.so"), (ours / "libcublas.so.13")):
        compiled("-shared", "-fPIC", tmp_path / "empty.c", "-o", file)
    for name in ("libcublas.so.13", "libcublas.so.13.1.0", "libnvJitLink.so.13"):
        shutil.copy(ours / "libcublas.so.13", theirs / name)
    code = (
        "import ctypes, pathlib, sys; [ctypes.CDLL(str(p)) for p in pathlib.Path(sys.argv[1]).iterdir()]; "
        "maps = open('/proc/self/maps').read(); print(sys.argv[1] in maps, 'ours/libcublas.so.13' in maps)"
    )
    env = {**os.environ, "PYTHONPATH": str(HOOK), "MEMPLAN_CARD_LIBRARIES": str(ours)}
    done = subprocess.run(
        [sys.executable, "-c", code, theirs], env=env, check=True, capture_output=True, text=True
    )
    assert done.stdout == "False True\n"


def test_where_there_are_few_addresses(tmp_path: Path) -> None:
    library = tmp_path / "card.so"
    compiled("-shared", "-fPIC", build.SOURCES / "card.c", "-o", library)
    code = (
        "import ctypes, sys; card = ctypes.CDLL(sys.argv[1]); card.card_addresses.restype = ctypes.c_void_p; "
        "print(card.card_addresses(ctypes.c_size_t(79 << 30)) is not None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, library],
        env={**os.environ, "MEMPLAN_CARD": CARD},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)),
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n"
    ctypes.CDLL(str(library))  # and it loads where there are enough


def test_there_are_addresses_for_as_many_cards_as_may_be(tmp_path: Path) -> None:
    library = tmp_path / "card.so"
    compiled("-shared", "-fPIC", build.SOURCES / "card.c", "-o", library)
    code = (
        "import ctypes, sys; card = ctypes.CDLL(sys.argv[1]); card.card_addresses.restype = ctypes.c_void_p; "
        "card.card_of.argtypes = [ctypes.c_void_p]; card.card_select(63); "
        "print(card.card_of(card.card_addresses(ctypes.c_size_t(79 << 30))))"
    )
    told = f"64:{288 << 30}:0:10:0:148:232448:B300"
    done = subprocess.run(
        [sys.executable, "-c", code, library],
        env={**os.environ, "MEMPLAN_CARD": told},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "63\n"


# -- programs whose Python is not in their first line -----------------------------------------------------


def written(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("second", "python"),
    [
        ("""'''exec' "{0}/a b/bin/python" "$0" "$@\"""", "{0}/a b/bin/python"),  # pip
        ("""'''exec' '{0}/a b/bin/python' "$0" "$@\"""", "{0}/a b/bin/python"),  # uv
        (
            """'''exec' "$(dirname -- "$(realpath -- "$0")")"/'python' "$0" "$@\"""",
            "{0}/bin/python",
        ),  # --relocatable
    ],
)
def test_a_python_too_long_for_the_first_line(second: str, python: str, tmp_path: Path) -> None:
    for folder in ("a b/bin", "bin"):
        written(tmp_path / folder / "python", "")
    script = written(tmp_path / "bin" / "trl", "#!/bin/sh\n" + second.format(tmp_path) + "\n' '''\n")
    assert interpreter(script) == Path(python.format(tmp_path))


@pytest.mark.parametrize("place", ["bin/uv", "shims/python", "shims/accelerate"])
def test_the_python_behind_a_launcher(place: str, tmp_path: Path) -> None:
    """It is asked by beginning the command, of which nothing is run."""
    pytest.importorskip("torch")
    name = written(tmp_path / place, f'#!/bin/bash\n[ "$1" = run ] && shift\nexec {sys.executable} "$@"\n')
    (tmp_path / "train.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(MemplanError, match="is a CPU build"):
        find([name, *(["run"] if name.endswith("uv") else []), str(tmp_path / "train.py")])
    assert not (tmp_path / "ran").exists()


def test_launchers_that_can_t_be_looked_behind(tmp_path: Path) -> None:
    with pytest.raises(MemplanError, match="what 'conda' starts can't be told: activate its environment"):
        find(["conda", "run", "-n", "x", "python", "train.py"])
    with pytest.raises(MemplanError, match="can't be watched with -I"):
        find([written(tmp_path / "uv", ""), "run", "python", "-I", "train.py"])
    with pytest.raises(MemplanError, match="starts no Python"):
        find([written(tmp_path / "uv", "#!/bin/sh\n"), "run", "train.py"])
