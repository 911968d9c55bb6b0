"""Files that memplan writes: whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from memplan.errors import MemplanError
from memplan.files import write_whole
from memplan.report.markdown import row


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


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_whole(path, b"new", "the thing")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o600)


def test_a_stream_is_written_on_with_where_it_leads_to_a_file(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"before ")
    with log.open("ab") as file:
        write_whole(f"/dev/fd/{file.fileno()}", b"after", "the thing")
    assert log.read_bytes() == b"before after"


def test_what_strangers_wrote_makes_no_markdown() -> None:
    line = row(["a\n# title", "x|y", "<script>", "<!-- /measured -->", "`code`", "\x1b[2J"])
    assert "\n" not in line
    assert "\x1b" not in line
    assert "<" not in line
    assert line.count("|") == 8  # seven of the table, and one that is escaped
    assert "x\\|y" in line
