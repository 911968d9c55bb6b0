"""Weights from a checkpoint in safetensors, one tensor at a time, straight onto the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memplan.errors import MemplanError, reason, shown


class Checkpoint:
    """The safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}  # open files by the device they read to, and path
        self._where = self._index()

    def _index(self) -> dict[str, Path]:
        """Each tensor's file."""
        where = shown(str(self.folder))
        index = self.folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {name: self.folder / Path(file).name for name, file in names.items()}
            files = sorted(self.folder.glob("*.safetensors"))
            found = {name: file for file in files for name in self._open(file, "cpu").keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MemplanError(f"the checkpoint's index in {where} can't be read ({reason(error)})") from None
        if not found:
            raise MemplanError(
                f"{where} has no safetensors, the only kind of weights that memplan loads; leave out "
                "--weights to train random ones of the same shapes"
            )
        return found

    def _open(self, file: Path, device: str) -> Any:
        from safetensors import SafetensorError, safe_open

        key = f"{device} {file}"
        if key not in self._files:
            try:
                self._files[key] = safe_open(str(file), framework="pt", device=device)
            except (OSError, SafetensorError) as error:
                raise MemplanError(
                    f"the weights in {shown(str(file))} can't be read: {reason(error)}"
                ) from None
        return self._files[key]

    def _name(self, model: nn.Module, name: str) -> str | None:
        """The name under which the checkpoint has a parameter: its own, or that of one tied to it."""
        if name in self._where:
            return name
        parameter = model.get_parameter(name)
        tied = (other for other, p in model.named_parameters(remove_duplicate=False) if p is parameter)
        return next((other for other in tied if other in self._where), None)

    def check(self, model: nn.Module) -> None:
        """Raise MemplanError if tensors are missing, misshapen or quantised already."""
        from transformers.pytorch_utils import Conv1D

        where = shown(str(self.folder))
        if any(".quant_state." in name or name.endswith((".absmax", ".scales")) for name in self._where):
            raise MemplanError(f"the weights in {where} are quantised already: give the 16-bit checkpoint")
        if any(isinstance(module, Conv1D) for module in model.modules()):
            raise MemplanError("weights of a model with Conv1D layers can't be loaded: leave out --weights")
        names = [name for name, _ in model.named_parameters()]
        self._names = {name: self._name(model, name) for name in names}
        missing = [name for name in names if self._names[name] is None]
        if missing:
            raise MemplanError(
                f"the weights in {where} lack {len(missing)} of the model's {len(names)} tensors, the first "
                f"of which is {missing[0]}"
            )
        for name, parameter in model.named_parameters():
            there = str(self._names[name])
            shape = tuple(self._slice(there).get_shape())
            if shape != tuple(parameter.shape):
                raise MemplanError(
                    f"the tensor {there} in {where} has the shape {list(shape)}, but the configuration "
                    f"makes it {list(parameter.shape)}"
                )

    def _slice(self, name: str) -> Any:
        from safetensors import SafetensorError

        try:
            return self._open(self._where[name], "cpu").get_slice(name)
        except SafetensorError:
            raise MemplanError(
                f"{shown(str(self._where[name]))} lacks the tensor {name}, which the checkpoint's index "
                "says it has"
            ) from None

    def tensor(self, name: str, parameter: nn.Parameter, device: torch.device) -> torch.Tensor | None:
        """The tensor on the device, in the parameter's dtype."""
        there = self._names[name]
        assert there is not None
        file = self._open(self._where[there], str(device))
        data: torch.Tensor = file.get_tensor(there)
        return data.to(parameter.dtype)


def fetch(where: str) -> Path:
    """The folder of a checkpoint: a local one, or a Hub id's files from the cache or the Hub.

    Raises MemplanError with one sentence.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        return path
    if path.exists() or where.count("/") != 1 or where.startswith((".", "~", "/")):
        raise MemplanError(f"{shown(where)} is no folder with weights; give one, or a Hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where, allow_patterns=["*.safetensors", "*.json"]))
    except Exception:  # an HTTP library's own exceptions, broken caches, certificates, proxies ...
        raise MemplanError(
            f"the weights of {shown(where)} could not be fetched from the Hub: "
            "check the name and the network, or give a local folder"
        ) from None
