"""Where the shipped data lies: ``data/`` of a checkout, or ``memplan/data/`` of an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_file(name: str) -> Path:
    """Path of a data file such as ``gpus.json``.

    Raises FileNotFoundError when the installation is incomplete.
    """
    for folder in (_PACKAGE / "data", _PACKAGE.parent / "data"):
        path = folder / name
        if path.is_file():
            return path
    raise FileNotFoundError(f"memplan's data file {name} is missing; reinstall memplan")
