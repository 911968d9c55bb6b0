"""What each command prints with --json, as one schema: docs/answers.schema.json, made by docs/generate.py."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from memplan.asked.gpus import Gpu
from memplan.commands.completion import Command
from memplan.emulate.answer import DryRun
from memplan.importers.registry import RegistryEntry
from memplan.planning.frontier import Frontier
from memplan.planning.plan import Plan
from memplan.tape.diff import Diff


class Answer(BaseModel):
    """What all of them begin with."""

    schema_version: int = Field(description="of this schema; a field that goes or changes raises it")
    memplan_version: str


class Card(Gpu):
    """A card."""

    usable_bytes: int = Field(description="what PyTorch can see of it")


class Compared(BaseModel):
    """A measurement without its tape, and what memplan says of the same run."""

    measurement: dict[str, Any] = Field(description="docs/measurement.schema.json, without tape and config")
    comparison: dict[str, Any] = Field(
        description="outcome, why and reason, and predicted and measured bytes with their error in per cent"
    )


class Run(BaseModel):
    """A run of a campaign."""

    name: str
    outcome: str
    seconds: int | None = None
    predicted: int | None = None
    measured: int | None = None
    percent: float | None = None
    why: str | None = None
    lost: bool = False


class Comparison(Answer):
    """Of ``memplan compare``."""

    plans: list[Plan]


class Campaign(Answer):
    """Of ``memplan campaign``."""

    runs: list[Run]


class Report(Answer):
    """Of ``memplan report``."""

    measurements: list[Compared]


class Models(Answer):
    """Of ``memplan models``."""

    models: list[RegistryEntry]


class Cards(Answer):
    """Of ``memplan gpus``."""

    gpus: list[Card]


class Completion(Answer):
    """Of ``memplan completion``."""

    commands: list[Command]


class Table(Answer, Frontier):
    """Of ``memplan frontier``."""


class Differences(Answer, Diff):
    """Of ``memplan diff``."""

    tapes: tuple[str, str]


class Verified(Answer, Compared):
    """Of ``memplan verify``."""


class Stub(Answer):
    """Of ``memplan stub``."""

    model: str
    hub_id: str | None
    folder: str
    data: str | None


COMMANDS: dict[str, type[BaseModel]] = {
    "plan": Plan,
    "fit": Plan,
    "frontier": Table,
    "compare": Comparison,
    "trace": Plan,
    "dry-run": DryRun,
    "stub": Stub,
    "verify": Verified,
    "campaign": Campaign,
    "report": Report,
    "diff": Differences,
    "models": Models,
    "gpus": Cards,
    "completion": Completion,
}


def page() -> str:
    """The schema: ``commands`` says which definition is whose."""
    kinds = list(dict.fromkeys(COMMANDS.values()))
    found, schema = models_json_schema([(kind, "serialization") for kind in kinds])
    commands = {name: found[kind, "serialization"] for name, kind in COMMANDS.items()}
    return (
        json.dumps({"title": "What memplan prints with --json", "commands": commands, **schema}, indent=2)
        + "\n"
    )
