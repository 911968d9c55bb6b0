"""A file's keys, each taken once by whoever knows what it means."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

from memplan.errors import MemplanError, printable, shown

_ALIKE = 0.85  # of two keys one of which may be the other, misspelt
_MOST_DIGITS = 18
_QUANTISED = re.compile(r"[-_](gptq|awq|aqlm|gguf|exl2|hqq|fp8|mxfp4|nvfp4)\b", re.IGNORECASE)


def words(text: str) -> frozenset[str]:
    """Names with spaces between them."""
    return frozenset(text.split())


class Keys:
    """The values of a file by key. A key with no value (``lora_model_dir:``) is as if it were not there.

    What is found goes into ``options`` (the recipe's, by field), ``model``, ``sizes`` (defaults by mode) and
    ``left_out`` (sentences on what no figure counts). Each method that takes a key raises MemplanError if
    its value is of another type.
    """

    def __init__(
        self, name: str, values: Mapping[str, Any], instead: Callable[[], str], title: str = "its trainer"
    ) -> None:
        self.name, self.title = name, title
        self._values, self._instead = values, instead
        self._known: set[str] = set()
        self.model: str | None = None
        self.options: dict[str, Any] = {}
        self.sizes: dict[str, dict[str, Any]] = {}
        self.understood: dict[str, Any] = {}
        self.ignored: list[str] = []
        self.left_out: list[str] = []
        self.apart: set[str] = set()  # keys of which something is said rather than planned
        self.evaluates: int | None = None
        self.beside: tuple[str, str] | None = None  # a key that names a file of what launches it, and that

    def value(self, key: str) -> Any:
        """The value as it is; None where it is not given."""
        self._known.add(key)
        value = self._values.get(key)
        if value is not None:
            self.understood[key] = value
        return value

    @property
    def keys(self) -> set[str]:
        """All of them."""
        return set(self._values)

    @property
    def looked_at(self) -> set[str]:
        """Those that somebody took or asked for, given or not."""
        return set(self._known)

    def given(self, key: str) -> bool:
        """Whether it has a value, which is left to be taken."""
        if self._values.get(key) is None:
            self._known.add(key)
            return False
        return True

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.value(key)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if value is None:
            return default
        if not isinstance(value, bool):
            self.wrong(key, "true or false")
        return value

    def whole(self, key: str, least: int = 1) -> int | None:
        """A whole number."""
        value = self.value(key)
        if isinstance(value, str) and value.isdecimal() and len(value) <= _MOST_DIGITS:
            value = int(value)
        if isinstance(value, float) and value.is_integer() and abs(value) < 10**_MOST_DIGITS:
            value = int(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.wrong(key, f"a whole number of at least {least}")
        if value >= 10**_MOST_DIGITS:
            self.wrong(key, f"a whole number of at most {_MOST_DIGITS} digits")
        return value

    def number(self, key: str, least: float = 0.0) -> float | None:
        """A number."""
        value = self.value(key)
        if isinstance(value, str):  # YAML 1.1 reads 2e-5 as a text
            try:
                value = float(value)
            except ValueError:
                self.wrong(key, "a number")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e18:
            self.wrong(key, f"a number of at least {least:g}")
        return float(value)

    def text(self, key: str) -> str | None:
        """A text that is not empty."""
        value = self.value(key)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            self.wrong(key, "a text")
        return value

    def one_of(self, key: str, known: Mapping[str, Any], default: Any = None) -> Any:
        """What one of these texts stands for."""
        text = self.text(key)
        if text is None:
            return default
        if text not in known:
            self.wrong(key, f"one of {', '.join(known)}")
        return known[text]

    def names(self, key: str) -> tuple[str, ...]:
        """A list of texts, or texts with commas between them."""
        value = self.value(key)
        if value is None:
            return ()
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, list):
            self.wrong(key, "a list of names")
        for one in value:
            if not isinstance(one, str):
                raise MemplanError(
                    f"{self.name}: {key} must be a list of names, and one of them is {shown(one)}"
                )
        return tuple(one.strip() for one in value if one.strip())

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Keys and values of its own; also as JSON in a text, which trainers read too (transformers 5.23,
        ``TrainingArguments._VALID_DICT_FIELDS``)."""
        value = self.value(key)
        if value is None:
            return {}
        if isinstance(value, str) and value.startswith("{"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                self.wrong(key, "keys and values")
        if not isinstance(value, dict):
            self.wrong(key, "keys and values")
        return value

    def put(self, field: str, value: Any) -> None:
        """Set an option of the recipe, if there is a value."""
        if value is not None:
            self.options[field] = value

    def put_flag(self, field: str, key: str) -> None:
        """Set an option of the recipe to true or false, if the file says which."""
        if self.given(key):
            self.put(field, self.flag(key))

    def unheard(self, *keys: str) -> None:
        """Keys that mean nothing beside the others."""
        self._known.update(keys)
        self.ignored += [key for key in keys if key in self._values]

    def nodes(self, processes: int | None) -> None:
        """accelerate's ``num_machines``, over which so many processes are spread."""
        machines = self.whole("num_machines")
        if machines is None or machines == 1 or processes is None:
            self.understood.pop("num_machines", None)
            self.unheard("num_machines")
            return
        if processes % machines:
            self.refuse(
                "num_machines", "does not divide num_processes, which are those of all", instead=False
            )
        self.put("nodes", machines)

    def base(self, key: str) -> None:
        """Take the model's name."""
        self.model = self.text(key)
        found = _QUANTISED.search(self.model or "")
        if found:
            self.refuse(key, f"is a base in {found[1].upper()}, which memplan does not plan")

    def refuse(self, key: str, why: str, *, instead: bool = True) -> NoReturn:
        """Say that the file asks for what can't be planned, and what answers instead, if anything does."""
        value = self._values.get(key)
        told = key if isinstance(value, dict | list) else f"{key}: {_brief(value)}"
        raise MemplanError(f"{self.name}: {told} {why}" + (f"; {self._instead()}" if instead else ""))

    def launched_by(self, key: str) -> None:
        """Take the name of the file of what launches the run, if there is one."""
        path = self.text(key)
        if path is not None:
            self.beside = key, path

    def refuse_any(self, why: Mapping[str, str]) -> None:
        """Refuse each of these keys that has a value other than false, 0, "" or nothing."""
        self.apart.update(why)
        for key, words in why.items():
            value = self.value(key)
            if value and value not in ("no", "none", "None", "false", "False"):
                self.refuse(key, words)
            self.understood.pop(key, None)

    def several(self, *keys: str) -> None:
        """Refuse each of these numbers of cards that is more than one."""
        self.apart.update(keys)
        for key in keys:
            value = self.whole(key, least=-1)
            if value is not None and value > 1:
                self.refuse(key, "spreads the run over several cards in a way that memplan does not plan yet")
            self.understood.pop(key, None)

    def leave_out(self, words: str, *keys: str) -> None:
        """Say what no figure counts, if one of these keys has a value other than false or nothing."""
        on = [key for key in keys if self.value(key) not in (None, False, "", 0, "no", [], {})]
        for key in keys:
            self.understood.pop(key, None)
        self.apart.update(keys)
        if on or not keys:
            self.left_out.append(f"{', '.join(on)}: {words}" if on else words)

    def wrong(self, key: str, wanted: str) -> NoReturn:
        """Say that a value is of another type."""
        raise MemplanError(f"{self.name}: {key} must be {wanted}, not {shown(self._values.get(key))}")

    def within(self, key: str, values: Mapping[str, Any]) -> Keys:
        """The keys of a mapping inside, of which the same options are found."""
        inside = Keys(f"{self.name}: {key}", values, self._instead, self.title)
        inside.options, inside.left_out = self.options, self.left_out
        return inside

    def finish(self, ignored: Collection[str]) -> None:
        """Tell apart the keys that nobody took: known to move no memory, misspelt, or unknown."""
        unknown = []
        for key in self._values:
            if key in self._known:
                continue
            if key in ignored or key.startswith(("wandb_", "hub_", "dataloader_", "logging_", "mlflow_")):
                self.ignored.append(key)
                continue
            close = get_close_matches(key, self._known, n=1, cutoff=_ALIKE)
            if close and not get_close_matches(key, ignored, n=1, cutoff=_ALIKE):
                raise MemplanError(
                    f"{self.name}: {printable(key[:60])} is no key of {self.title}'s; did you mean "
                    f"{close[0]}?"
                )
            unknown.append(printable(key[:60]))
        if unknown:
            self.left_out.append(f"{', '.join(unknown)}: unknown, so not counted")
        self.understood = {key: _plain(value) for key, value in self.understood.items() if value is not False}


def _brief(value: Any) -> str:
    return printable(value[:60]) if isinstance(value, str) else shown(value)


def _plain(value: Any) -> Any:
    """A value as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return printable(str(value))
