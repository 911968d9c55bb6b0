"""Files that memplan writes: whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from memplan.errors import MemplanError
from memplan.files import same_twice, write_whole


def test_a_file_is_replaced_with_the_usual_rights(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, b"one", "the thing")
    write_whole(path, b"two", "the thing")
    assert path.read_bytes() == b"two"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_whole(link, b"new", "the thing")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_device_is_written_to_and_not_replaced() -> None:
    """As root, the rename would put a file in the place of /dev/null."""
    write_whole("/dev/null", b"gone", "the thing")
    assert Path("/dev/null").is_char_device()


def test_a_pipe_is_written_to() -> None:
    reader, writer = os.pipe()
    write_whole(f"/dev/fd/{writer}", b"through", "the thing")
    os.close(writer)
    with open(reader, "rb") as pipe:  # noqa: PTH123 (a descriptor is no path)
        assert pipe.read() == b"through"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MemplanError, match=r"the thing can't be written to .*: nobody reads from this pipe"):
        write_whole(tmp_path / "pipe", b"through", "the thing")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"through", "the thing")
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", [".", "none/a", "x" * 300, "nul\0"])
def test_what_cannot_be_written_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MemplanError, match=r"^the thing can't be written to ") as error:
        write_whole(name, b"", "the thing")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_loop_of_links_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(MemplanError, match="can't be written"):
        write_whole(tmp_path / "a", b"", "the thing")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_a_replaced_file_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_bytes(b"secret")
    path.chmod(mode)
    link.symlink_to(path)
    for name in (path, link):
        write_whole(name, b"new", "the thing")
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


def test_what_fails_halfway_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MemplanError, match=r"the thing can't be written to .*: No space left on device$"):
        write_whole(path, b"new", "the thing")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_names_are_never_the_same_and_follow_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = os.open

    def note(path: str, flags: int, *rest: int, **more: int) -> int:
        opened.append((Path(path).name, flags))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", note)
    for _ in range(8):
        write_whole(tmp_path / "a", b"", "the thing")
    assert len({name for name, _ in opened}) == len(opened) == 8
    assert all(flags & os.O_EXCL and flags & os.O_NOFOLLOW for _, flags in opened)


@pytest.mark.parametrize("letter", ["x", "é", "語", "🦙"])
def test_the_longest_name_is_written(letter: str, tmp_path: Path) -> None:
    path = tmp_path / (letter * (255 // len(letter.encode())))
    write_whole(path, b"new", "the thing")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev")
def test_a_link_to_what_the_shell_has_opened_is_added_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"old ")
    with log.open("ab") as opened:
        (tmp_path / "near").symlink_to(f"/dev/fd/{opened.fileno()}")
        (tmp_path / "far").symlink_to("near")
        write_whole(tmp_path / "far", b"new", "the thing")
    assert log.read_bytes() == b"old new"


def test_a_file_that_is_not_to_be_written_to_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may do everything
    with pytest.raises(MemplanError, match="Permission denied"):
        write_whole(path, b"new", "the thing")
    assert path.read_bytes() == b"old"


def test_what_a_group_may_is_not_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o664)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    former = path.stat()
    another = os.stat_result((*former[:5], former.st_gid + 1, *former[6:]))
    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr("memplan.files._status", lambda path: another)
    write_whole(path, b"new", "the thing")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


WRITES = """
import sys
from memplan.files import write_whole
sys.stdout.write("before ")
write_whole(sys.argv[1], b"written ", "the thing")
sys.stdout.write("after")
"""


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="needs /dev")
@pytest.mark.parametrize(("opened", "kept"), [("ab", b"kept "), ("wb", b"")], ids=["append", "truncate"])
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "log"])
def test_the_file_that_the_shell_has_opened_is_added_to(
    opened: str, kept: bytes, name: str, tmp_path: Path
) -> None:
    """`--tape /dev/stdout >> log`: neither erased nor written over, and in the order of what is printed."""
    log = tmp_path / "log"
    log.write_bytes(b"kept ")
    with log.open(opened) as stdout:
        subprocess.run(
            [sys.executable, "-c", WRITES, str(log) if name == "log" else name], stdout=stdout, check=True
        )
    assert log.read_bytes() == kept + b"before written after"


def test_names_of_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("x")
    assert same_twice(["x", "y", "z"]) is None
    for other in ("x", "./x", "link", str(tmp_path / "x"), "none/../x"):
        assert same_twice(["y", "x", other]) == ("x", other)
