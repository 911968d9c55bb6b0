"""One rank stands for all: launchers start as many processes as they are told, and all but rank 0 end soon.

Rank 0 has the real process group of a world of that size, over NCCL's functions that do nothing. What others
would have sent is what it sent itself: objects here, whole numbers in memplan_integers.py.
"""

from __future__ import annotations

import os
from typing import Any


def alone() -> bool:
    """Whether this process is a rank that others are left out for."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ


def leave() -> None:
    """End this process if it is a rank that is not played; launchers think that it has done its work."""
    if "MEMPLAN_WATCH" in os.environ and alone() and os.environ["RANK"] != "0":
        os._exit(0)


def prepare(torch: Any) -> None:
    """Objects come from this rank."""
    dist = torch.distributed
    if not alone() or not dist.is_available():
        return
    c10d = dist.distributed_c10d

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, *_: Any, **__: Any) -> None:
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def broadcast_object_list(object_list: list[Any], *_: Any, **__: Any) -> None:
        """They are what they are."""

    def scatter_object_list(
        scatter_object_output_list: list[Any], scatter_object_input_list: Any = None, *_: Any, **__: Any
    ) -> None:
        if scatter_object_input_list:
            scatter_object_output_list[0] = scatter_object_input_list[0]

    def barrier(*_: Any, **__: Any) -> None:
        """Everybody is there."""

    for function in (all_gather_object, gather_object, broadcast_object_list, scatter_object_list, barrier):
        name = function.__name__
        setattr(c10d, name, function)
        setattr(dist, name, function)
    dist.monitored_barrier = c10d.monitored_barrier = barrier
    for name in ("all_gather", "all_gather_into_tensor", "_all_gather_base"):
        if hasattr(c10d, name):
            told = _repeating(torch, getattr(c10d, name))
            setattr(c10d, name, told)
            setattr(dist, name, told)


def _repeating(torch: Any, gather: Any) -> Any:
    """A gather of whole numbers that brings this rank's from all."""
    from functools import wraps

    from memplan_integers import repeat

    @wraps(gather)
    def gathering(places: Any, sent: Any, *args: Any, **kwargs: Any) -> Any:
        work = gather(places, sent, *args, **kwargs)
        for place in places if isinstance(places, list) else [places]:
            repeat(torch, sent, place)
        return work

    return gathering
