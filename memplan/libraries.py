"""The libraries whose code is traced: which versions are installed, and which are tested."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

from memplan.errors import MemplanError

# Releases that CI tests (constraints.txt); one that differs in its last number only is taken for the same.
TESTED = {
    "torch": "2.13",
    "transformers": "5.23",
    "peft": "0.21",
    "bitsandbytes": "0.50",
    "accelerate": "1.15",
}


# Names what is needed, not memplan's extra: memplan may come from a checkout or a wheel, and from no index.
INSTALL = f"pip install {' '.join(TESTED)}"


class Library(NamedTuple):
    """Whose code a loss is, beside those: its name on PyPI, the tested release, its name in Python."""

    name: str
    tested: str
    module: str


def require(also: Library | None = None, doing: str = "tracing") -> None:
    """Raise MemplanError with the command that installs what is missing, if something is."""
    missing = [name for name in TESTED if find_spec(name) is None]
    if also is not None and find_spec(also.module) is None:
        missing.append(also.name)
    if missing:
        *head, last = missing
        names = f"{', '.join(head)} and {last}" if head else last
        raise MemplanError(
            f"{doing} runs the libraries' own code and needs {names}, which "
            f"{'are' if head else 'is'} not installed: run `pip install {' '.join(missing)}`"
        )


def installed(also: Library | None = None) -> dict[str, str]:
    """The versions of the libraries that are there, with the one that a loss comes from."""
    names = [*TESTED, *((also.name,) if also is not None else ())]
    return {name: number for name in names if (number := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def untested(versions: dict[str, str], also: Library | None = None) -> list[str]:
    """A sentence on each library whose version is not a tested one."""
    tested = TESTED | ({also.name: also.tested} if also is not None else {})
    return [
        f"{name} {number} is not the version that memplan is tested with ({tested[name]}): "
        "what it allocates may not be what memplan models"
        for name, number in versions.items()
        if number.split("+")[0].split(".")[:2] != tested[name].split(".")
    ]
