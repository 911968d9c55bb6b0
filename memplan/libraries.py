"""The libraries whose code is traced: which versions are installed, and which are tested."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from memplan.errors import MemplanError

# Releases that CI tests (constraints.txt); one that differs in its last number only is taken for the same.
TESTED = {
    "torch": "2.13",
    "transformers": "5.23",
    "peft": "0.21",
    "bitsandbytes": "0.50",
    "accelerate": "1.15",
}

INSTALL = "pip install 'memplan[verify]'"

# Whose code a loss is, beside those: its name on PyPI, the release, its name in Python.
OF_LOSS = {"chunked": ("trl", "1.16", "trl"), "liger": ("liger-kernel", "0.8", "liger_kernel")}
_INSTALL_LOSSES = "pip install 'memplan[verify,losses]'"


def require(loss: str = "standard", doing: str = "tracing") -> None:
    """Raise MemplanError with the command that installs what is missing, if something is."""
    missing = [name for name in TESTED if find_spec(name) is None]
    install = INSTALL
    if loss in OF_LOSS:
        name, _, module = OF_LOSS[loss]
        if find_spec(module) is None:
            missing.append(name)
            install = _INSTALL_LOSSES
    if missing:
        *head, last = missing
        names = f"{', '.join(head)} and {last}" if head else last
        raise MemplanError(
            f"{doing} runs the libraries' own code and needs {names}, which "
            f"{'are' if head else 'is'} not installed: run `{install}`"
        )


def installed(loss: str = "standard") -> dict[str, str]:
    """The versions of the libraries that are there, with the one that a loss comes from."""
    names = [*TESTED, *(OF_LOSS[loss][:1] if loss in OF_LOSS else ())]
    return {name: number for name in names if (number := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def untested(versions: dict[str, str]) -> list[str]:
    """A sentence on each library whose version is not a tested one."""
    tested = TESTED | {name: number for name, number, _ in OF_LOSS.values()}
    return [
        f"{name} {number} is not the version that memplan is tested with ({tested[name]}): "
        "what it allocates may not be what memplan models"
        for name, number in versions.items()
        if number.split("+")[0].split(".")[:2] != tested[name].split(".")
    ]
