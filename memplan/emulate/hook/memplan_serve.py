"""Weights that take no disk: a model of the Hub whose weights are not on this machine is served as a
checkpoint of holes, which `memplan stub` makes at the first question for it, and so is a folder with a
configuration and no weights. Nothing large is downloaded.

It stands at huggingface_hub's doors, so transformers, PEFT, diffusers and others find it alike. What is in
the Hub's cache with its weights is taken from there; datasets are none of its business.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# HfApi's questions that need a network; where it can't be had, programs go on without an answer
_ASKED = ("list_repo_tree", "list_repo_files", "model_info", "repo_info", "file_exists")


class Shelf:
    """Checkpoints that were made, in ``folder``, by memplan in its own Python."""

    def __init__(self, folder: str, memplan: str) -> None:
        self.folder, self.memplan = folder, memplan
        self.places: dict[str, str | None] = {}  # of each model; None: it is not served
        self.cached: Callable[..., Any] | None = None  # huggingface_hub's own look into its cache

    def place(self, repo_id: Any, repo_type: Any, cache: Any = None) -> str | None:
        """The folder of a model that is served, made if need be."""
        if repo_type not in (None, "model") or not isinstance(repo_id, str) or os.path.isdir(repo_id):
            return None
        if repo_id not in self.places and self._is_cached(repo_id, cache):
            self.places[repo_id] = None
        return self._served(repo_id)

    def _served(self, name: str) -> str | None:
        if name not in self.places:
            self.places[name] = self._make(name)
        return self.places[name]

    def _is_cached(self, repo_id: str, cache: Any) -> bool:
        """Whether the Hub's cache has it with weights."""
        assert self.cached is not None
        names = ("config.json", "adapter_config.json", "model_index.json", "preprocessor_config.json")
        for name in names:
            found = self.cached(repo_id, name, cache_dir=cache)
            if isinstance(found, str):
                folders = os.walk(os.path.dirname(found))
                return any(_are_weights(file) for _, _, files in folders for file in files)
        return False

    def _make(self, repo_id: str) -> str | None:
        """One process makes it, and others wait for it: those of several ranks, say."""
        place = os.path.join(self.folder, repo_id.replace(os.sep, "--"))
        os.makedirs(self.folder, exist_ok=True)
        with open(f"{place}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return place if os.path.isdir(place) else self._made(repo_id, place)

    def _made(self, repo_id: str, place: str) -> str | None:
        done = subprocess.run(
            [self.memplan, "-m", "memplan", "stub", repo_id, place, "--python", sys.executable],
            env=_as_before(),
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            words = done.stderr.strip().splitlines()[-1:] or ["it can't be made"]
            print(f"memplan: no checkpoint is served for {repo_id}: {words[0]}", file=sys.__stderr__)
            return None
        print(f"memplan: {repo_id} is served as a checkpoint that takes no disk", file=sys.__stderr__)
        return place

    def _tell_of(self, file: str) -> None:
        """Leave word, for commands/dry_run.py, that a tokenizer was given which is not the model's."""
        if os.path.basename(file) == "tokenizer.json" and _stands_in(file):
            with open(os.path.join(self.folder, os.pardir, "stand-in"), "w"):
                pass

    def prepare_files(self, module: Any) -> None:
        """huggingface_hub.file_download."""
        look, download = module.try_to_load_from_cache, module.hf_hub_download
        self.cached = look

        @wraps(download)
        def downloading(repo_id: str, filename: str, **told: Any) -> Any:
            place = self.place(repo_id, told.get("repo_type"), told.get("cache_dir"))
            if place is None:
                return download(repo_id, filename, **told)
            file = os.path.join(place, told.get("subfolder") or "", filename)
            if os.path.isfile(file):
                self._tell_of(file)
                return file
            from huggingface_hub.errors import EntryNotFoundError

            raise EntryNotFoundError(f"{repo_id} has no {filename}, as memplan serves it")

        @wraps(look)
        def looking(repo_id: str, filename: str, *args: Any, **told: Any) -> Any:
            place = self.places.get(repo_id)
            if place is None:
                return look(repo_id, filename, *args, **told)
            file = os.path.join(place, filename)
            return file if os.path.isfile(file) else module._CACHED_NO_EXIST

        module.hf_hub_download, module.try_to_load_from_cache = downloading, looking

    def prepare_snapshots(self, module: Any) -> None:
        """huggingface_hub._snapshot_download."""
        take = module.snapshot_download

        @wraps(take)
        def taking(repo_id: str, **told: Any) -> Any:
            place = self.place(repo_id, told.get("repo_type"), told.get("cache_dir"))
            return take(repo_id, **told) if place is None else place

        module.snapshot_download = taking

    def prepare_transformers(self, module: Any) -> None:
        """transformers.modeling_utils, for folders with a configuration and no weights."""
        name = "_get_resolved_checkpoint_files"
        resolve = getattr(module, name, None)
        if resolve is None:
            return

        @wraps(resolve)
        def resolving(pretrained_model_name_or_path: Any, *args: Any, **told: Any) -> Any:
            place = self._of_folder(pretrained_model_name_or_path)
            return resolve(place or pretrained_model_name_or_path, *args, **told)

        setattr(module, name, resolving)

    def _of_folder(self, folder: Any) -> str | None:
        if not isinstance(folder, (str, os.PathLike)) or not os.path.isdir(folder):
            return None
        files = os.listdir(folder)
        there = any(_are_weights(file) or file.endswith(".index.json") for file in files)
        return None if there or "config.json" not in files else self._served(os.path.abspath(folder))

    def prepare_api(self, module: Any) -> None:
        """huggingface_hub.hf_api."""
        for name in _ASKED:
            if hasattr(module.HfApi, name):
                setattr(module.HfApi, name, self._silent(getattr(module.HfApi, name)))

    def _silent(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(ask)
        def asking(api: Any, repo_id: Any = None, *args: Any, **told: Any) -> Any:
            if self.places.get(repo_id) is not None:
                from huggingface_hub.errors import OfflineModeIsEnabled

                raise OfflineModeIsEnabled(f"{repo_id} is served by memplan")
            return ask(api, repo_id, *args, **told)

        return asking


def _are_weights(file: str) -> bool:
    return file.endswith(_WEIGHTS)


def _stands_in(tokenizer: str) -> bool:
    """Whether it is make_checkpoint.py's, whose words are w0, w1 and so on."""
    try:
        with open(tokenizer, encoding="utf-8") as file:
            return '"w0"' in file.read(1 << 16)
    except OSError:
        return False


def _as_before() -> dict[str, str]:
    """The environment without what memplan/emulate/launch.py put into it, but for what a run's processes are
    known by."""
    found = {
        name: value
        for name, value in os.environ.items()
        if name == "MEMPLAN_RUN" or not name.startswith("MEMPLAN_")
    }
    found.pop("TRITON_LIBCUDA_PATH", None)
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH"):
        rest = found.pop(name, "").split(os.pathsep)[1:]
        if rest:
            found[name] = os.pathsep.join(rest)
    return found


def start(folder: str, memplan: str) -> None:
    """Serve from now on, from ``folder``. ``memplan``: its Python."""
    from memplan_imports import when_imported

    shelf = Shelf(os.path.join(folder, "checkpoints"), memplan)
    when_imported("huggingface_hub.file_download", shelf.prepare_files)
    when_imported("huggingface_hub._snapshot_download", shelf.prepare_snapshots)
    when_imported("huggingface_hub.hf_api", shelf.prepare_api)
    when_imported("transformers.modeling_utils", shelf.prepare_transformers)
