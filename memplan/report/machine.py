"""Records as JSON on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from memplan.streams import say

if TYPE_CHECKING:
    from pydantic import BaseModel

    from memplan.planning.plan import Plan


def print_record(record: BaseModel) -> None:
    """A record on its own, with the version that wrote it."""
    print_answer(record.model_dump(mode="json"))


def print_plan(plan: Plan) -> None:
    """A plan as docs/plan.schema.json has it."""
    say(_plain(plan.model_dump_json(indent=2)) + "\n")


def print_list(name: str, records: Sequence[dict[str, Any]]) -> None:
    """Several records under a name, with the version that wrote them."""
    print_answer({name: records})


def print_answer(document: dict[str, Any]) -> None:
    """A document of JSON values (docs/answers.schema.json), with the version that wrote it."""
    from memplan import __version__
    from memplan.planning.plan import SCHEMA_VERSION

    print_json({"schema_version": SCHEMA_VERSION, "memplan_version": __version__, **document})


def print_json(document: dict[str, Any]) -> None:
    """A document of JSON values."""
    say(json.dumps(document, indent=2) + "\n")


def _plain(text: str) -> str:
    """JSON of the same value that a terminal does not obey and any encoding can write."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")  # a StringIO has none
    except UnicodeEncodeError:
        return _escaped(text, str.isascii)
    lines = text.split("\n")  # which stand between values: those in strings are escaped already
    return "\n".join(line if line.isprintable() else _escaped(line, str.isprintable) for line in lines)


def _escaped(text: str, stays: Callable[[str], bool]) -> str:
    return "".join(letter if stays(letter) else json.dumps(letter)[1:-1] for letter in text)
