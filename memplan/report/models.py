"""The known models on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import HEADING, QUIET, note, table
from memplan.units import count

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.importers.registry import RegistryEntry

FOOTNOTE = "Any other model of these families: its Hub id, or the path to its config.json."


def show_models(models: Sequence[RegistryEntry], console: Console) -> None:
    """Print the models with their parameter counts."""
    rows = [[Text(cell, HEADING) for cell in ("alias", "Hub id", "parameters")]]
    for model in models:
        parameters = count(model.parameters) if model.parameters else "?"
        rows.append([Text(model.alias), Text(model.hub_id, QUIET), Text(parameters)])
    table(console, rows, "<<>", gives_way=1)  # an alias is there to be copied
    note(console, FOOTNOTE)
