"""A file's keys and values, read within bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memplan.bounded import TooManyParts, read_json, read_yaml
from memplan.errors import MemplanError, printable, reason, shown

_MOST_BYTES = 256 << 10  # the longest of axolotl's 252 examples has 5 KiB; PyYAML reads 100 KiB a second


def document(path: str | Path) -> dict[str, Any] | None:
    """The mapping in a file; None where there is no file of that name, or where its reader says better what
    is wrong with it. Raises MemplanError."""
    file = Path(path).expanduser()
    try:
        if not file.is_file():
            return None
        with file.open("rb") as opened:
            content = opened.read(_MOST_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        raise MemplanError(f"{shown(str(path))} can't be read: {reason(error)}") from None
    if str(path).endswith(".json"):
        return _json(content, printable(file.name))
    if len(content) > _MOST_BYTES:
        raise MemplanError(f"{shown(str(path))} is larger than {_MOST_BYTES >> 10} KiB, so it is no run file")
    found = _yaml(content, printable(file.name))
    if not isinstance(found, dict):
        raise MemplanError(f"{printable(file.name)} holds {shown(found)}, but a run file has keys and values")
    return _with_text_keys(found, printable(file.name))


def _json(content: bytes, name: str) -> dict[str, Any] | None:
    """A JSON object; None where it is none, or too long: a model's configuration has its own reader."""
    if len(content) > _MOST_BYTES:
        return None
    try:
        found = read_json(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    try:
        return found if {"architectures", "model_type"} & found.keys() else read_json(content, once=True)
    except TooManyParts as error:
        raise MemplanError(f"{name} is no run file: {error}") from None


def _yaml(content: bytes, name: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise MemplanError(f"{name} is YAML, which needs PyYAML: run `pip install pyyaml`") from None
    try:
        return read_yaml(content.decode("utf-8-sig"))
    except TooManyParts as error:
        raise MemplanError(f"{name} is no run file: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark is not None else ""
        raise MemplanError(f"{name} is no valid YAML{line}") from None
    except (ValueError, json.JSONDecodeError, OverflowError) as error:
        raise MemplanError(f"{name} can't be read: {reason(error)}") from None


def _with_text_keys(found: dict[Any, Any], name: str) -> dict[str, Any]:
    for key in found:
        if not isinstance(key, str):
            raise MemplanError(f"{name} has the key {shown(key)}, but a run file's keys are names")
    return found
