"""Tokenised rows of given lengths, for who has no data at hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import log, sqrt
from pathlib import Path
from random import Random
from typing import Any

from memplan.errors import MemplanError, reason, shown
from memplan.files import write_whole

MOST = 1 << 20  # tokens of a row, and rows
_LOGNORMAL = re.compile(r"lognormal:(\d+(?:\.\d+)?),(\d+(?:\.\d+)?),(\d+)")


def length(text: str) -> Callable[[Random], int]:
    """What draws a row's length: ``2048``, ``100-1200`` (evenly), or ``lognormal:MEAN,SD,MAX`` with the mean
    and the standard deviation of the lengths, in tokens. Raises MemplanError."""
    if found := re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", text):
        low, high = int(found[1]), int(found[2] or found[1])
        if 0 < low <= high <= MOST:
            return lambda random: random.randint(low, high)
    elif found := _LOGNORMAL.fullmatch(text):
        mean, deviation, most = float(found[1]), float(found[2]), int(found[3])
        if mean > 0 and 0 < most <= MOST:
            spread = log(1 + (deviation / mean) ** 2)
            middle = log(mean) - spread / 2
            return lambda random: max(1, min(most, round(random.lognormvariate(middle, sqrt(spread)))))
    raise MemplanError(
        f"lengths are given as 2048, 100-1200 or lognormal:MEAN,SD,MAX, from 1 to {MOST:,} tokens, not as "
        f"{shown(text)}"
    )


def write_rows(folder: Path, rows: int, draw: Callable[[Random], int], checkpoint: Path) -> Path:
    """Write ``train.jsonl`` of ``rows`` rows, the same each time: input_ids of the checkpoint's vocabulary, a
    mask of ones and labels. Raises MemplanError if the folder has one, or can't be written."""
    file = folder / "train.jsonl"
    if file.exists():
        raise MemplanError(f"{shown(str(file))} is there already")
    vocabulary, random = _vocabulary(checkpoint), Random(0)
    lines = []
    for _ in range(rows):
        ids = random.choices(range(1, vocabulary), k=draw(random))
        lines.append(json.dumps({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}) + "\n")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MemplanError(f"{shown(str(folder))} can't be made: {reason(error)}") from error
    write_whole(file, "".join(lines).encode(), "the rows")
    return file


def _vocabulary(checkpoint: Path) -> int:
    told: Any = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    text = told.get("text_config")
    size = told.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return int(size) if size else 256
