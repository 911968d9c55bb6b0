"""What a user calls a model -> its ModelSpec: a spec, a path, an alias, a Hub id.

Nothing is imported for it but the standard library, until a Hub id is neither in the registry nor in
the local Hub cache; then ``huggingface_hub``, if installed, fetches its ``config.json``.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from memplan import families
from memplan.asked.spec import ModelSpec
from memplan.bounded import TooManyParts, read_json
from memplan.errors import MemplanError, SpecError, UnknownName, UnsupportedArchitecture, reason, shown
from memplan.importers.hf import has_vision_tower, spec_from_config
from memplan.resources import data_file

_MAX_CONFIG_BYTES = 16 << 20  # the largest on the Hub are some hundred KiB (labels of classifiers)
_HUB_TIMEOUT_SECONDS = 5.0
_LONGEST_REVISION = 200  # characters; a commit has 40
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_VERSION = re.compile(r"-v?\d+(\.\d+)*(?=-|$)")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model, and a sentence on how its name was understood where that needs saying."""

    spec: ModelSpec
    note: str | None = None


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """A model's configuration as it was found, for readers other than memplan's own. ``hub_id`` and ``note``
    as in the plan; ``registered`` is its number in ``data/model_specs.json``."""

    config: dict[str, Any]
    name: str
    hub_id: str | None = None
    note: str | None = None
    registered: int | None = None


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """A model that has a name of its own here (``data/model_specs.json``)."""

    alias: str
    aliases: tuple[str, ...]
    hub_id: str
    parameters: int | None
    architecture: str


def resolve(model: str | Path | ModelSpec) -> ResolvedModel:
    """Find a model by spec, path, alias or Hub id, in this order.

    Raises UnknownName, SpecError or UnsupportedArchitecture.
    """
    if isinstance(model, ModelSpec):
        known = families.names()
        if model.model_type not in known:
            raise UnsupportedArchitecture(
                f"memplan has no predicted plan for the model type {model.model_type!r}; "
                f"predicted are {', '.join(known)}"
            )
        return ResolvedModel(model)
    found = _find(model)
    if found.registered is not None:
        spec = _registered(found.registered)
        if found.hub_id != spec.hub_id:
            spec = spec.model_copy(update={"hub_id": found.hub_id})
        return ResolvedModel(spec, found.note)
    spec = spec_from_config(found.config, found.name, found.hub_id)
    notes = (found.note or _language_model_note(found), _quantised_note(found))
    return ResolvedModel(spec, "; ".join(filter(None, notes)) or None)


def resolve_config(model: str | Path) -> ResolvedConfig:
    """Find a model's configuration, of whatever architecture, by path, alias or Hub id.

    Of a checkpoint with images that memplan plans as its language model, it is the language model's.
    Raises UnknownName or SpecError.
    """
    found = _find(model)
    config = found.config
    if not isinstance(config, dict):
        raise SpecError(
            f"the configuration of {shown(found.name)} is {shown(config)}, but it must be a JSON object"
        )
    if _plain_names(config) and has_vision_tower(config) and isinstance(config.get("text_config"), dict):
        tied = {key: config[key] for key in ("tie_word_embeddings",) if config.get(key) is not None}
        note = found.note or _language_model_note(found)
        return replace(found, config={**tied, **config["text_config"]}, note=note)
    return found


def _plain_names(config: dict[str, Any]) -> bool:
    """Whether ``architectures`` can be looked into."""
    return isinstance(config.get("architectures") or [], list)


def _quantised_note(found: ResolvedConfig) -> str | None:
    """What a checkpoint that is quantised already is planned as."""
    given = found.config.get("quantization_config")
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else None
    kind = f" ({method})" if isinstance(method, str) and re.fullmatch(r"[\w.-]{1,30}", method) else ""
    return (
        f"its quantization_config{kind} is not planned: the figures are of the model as it was before, in 16 "
        "or 32 bits, or in 4 as mode qlora quantises it"
    )


def _language_model_note(found: ResolvedConfig) -> str | None:
    if not has_vision_tower(found.config):
        return None
    return f"{found.name} is planned as its language model; its vision tower is not counted"


