"""docs/architecture.md says what the tree is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from memplan import rooms

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "memplan"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
THINGS = {
    "families": "FAMILY",
    "attention": "ATTENTION",
    "towers": "TOWER",
    "weights": "WEIGHTS",
    "adapters": "ADAPTER",
    "optimizers": "OPTIMIZER",
    "losses": "LOSS",
    "stacks": "STACK",
    "runfiles": "RUNFILE",
}


def test_every_room_is_on_the_page() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py", "cli.py"}
    drawn = set(re.findall(r"^[^`|]*? {2,}([a-z]+) {2,}\S", PAGE.split("```")[1], re.MULTILINE))
    told = drawn | set(re.findall(r"`([a-z]+)`", PAGE)) | {"kernels"}
    assert folders - told == set()
    assert drawn <= folders | {"cli"}
    assert modules - set(re.findall(r"`(\w+\.py)`", PAGE)) == set()


def test_every_file_on_the_page_is_there() -> None:
    named = re.findall(r"`((?:\w+/)*\w+\.(?:py|toml))`", PAGE)
    assert len(named) > 12
    for name in named:
        assert (PACKAGE / name).is_file() or (ROOT / name).is_file(), name


@pytest.mark.parametrize("room", THINGS)
def test_every_file_of_a_room_is_one_thing(room: str) -> None:
    assert f"| `{room}` |" in PAGE
    assert f"`{THINGS[room]}`" in PAGE
    assert rooms.names(room)
    for name in rooms.names(room):
        assert rooms.thing(room, name, THINGS[room], "thing") is not None


def test_the_rooms_that_are_found_by_names_are_these() -> None:
    assert set(THINGS) == set(re.findall(r"``(\w+)``", (rooms.__doc__ or "").partition("CONTRIBUTING")[0]))
