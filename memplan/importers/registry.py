"""The models that have a name here (``data/model_specs.json``), and the well-known copies of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from memplan.asked.spec import ModelSpec
from memplan.errors import MemplanError
from memplan.importers import names
from memplan.importers.hf import spec_from_config
from memplan.importers.names import Name, Stored
from memplan.resources import data_file

_VERSION = re.compile(r"-v?\d+(\.\d+)*(?=-|$)")


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """A model that has a name of its own here (``data/model_specs.json``)."""

    alias: str
    aliases: tuple[str, ...]
    hub_id: str
    parameters: int | None
    architecture: str


@dataclass(frozen=True, slots=True)
class Registered:
    """An entry as somebody called it: its number, the Hub id to go by, how the name was understood where
    that needs saying, and how the copy that is meant stores its weights, if not as the entry."""

    number: int
    hub_id: str
    note: str | None = None
    stored: Stored | None = None


def registry() -> tuple[RegistryEntry, ...]:
    """All models with an alias, in the order of the file."""
    return tuple(
        RegistryEntry(
            alias=entry["alias"],
            aliases=tuple(entry["aliases"]),
            hub_id=entry["hub_id"],
            parameters=entry["parameters"],
            architecture=entry["config"]["architectures"][0],
        )
        for entry in _entries()
    )


def config_of(number: int) -> dict[str, Any]:
    """The configuration of an entry, not to be changed."""
    config: dict[str, Any] = _entries()[number]["config"]
    return config


def alias_of(number: int) -> str:
    """What an entry is called."""
    return str(_entries()[number]["alias"])


@cache
def spec_of(number: int) -> ModelSpec:
    """The architecture of an entry."""
    entry = _entries()[number]
    return spec_from_config(entry["config"], entry["alias"], entry["hub_id"], entry["parameters"])


def by_name(text: str) -> Registered | None:
    """The entry that is called so, however the name is spelled; or a variant of it that has its shapes."""
    lowered = text.strip().lower()
    number = _index().get(lowered)
    if number is None:
        number = next((n for n, e in enumerate(_entries()) if e["hub_id"].lower() == lowered), None)
        if number is not None:
            return _registered(number, note=_seen(None, number, lowered))
    if number is None:
        name = names.read(text)
        if name is None or name.organisation:
            return None
        number = _by_words().get(name.words)
        if number is None or name.stored is not None:
            return _variant(text, name)
    return _registered(number, note=_seen(_note(lowered, number), number, lowered))


def copy_of(text: str) -> Registered | None:
    """The entry that a Hub id is a copy of: the same organisation's variants, and those that are known to
    hold other organisations' models as they are."""
    name = names.read(text)
    return _variant(text, name) if name is not None and name.organisation else None


def neighbours(text: str) -> list[str]:
    """The names near to one that is not known."""
    known = {
        name: (entry.alias, entry.parameters / 1e9 if entry.parameters else None)
        for entry in registry()
        for name in (entry.alias, *entry.aliases)
    }
    return names.neighbours(text, known)


# -- the file ------------------------------------------------------------------------------------------------


@cache
def _file() -> dict[str, Any]:
    try:
        content = data_file("model_specs.json").read_bytes()
    except OSError as error:
        raise MemplanError(f"the list of models can't be read: {error}") from None
    result: dict[str, Any] = json.loads(content)
    return result


def _entries() -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = _file()["models"]
    return models


@cache
def _index() -> dict[str, int]:
    """Number of the entry for each name in lower case. Where two entries share one, the first has it."""
    index: dict[str, int] = {}
    for number, entry in enumerate(_entries()):
        for alias in (entry["alias"], *entry["aliases"]):
            index.setdefault(alias.lower(), number)
    return index


@cache
def _by_words() -> dict[tuple[str, ...], int]:
    """The same for the words of each name and of each Hub id's last part."""
    index: dict[tuple[str, ...], int] = {}
    for name, number in _index().items():
        index.setdefault(names.words(name), number)
    for number, entry in enumerate(_entries()):
        index.setdefault(names.words(entry["hub_id"].partition("/")[2]), number)
    return index


@cache
def _copies() -> dict[tuple[str, ...], tuple[int, str]]:
    """Entry and organisation for the words of models that are listed as copies."""
    return {
        _plain(names.words(hub_id.partition("/")[2])): (_index()[alias], hub_id.lower().partition("/")[0])
        for alias, copies in _file()["copies"]["models"].items()
        for hub_id in copies
    }


@cache
def _by_plain_words() -> dict[tuple[str, ...], int]:
    """Entries by their words without those that change no shape."""
    index: dict[tuple[str, ...], int] = {}
    for found, number in _by_words().items():
        index.setdefault(_plain(found), number)
    return {**index, **_by_words()}


def _plain(found: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in found if word not in _file()["copies"]["same_shapes"])


# -- understanding -------------------------------------------------------------------------------------------


def _variant(text: str, name: Name) -> Registered | None:
    number, organisation = _by_words().get(name.words), None
    if number is None:
        number = _by_plain_words().get(_plain(name.words))
    if number is None:
        number, organisation = _copies().get(_plain(name.words), (None, None))
    if number is None:
        return None
    entry = _entries()[number]
    organisation = organisation or entry["hub_id"].lower().partition("/")[0]
    if name.organisation not in ("", organisation) and not _mirrors(name.organisation, name.words):
        return None
    note = f"planned as {entry['hub_id']}, whose configuration it has"
    hub_id = text.strip() if name.organisation else entry["hub_id"]
    return _registered(number, hub_id, _seen(note, number), name.stored)


def _mirrors(organisation: str, found: tuple[str, ...]) -> bool:
    """Whether an organisation's model of this name is another's as it is."""
    for mirror in _file()["copies"]["organisations"]:
        if mirror["name"].lower() == organisation:
            return not any(word in found for word in mirror["except"])
    return False


def _registered(
    number: int, hub_id: str | None = None, note: str | None = None, stored: Stored | None = None
) -> Registered:
    return Registered(number, hub_id or _entries()[number]["hub_id"], note, stored)


def _note(name: str, number: int) -> str | None:
    """What an alias stands for, unless it is plain to see; and the other versions that it may mean."""
    entry = _entries()[number]
    alias: str = entry["alias"]
    found = names.words(name)
    if found in (names.words(alias), names.words(entry["hub_id"].partition("/")[2])):
        return None
    note = f"{name} means {alias} ({entry['hub_id']})"
    others = [
        other["alias"]
        for other in _entries()
        if other["alias"] != alias and names.words(_VERSION.sub("", other["alias"], count=1)) == found
    ]
    if others:
        *head, last = others
        note += (
            f"; other versions are {', '.join(head)} and {last}" if head else f"; another version is {last}"
        )
    return note


def _seen(note: str | None, number: int, name: str = "") -> str | None:
    """The note, with what a published checkpoint has that is not planned, unless its name says that this is
    not meant."""
    entry = _entries()[number]
    without = entry.get("without")
    if without is None or "text" in names.words(name):
        return note
    first = note or f"{entry['alias']} is planned as its language model"
    verb = "are" if without.endswith("s") else "is"
    return f"{first}; its {without} {verb} not counted"