def _find(model: str | Path) -> ResolvedConfig:
    text = str(model)
    if not text.strip():
        raise SpecError(
            "the name of the model is empty; give an alias, a Hub id or the path of a config.json"
        )

    path = _expanded(text)
    pathlike = isinstance(model, Path) or _looks_like_a_path(text)
    if _kind(path / "config.json") == "file":
        return _from_file(path / "config.json")
    if _kind(path) == "file" and pathlike:
        return _from_file(path)
    if not pathlike:
        found = _from_registry(text) or _from_cache(text) or _from_sibling(text)
        if found:
            return found
    match _kind(path):
        case "file":
            return _from_file(path)
        case "folder":
            raise SpecError(_no_config_in(path))
        case "other":
            raise SpecError(f"{shown(text)} is neither a file nor a folder; give the path of a config.json")
    if pathlike:
        raise SpecError(
            f"there is no {shown(text)}; give the path of a config.json or of the folder it is in"
        )
    if not _HUB_ID.fullmatch(text):
        raise UnknownName("model", text[:100], _index(), hint="Run `memplan models` for the list")
    return _from_hub(text)


def hub_id_of(model: str) -> str | None:
    """The Hub's name of a model, if that is what it is called by."""
    is_name = (
        _HUB_ID.fullmatch(model) and not _looks_like_a_path(model) and _kind(_expanded(model)) == "nothing"
    )
    return model if is_name else None


def read_from(model: str) -> Path | None:
    """The file that a name of a model is the path of, if it is one."""
    path = _expanded(model)
    named = (path / "config.json", *([path] if _looks_like_a_path(model) else []))
    return next((file for file in named if _kind(file) == "file"), None)


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


# -- the registry ----------------------------------------------------------------------------------------


@cache
def _entries() -> list[dict[str, Any]]:
    try:
        content = data_file("model_specs.json").read_bytes()
    except OSError as error:
        raise MemplanError(f"the list of models can't be read: {error}") from None
    models: list[dict[str, Any]] = json.loads(content)["models"]
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
def _registered(number: int) -> ModelSpec:
    entry = _entries()[number]
    return spec_from_config(entry["config"], entry["alias"], entry["hub_id"], entry["parameters"])


def _from_registry(text: str) -> ResolvedConfig | None:
    number = _index().get(text.lower())
    if number is not None:
        return _entry(number, note=_note(text.lower(), _entries()[number]))
    for number, entry in enumerate(_entries()):
        if entry["hub_id"].lower() == text.lower():
            return _entry(number)
    return None


def _entry(number: int, hub_id: str | None = None, note: str | None = None) -> ResolvedConfig:
    entry = _entries()[number]
    return ResolvedConfig(entry["config"], entry["alias"], hub_id or entry["hub_id"], note, number)


def _note(name: str, entry: dict[str, Any]) -> str | None:
    """What an alias stands for, unless it is plain to see; and the other versions that it may mean."""
    alias: str = entry["alias"]
    plain = (alias, entry["hub_id"].lower().partition("/")[2])
    if name.replace("-", "") in [known.replace("-", "") for known in plain]:
        return None
    note = f"{name} means {alias} ({entry['hub_id']})"
    others = [
        other["alias"]
        for other in _entries()
        if other["alias"] != alias and _VERSION.sub("", other["alias"], count=1) == name
    ]
    if others:
        *head, last = others
        note += (
            f"; other versions are {', '.join(head)} and {last}" if head else f"; another version is {last}"
        )
    return note


def _from_sibling(text: str) -> ResolvedConfig | None:
    """A Hub id whose last part is an alias of the same organisation's: a variant of the same shapes."""
    organisation, _, last = text.lower().partition("/")
    number = _index().get(last)
    if number is None or _entries()[number]["hub_id"].lower().partition("/")[0] != organisation:
        return None
    planned = _entries()[number]["hub_id"]
    return _entry(number, text, f"{text} is planned with the configuration of {planned}")


# -- the Hub and its cache -------------------------------------------------------------------------------


