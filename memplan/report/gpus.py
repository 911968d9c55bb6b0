"""The known cards on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.report.console import HEADING, note, table
from memplan.report.wording import short_card
from memplan.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.asked.gpus import Gpu

FOOTNOTE = "Total is what the driver prints, usable what PyTorch can see of it; ~ is a cautious estimate."


def show_gpus(cards: Sequence[Gpu], console: Console) -> None:
    """Print the cards, in GiB."""
    rows = [[Text(cell, HEADING) for cell in ("--gpu", "card", "total GiB", "usable GiB")]]
    for card in cards:
        usable = ("~" if card.visible_is_estimate else "") + gib(card.visible_bytes)
        cells = (card.aliases[0], short_card(card.name), gib(card.total_bytes), usable)
        rows.append([Text(cell) for cell in cells])
    table(console, rows, "<<>>")
    note(console, FOOTNOTE)
