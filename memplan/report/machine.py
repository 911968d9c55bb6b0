"""Records as JSON on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

    from memplan.planner import Plan


def print_record(record: BaseModel) -> None:
    """A record on its own, with the version that wrote it."""
    from memplan import __version__

    document = {"memplan_version": __version__, **record.model_dump(mode="json")}
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def print_plan(plan: Plan) -> None:
    """A plan as docs/plan.schema.json has it."""
    sys.stdout.write(plan.model_dump_json(indent=2) + "\n")


def print_list(name: str, records: Sequence[dict[str, Any]]) -> None:
    """Several records under a name, with the version that wrote them."""
    from memplan import __version__
    from memplan.planner import SCHEMA_VERSION

    document = {"schema_version": SCHEMA_VERSION, "memplan_version": __version__, name: records}
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
