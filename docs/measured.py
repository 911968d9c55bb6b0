"""The measured sections of docs/accuracy.md, from data/measurements; what `memplan report` prints."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from memplan.commands.report import BEGIN, END
from memplan.report import measured
from memplan.verify.compare import Comparison, compare
from memplan.verify.measurement import Measurement, read_all

FOLDER = Path(__file__).resolve().parent.parent / "data" / "measurements"


def section() -> str:
    """Between the marks that `memplan report --into` looks for."""
    return f"{BEGIN}\n{measured.section(_pairs())}{END}\n"


def on_gpus() -> bool:
    """Whether any was made on one."""
    return any(run.device.kind == "cuda" for run, _ in _pairs())


@cache
def _pairs() -> list[tuple[Measurement, Comparison]]:
    return [(run, compare(run)) for _, run in read_all(FOLDER)]