def _hub_cache() -> Path:
    """The folder that huggingface_hub keeps models in (huggingface_hub/constants.py)."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return _expanded(os.path.expandvars(cache))


def _from_cache(text: str) -> ResolvedConfig | None:
    if not _HUB_ID.fullmatch(text):
        return None
    folder = _hub_cache() / f"models--{text.replace('/', '--')}"
    head = folder / "refs" / "main"
    if _kind(head) != "file":
        return None
    try:
        with head.open(encoding="utf-8") as file:
            revision = file.read(_LONGEST_REVISION).strip()
    except (OSError, ValueError):
        return None
    config = folder / "snapshots" / revision / "config.json"
    return _from_file(config, hub_id=text) if _kind(config) == "file" else None


def _from_hub(hub_id: str) -> ResolvedConfig:
    instead = "or give the path of its config.json"
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(switch, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise SpecError(
                f"{hub_id} is neither in memplan's list nor in the Hub cache ({_hub_cache()}), and {switch} "
                f"is set: unset it, {instead}"
            )
    try:
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError:
        raise SpecError(
            f"{hub_id} is neither in memplan's list nor in the Hub cache, and fetching it needs "
            f"huggingface_hub: run `pip install huggingface_hub`, {instead}"
        ) from None
    try:
        # One request without retries first: hf_hub_download would try for half a minute without a network.
        get_hf_file_metadata(hf_hub_url(hub_id, "config.json"), timeout=_HUB_TIMEOUT_SECONDS)
        downloaded = hf_hub_download(hub_id, "config.json", etag_timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:  # an HTTP library's own exceptions, broken caches, certificates, proxies ...
        match error:
            case errors.GatedRepoError():
                why = f"{hub_id} is gated: accept its licence on its page and run `hf auth login`"
            case errors.RepositoryNotFoundError():
                why = f"the Hub shows no model {hub_id}: check its spelling, log in (`hf auth login`)"
            case errors.EntryNotFoundError() if not isinstance(error, errors.LocalEntryNotFoundError):
                why = f"{hub_id} has no config.json on the Hub: name a repository in transformers' format"
            case _:
                why = (
                    f"{hub_id} is not in memplan's list and could not be fetched from the Hub: "
                    "check the network"
                )
        raise SpecError(f"{why}, {instead}") from None
    return _from_file(Path(downloaded), hub_id=hub_id)


# -- files -----------------------------------------------------------------------------------------------


def _looks_like_a_path(text: str) -> bool:
    return (
        text.startswith((".", "~", os.sep))
        or text.endswith((".json", "/", os.sep))
        or text.count("/") > 1
        or "\\" in text
    )


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):  # ~somebody unknown, ~ and a null byte
        return Path(text)


def _kind(path: Path) -> str:
    """file, folder, other or nothing; never an error, whatever the path holds."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "nothing"
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def _no_config_in(folder: Path) -> str:
    if _kind(folder / "adapter_config.json") == "file":
        return f"{shown(str(folder))} holds an adapter; give the model that it was trained on"
    return (
        f"the folder {shown(str(folder))} has no config.json; give one with a model in transformers' format"
    )


def _from_file(path: Path, hub_id: str | None = None) -> ResolvedConfig:
    config = _read(path)
    hub_id = hub_id or _hub_id_of_snapshot(path)
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 – Path.resolve would follow the cache's links
    name = hub_id or (absolute.parent.name if path.name == "config.json" else path.stem) or path.name
    return ResolvedConfig(config, _text(name), None if hub_id is None else _text(hub_id))


def _text(name: str) -> str:
    """A file's name, which need not be text, as text."""
    return name.encode(errors="replace").decode()


def _hub_id_of_snapshot(path: Path) -> str | None:
    """The Hub id in ``models--organisation--name/snapshots/revision/config.json``."""
    folder = path.parent.parent.parent.name
    if path.parent.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    return folder.removeprefix("models--").replace("--", "/", 1)


def _read(path: Path) -> Any:
    """The JSON value in a file; what else it holds is said in one sentence."""
    where = shown(str(path))
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{where} can't be read: {reason(error)}") from None
    if len(content) > _MAX_CONFIG_BYTES:
        raise SpecError(f"{where} is larger than {_MAX_CONFIG_BYTES >> 20} MiB, so it is no config.json")
    try:
        return read_json(content)
    except TooManyParts as error:
        raise SpecError(f"{where} {error}, so it is no config.json") from None
    except UnicodeDecodeError:
        raise SpecError(f"{where} is no UTF-8 text, so it is no config.json") from None
    except json.JSONDecodeError as error:
        raise SpecError(
            f"{where} is no valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "is it cut short or edited by hand?"
        ) from None
    except RecursionError:
        raise SpecError(f"{where} is nested too deeply to be a config.json") from None
    except ValueError:  # an integer of more than 4300 digits
        raise SpecError(f"{where} holds a number that is too long to be read") from None
