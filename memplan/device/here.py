"""Cards by name, ``auto`` among the names: what is in this machine."""

from __future__ import annotations

import re
from contextlib import suppress

from memplan.asked.gpus import MIB, Gpu, find_gpu, load_gpus, own_name
from memplan.device import driver
from memplan.device.driver import Installed
from memplan.errors import MemplanError

AUTO = "auto"


def find_cards(name: str) -> list[Gpu]:
    """The card of a name; the kinds of card that this machine has, if the name is ``auto``, the smallest
    first. Raises MemplanError."""
    if own_name(name).lower() != AUTO:
        return [find_gpu(name)]
    here = driver.installed()
    if not here:
        raise MemplanError(
            "--gpu auto asks about the card of this machine, and NVIDIA's driver shows none here: name a "
            "card (`memplan gpus` lists them), or give a size such as 24GB"
        )
    return [_as_installed(*one) for one in sorted(here.items(), key=lambda one: one[1].nbytes)]


def find_card(name: str) -> Gpu:
    """The same where one card is asked about."""
    return find_cards(name)[0]


def _as_installed(name: str, card: Installed) -> Gpu:
    """The listed card, under the driver's name; an unlisted one as far as the driver tells it."""
    visible = card.nbytes // MIB
    listed = [gpu for gpu in load_gpus() if _plain(gpu.name).startswith(_plain(name))]
    with suppress(MemplanError):  # of two sizes one name, such as an RTX 5060 Ti, or none
        listed = [find_gpu(name)]
    if listed:
        gpu = min(listed, key=lambda gpu: abs(gpu.visible_bytes - card.nbytes))
        return gpu.model_copy(update={"name": name})
    major, minor = card.capability or (8, 0)
    return Gpu(
        name=name,
        aliases=(AUTO,),
        vendor="nvidia",
        gb=max(round(visible / 1024), 1),
        total_mib=visible + 1,
        torch_visible_mib=visible,
        compute_capability=f"{major}.{minor}",
        kind="datacenter",  # of which a process is taken to have the most beside the allocator
        ecc="n.a.",
        source="this machine's driver",
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
