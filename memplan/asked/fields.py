"""Checked reads of a foreign configuration: a wrong value becomes one sentence that says what is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from memplan.errors import SpecError, shown

MAX_SIZE = 1 << 24  # far above any published size, low enough that no product of sizes is absurd
MAX_POSITIONS = 1 << 40
# Llama-3.1-405B has 126 and BigLlama-3.1-1T, merged of it with itself, 315. What a question takes grows with
# the layers: with so many the slowest, the largest batch that fits, takes 8 s.
MAX_LAYERS = 320
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Fields:
    """A configuration and its family's defaults. Every read checks the type and says what would be right."""

    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    nullable: frozenset[str]
    name: str

    def fail(self, what: str) -> NoReturn:
        """Say what is wrong with the configuration."""
        raise SpecError(f"the configuration of {shown(self.name)} can't be planned: {what}")

    def _wrong(self, key: str, value: object, right: str) -> NoReturn:
        self.fail(f"{key} is {shown(value)}, but it must be {right}")

    def get(self, key: str) -> Any:
        """The value of ``key``, or its default. A null must be one that the configuration class accepts."""
        value = self.config.get(key, self.defaults.get(key, _MISSING))
        if value is _MISSING:
            self.fail(f"{key} is missing; is this the complete config.json of a decoder-only language model?")
        if value is None and key in self.config and key not in self.nullable:
            self.fail(f"{key} is null, but it needs a value")
        return value

    def size(self, key: str, least: int = 1, most: int = MAX_SIZE) -> int:
        """A whole number within bounds."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self._wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def size_or_none(self, key: str, most: int = MAX_SIZE) -> int | None:
        """A whole number from 1, or null where the configuration class takes it."""
        return None if self.get(key) is None else self.size(key, most=most)

    def flag(self, key: str) -> bool:
        """True or false; no 0, 1 or "yes"."""
        value = self.get(key)
        if not isinstance(value, bool):
            self._wrong(key, value, "true or false")
        return value

    def number(self, key: str, right: str, accept: Callable[[float], bool]) -> float:
        """A finite number that ``accept`` takes; ``right`` says which those are."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._wrong(key, value, right)
        if isinstance(value, int) and value.bit_length() > 64:  # float() of a huge int overflows
            self._wrong(key, value, right)
        if not math.isfinite(value) or not accept(value):
            self._wrong(key, value, right)
        return float(value)

    def probability(self, key: str) -> float:
        """A dropout probability."""
        return self.number(key, "a probability from 0 to below 1", lambda value: 0 <= value < 1)

    def softcap(self, key: str) -> float | None:
        """A number to cap logits at, or null."""
        if self.get(key) is None:
            return None
        return self.number(key, "a number above 0, or null", lambda value: value > 0)

    def strings(self, key: str) -> list[str] | None:
        """A list of strings, or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._wrong(key, value, "a list of strings")
        return value

    def nested(self, key: str) -> Mapping[str, Any]:
        """An object inside the configuration; empty where it is absent or null."""
        value = self.config.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._wrong(key, value, "an object")
        return value

    def inside(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Fields:
        """The same checks for an object inside the configuration, where a null is as good as absent."""
        present = {key: value for key, value in config.items() if value is not None}
        return Fields(present, defaults, frozenset(), self.name)
