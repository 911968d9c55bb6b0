"""What a user calls a model -> its ModelSpec: a spec, a path, a name, a Hub id, a page of the Hub.

Nothing is imported for it but the standard library, until a Hub id is neither in the registry nor a copy of
something there nor in the local Hub cache; then ``huggingface_hub`` fetches its ``config.json``.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memplan import families
from memplan.asked.spec import ModelSpec
from memplan.bounded import TooManyParts, read_json
from memplan.errors import SpecError, UnknownName, UnsupportedArchitecture, reason, shown
from memplan.importers import names, registry
from memplan.importers.hf import has_vision_tower, spec_from_config
from memplan.importers.quantization import method_of
from memplan.importers.registry import Registered

_MAX_CONFIG_BYTES = 16 << 20  # the largest on the Hub are some hundred KiB (labels of classifiers)
_HUB_TIMEOUT_SECONDS = 5.0
_LONGEST_REVISION = 200  # characters; a commit has 40
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_UNKNOWN = (
    "`memplan models` lists those that have one; of any other give the Hub id or the path of its "
    "config.json, and for a family without a plan ask memplan trace or memplan dry-run"
)
_MIXED = (
    "copies called unsloth-bnb-4bit keep some layers in 16 bits, which are planned in 4, so this is the "
    "least that they take"
)


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
        spec = registry.spec_of(found.registered)
        if found.hub_id != spec.hub_id:
            spec = spec.model_copy(update={"hub_id": found.hub_id})
        return ResolvedModel(spec, found.note)
    spec = spec_from_config(found.config, found.name, found.hub_id)
    notes = (found.note or _language_model_note(found), _stored_note(spec))
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
        kept = {key: config[key] for key in ("quantization_config",) if config.get(key) is not None}
        note = found.note or _language_model_note(found)
        found = replace(found, config={**tied, **kept, **config["text_config"]}, note=note)
    notes = (found.note, _not_traced(found.config))
    return replace(found, note="; ".join(filter(None, notes)) or None)


def _plain_names(config: dict[str, Any]) -> bool:
    """Whether ``architectures`` can be looked into."""
    return isinstance(config.get("architectures") or [], list)


def _stored_note(spec: ModelSpec) -> str | None:
    """How a checkpoint that is quantised already is planned."""
    stored = spec.quantization
    if stored is None:
        return None
    twice = ", double-quantised" if stored.double_quant else ""
    return f"its weights are in 4 bits already ({stored.quant_type}{twice}), and planned so"


def _not_traced(config: dict[str, Any]) -> str | None:
    """What a trace leaves out of a checkpoint that is quantised: it makes the layers of the recipe."""
    given = config.get("quantization_config")
    if given is None or method_of(given) == "bitsandbytes":
        return None
    return (
        f"its quantization_config ({method_of(given)}) is not traced: the figures are of its weights in 16 "
        "or 32 bits, or in 4 as mode qlora quantises them"
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

    path, revision = _expanded(text), None
    if not isinstance(model, Path) and _kind(path) == "nothing" and (page := names.of_page(text)):
        (text, revision), path = page, Path(page[0])
    pathlike = isinstance(model, Path) or _looks_like_a_path(text)
    if _kind(path / "config.json") == "file":
        return _from_file(path / "config.json")
    if _kind(path) == "file" and pathlike:
        return _from_file(path)
    if not pathlike:
        found = _registered(registry.by_name(text), text) or _from_cache(text, revision)
        found = found or _registered(registry.copy_of(text), text)
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
        close = registry.neighbours(text)
        raise UnknownName("model", text[:100], (), hint=_UNKNOWN, close=close)
    return _from_hub(text, revision)


def _registered(found: Registered | None, called: str) -> ResolvedConfig | None:
    """The configuration of a model of the registry; of a copy that is quantised, with what tells so."""
    if found is None:
        return None
    config, note = registry.config_of(found.number), found.note
    if found.stored is None:
        return ResolvedConfig(config, registry.alias_of(found.number), found.hub_id, note, found.number)
    if found.stored.mixed:
        note = f"{note}; {_MIXED}"
    config = {**config, "quantization_config": found.stored.config}
    return ResolvedConfig(config, called.strip(), called.strip() if "/" in called else None, note)


def hub_id_of(model: str) -> str | None:
    """The Hub's name of a model, if that or its page is what it is called by."""
    page = names.of_page(model) if _kind(_expanded(model)) == "nothing" else None
    if page is not None:
        model = page[0]
    is_name = (
        _HUB_ID.fullmatch(model) and not _looks_like_a_path(model) and _kind(_expanded(model)) == "nothing"
    )
    return model if is_name else None


def read_from(model: str) -> Path | None:
    """The file that a name of a model is the path of, if it is one."""
    path = _expanded(model)
    named = (path / "config.json", *([path] if _looks_like_a_path(model) else []))
    return next((file for file in named if _kind(file) == "file"), None)


# -- the Hub and its cache -------------------------------------------------------------------------------


def _hub_cache() -> Path:
    """The folder that huggingface_hub keeps models in (huggingface_hub/constants.py)."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return _expanded(os.path.expandvars(cache))


def _from_cache(text: str, revision: str | None) -> ResolvedConfig | None:
    if not _HUB_ID.fullmatch(text):
        return None
    folder = _hub_cache() / f"models--{text.replace('/', '--')}"
    head = folder / "refs" / (revision or "main")
    if _kind(head) != "file":
        return None
    try:
        with head.open(encoding="utf-8") as file:
            revision = file.read(_LONGEST_REVISION).strip()
    except (OSError, ValueError):
        return None
    config = folder / "snapshots" / revision / "config.json"
    return _from_file(config, hub_id=text) if _kind(config) == "file" else None


def _from_hub(hub_id: str, revision: str | None) -> ResolvedConfig:
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
        get_hf_file_metadata(
            hf_hub_url(hub_id, "config.json", revision=revision), timeout=_HUB_TIMEOUT_SECONDS
        )
        downloaded = hf_hub_download(
            hub_id, "config.json", revision=revision, etag_timeout=_HUB_TIMEOUT_SECONDS
        )
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
        or text.endswith((".json", ".yaml", ".yml", "/", os.sep))
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
