"""Measurements: one of the repository and one that nobody made, changed as JSON and as bytes."""

from __future__ import annotations

import base64
import io
import json
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from example_measurements import HOST, example

from memplan.report.console import terminal
from memplan.report.verify import html, markdown, show_verdict
from memplan.verify.campaign import done
from memplan.verify.compare import compare
from memplan.verify.measurement import read

from . import tapes
from .command import command, plain
from .mutate import ESCAPES, MARKUP, encoded, flipped, often
from .sense import holds

SHARE = 0.05

MEASURED = Path(__file__).parents[2] / "data" / "measurements"


@cache
def corpus() -> tuple[dict[str, Any], ...]:
    """Measurements on a card and on a host."""
    made = [example(), example(device=HOST, counted="CPU storages", tape=None, tape_step=None)]
    found = [json.loads(path.read_bytes()) for path in sorted(MEASURED.glob("*.json"))]
    return (*(one.model_dump(mode="json") for one in made), *found)


def make(random: Random) -> Any:
    """A file's content, as a JSON value or as bytes."""
    document = random.choice(corpus())
    for _ in range(random.choice((0, 0, 1, 3))):  # whoever sends a file chooses its names
        document = _renamed(random, document)
    document = often(random, document, 2)
    if random.random() < 0.15 and isinstance(document, dict):
        document = document | {"tape": base64.b64encode(encoded(tapes.make(random))).decode()}
    return flipped(random, encoded(document)) if random.random() < 0.1 else document


def _renamed(random: Random, value: Any) -> Any:
    """Another text somewhere."""
    if isinstance(value, str):
        return random.choice((value, "")) + random.choice((*ESCAPES, *MARKUP, "\ud800"))
    places = [
        key
        for key, item in (value.items() if isinstance(value, dict) else ())
        if isinstance(item, str | dict)
    ]
    if not places:
        return value
    key = random.choice(places)
    return value | {key: _renamed(random, value[key])}


def check(value: Any) -> None:
    """Read it, compare it, and print all that is printed of it."""
    path = Path("m.json")
    path.write_bytes(encoded(value))
    measured = read(path)
    found = compare(measured)
    done(Path())
    command("report", ".", "--json")
    for text in (command("report", ".")[1], markdown(measured, found)):
        holds("<script" not in text and "<!--" not in text, "markup of a measurement in Markdown", text)
        holds("\n# heading" not in text, "a heading of a measurement in Markdown", text)
    holds("<script>alert" not in html(measured, found), "markup of a measurement in HTML")
    with redirect_stdout(io.StringIO()) as printed:
        show_verdict(measured, found, terminal())
    plain(printed.getvalue())
