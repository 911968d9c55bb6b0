"""JSON from strangers, read within bounds: a few bytes of it can become thirty times as many in memory."""

from __future__ import annotations

import json
from typing import Any

# A list or an object takes 60 bytes and more for the two that it is in the file, a short text 70 for four;
# the rest grows eightfold at most. What memplan reads has far fewer: the tape of 126 layers has thousands of
# lists and texts, the config.json of a classifier two texts for each of its labels.
MOST_CONTAINERS = 1 << 17
MOST_TEXTS = 1 << 20


class TooManyParts(ValueError):
    """A file holds more than any of its kind. ``str(error)`` goes on after the file's name."""


def read_json(content: bytes) -> Any:
    """The value of a JSON text, whose length the caller has bounded.

    Raises TooManyParts, and as ``json.loads`` does ValueError or RecursionError.
    """
    if content.count(b"[") + content.count(b"{") > MOST_CONTAINERS:
        raise TooManyParts(f"holds more than {MOST_CONTAINERS:,} lists and objects")
    if content.count(b'"') > 2 * MOST_TEXTS:
        raise TooManyParts(f"holds more than {MOST_TEXTS:,} texts")
    return json.loads(content.decode("utf-8-sig"))
