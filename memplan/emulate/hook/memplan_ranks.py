"""One rank stands for all: launchers start as many processes as they are told, and all but rank 0, or those
that were asked for, end soon.

Each has the real process group of a world of that size, over NCCL's functions that do nothing, and PyTorch's
own FakeProcessGroup in place of Gloo's, which would wait for the others. What they would have sent is what it
sent itself: objects and the host's tensors, and the card's whole numbers (memplan_integers.py).
"""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from memplan_imports import when_imported

_PATIENCE = 600.0  # seconds for another rank that is played
# What a function brings from all ranks, by the names of its arguments: to where, and of what.
_ALL = {
    "all_gather": ("tensor_list", "tensor"),
    "all_gather_into_tensor": ("output_tensor", "input_tensor"),
    "all_gather_single": ("output_tensor", "input_tensor"),
    "gather": ("gather_list", "tensor"),
}
_PARTS = {  # and of that, the part which is this rank's
    "scatter": ("tensor", "scatter_list"),
    "all_to_all": ("output_tensor_list", "input_tensor_list"),
    "all_to_all_single": ("output", "input"),
    "reduce_scatter": ("output", "input_list"),
    "reduce_scatter_tensor": ("output", "input"),
    "reduce_scatter_single": ("output", "input"),
}
_IN_PLACE = {"all_reduce": "tensor", "reduce": "tensor", "all_reduce_coalesced": "tensors"}
# Those of _functional_collectives, whose results are new tensors.
_FUNCTIONAL = (
    "all_reduce", "broadcast", "all_gather_tensor", "all_gather_single", "reduce_scatter_tensor",
    "reduce_scatter_single",
)  # fmt: skip
# Since PyTorch 2.13 these call newer ones.
_OLDER = {"all_gather_into_tensor": "all_gather_single", "reduce_scatter_tensor": "reduce_scatter_single"}


def alone() -> bool:
    """Whether this process is a rank that others are left out for."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ


def leave() -> None:
    """End this process if it is a rank that is not played; launchers think that it has done its work."""
    if "MEMPLAN_WATCH" in os.environ and alone() and not _played(int(os.environ["RANK"])):
        os._exit(0)


def _played(rank: int) -> bool:
    asked = _told()["ranks"]
    return not asked or rank in asked  # none: all of them


def prepare(torch: Any) -> None:
    """Nobody is waited for, and what comes from other ranks comes from this one."""
    dist = torch.distributed
    if not alone() or not dist.is_available():
        when_imported("torch.distributed.launcher.api", lambda api: _on_one_machine(torch, api))
        if dist.is_available() and "MEMPLAN_WATCH" in os.environ:
            _refuse_spawned(dist)
        return
    c10d = dist.distributed_c10d

    def put(name: str, value: Any) -> None:
        for module in (c10d, dist):
            if hasattr(module, name):
                setattr(module, name, value)

    for function in (*_objects(dist), *_waits()):
        put(function.__name__, function)
    put("TCPStore", _store(dist.TCPStore))
    dist.rendezvous.__globals__["TCPStore"] = dist.TCPStore
    if c10d.is_gloo_available():
        put("ProcessGroupGloo", _on_host(c10d.ProcessGroupGloo))
    for name in (*_ALL, *_PARTS, *_IN_PLACE):
        if hasattr(c10d, name) and not hasattr(c10d, _OLDER.get(name, "")):
            put(name, _repeating(torch, name, getattr(c10d, name)))
    import torch.distributed._functional_collectives as functional

    for name in _FUNCTIONAL:
        if hasattr(functional, name):
            setattr(functional, name, _repeating_anew(torch, functional, getattr(functional, name)))


def _refuse_spawned(dist: Any) -> None:
    """Ranks that no launcher starts are not known as such: they would wait for each other."""
    begin = dist.init_process_group

    @wraps(begin)
    def beginning(*args: Any, **kwargs: Any) -> Any:
        world = kwargs.get("world_size", args[3] if len(args) > 3 else -1)
        if isinstance(world, int) and world > 1 and "RANK" not in os.environ:
            raise SystemExit(
                f"memplan: {world} ranks are started by the program itself: a dry run has them from a "
                f"launcher, such as torchrun --nproc-per-node {world}, which tells RANK and WORLD_SIZE"
            )
        return begin(*args, **kwargs)

    for module in (dist, dist.distributed_c10d):
        module.init_process_group = beginning


def _on_one_machine(torch: Any, api: Any) -> None:
    """A launcher that asks for other machines would wait for them, and one with more processes than there are
    cards would be believed, for only one of them runs."""
    launch = api.launch_agent

    def launch_agent(config: Any, *args: Any, **kwargs: Any) -> Any:
        each, cards = config.nproc_per_node, torch.cuda.device_count()
        if config.max_nodes > 1:
            every = config.max_nodes * each
            raise SystemExit(
                f"memplan: {config.max_nodes} nodes are asked for, and a dry run has one machine: start it "
                f"as one node of {every} processes, on {every} cards (--gpu {every}x…)"
            )
        if each > cards:
            raise SystemExit(
                f"memplan: {each} processes are asked for, and the machine has {cards} of the cards: say "
                f"--gpu {each}x…"
            )
        return launch(config, *args, **kwargs)

    api.launch_agent = launch_agent


def _told() -> dict[str, Any]:
    """What memplan/emulate/launch.py tells of the run."""
    found: dict[str, Any] = json.loads(os.environ["MEMPLAN_WATCH"])
    return found


def _objects(dist: Any) -> Iterable[Callable[..., None]]:
    """Objects come from this rank; those that one rank gives to all, from that one if it is played."""
    turns: dict[tuple[int, ...], int] = {}  # of each group

    def given(mine: Any, group: Any, src: int | None, group_src: int | None) -> Any:
        """What the source gives in this turn; ``mine`` is what it has here."""
        members = tuple(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
        turns[members] = turn = turns.get(members, 0) + 1
        source = members[group_src] if group_src is not None else src or 0
        place = os.path.join(_told()["folder"], f"given-{'-'.join(map(str, members))}-{source}-{turn}")
        if source == dist.get_rank():
            with open(f"{place}.part", "wb") as file:
                pickle.dump(mine, file)
            os.replace(f"{place}.part", place)
            return mine
        if not _played(source):
            return mine
        until = time.monotonic() + _PATIENCE
        while not os.path.exists(place):
            if time.monotonic() > until:
                raise TimeoutError(f"rank {source} gives nothing")
            time.sleep(0.01)
        with open(place, "rb") as file:
            return pickle.load(file)

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, *_: Any, **__: Any) -> None:
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def broadcast_object_list(
        object_list: list[Any],
        src: int | None = None,
        group: Any = None,
        device: Any = None,
        group_src: int | None = None,
    ) -> None:
        object_list[:] = given(object_list, group, src, group_src)

    def scatter_object_list(
        scatter_object_output_list: list[Any],
        scatter_object_input_list: Any = None,
        src: int | None = None,
        group: Any = None,
        group_src: int | None = None,
    ) -> None:
        everything = given(scatter_object_input_list, group, src, group_src)
        if everything:
            scatter_object_output_list[0] = everything[dist.get_rank(group)]

    return all_gather_object, gather_object, broadcast_object_list, scatter_object_list


def _waits() -> Iterable[Callable[..., Any]]:
    """Everybody is there."""

    def barrier(*_: Any, **__: Any) -> None: ...
    def monitored_barrier(*_: Any, **__: Any) -> None: ...
    def _store_based_barrier(*_: Any, **__: Any) -> None: ...

    def _verify_params_across_processes(*_: Any, **__: Any) -> None: ...  # DDP's, who are alike

    def _create_process_group_wrapper(wrapped_pg: Any, *_: Any, **__: Any) -> Any:
        return wrapped_pg  # not compared with what others send

    return (
        barrier,
        monitored_barrier,
        _store_based_barrier,
        _verify_params_across_processes,
        _create_process_group_wrapper,
    )


def _store(real: Any) -> Any:
    class TCPStore(real):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            args = args[:5]  # behind them: whether the others are waited for
            super().__init__(*args, **{**kwargs, "wait_for_workers": False})

    return TCPStore


def _on_host(real: Any) -> Any:
    """What Gloo's group is made and known by, and is none: its own connects to the others when it is made."""
    from torch._C._distributed_c10d import FakeProcessGroup

    class Known(type):
        def __instancecheck__(cls, group: Any) -> bool:
            return isinstance(group, (real, FakeProcessGroup))

        def __getattr__(cls, name: str) -> Any:
            return getattr(real, name)

    class ProcessGroupGloo(metaclass=Known):
        def __new__(cls, _store: Any, rank: int, size: int, *_: Any, **__: Any) -> Any:
            return FakeProcessGroup._create_internal(rank, size)

    setattr(FakeProcessGroup, "_set_sequence_number_for_group", lambda _: None)  # noqa: B010
    return ProcessGroupGloo


def _repeating(torch: Any, name: str, function: Any) -> Any:
    """The function, with what it brings where all ranks send what this one does."""
    from inspect import signature

    from memplan_integers import values

    told, inside = signature(function), threading.local()

    @wraps(function)
    def repeating(*args: Any, **kwargs: Any) -> Any:
        if getattr(inside, "one", False):  # a mode of PyTorch's calls it again, from within
            return function(*args, **kwargs)
        inside.one = True
        try:
            done = function(*args, **kwargs)
        finally:
            inside.one = False
        bound = told.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        group = given.get("group")
        rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        if rank < 0:
            return done
        if name in _IN_PLACE:
            pairs = [(tensor, tensor) for tensor in _many(given[_IN_PLACE[name]])]
        else:
            to, of = (given[argument] for argument in (*_ALL.get(name, ()), *_PARTS.get(name, ())))
            if to is None or of is None:  # another rank has them
                return done
            if name in _PARTS:
                sizes = given.get("input_split_sizes")
                of = of[rank] if isinstance(of, list) else _parts(of, sizes, ranks)[rank]
            pairs = [(place, of) for place in _many(to)]
        for place, sent in pairs:
            _put(torch, values(torch, place), values(torch, sent), given.get("op"), ranks)
        return done

    return repeating


def _repeating_anew(torch: Any, functional: Any, function: Any) -> Any:
    """The same of a function whose result is a new tensor."""
    from inspect import signature

    from memplan_integers import values

    told, kinds = signature(function), torch.distributed.ReduceOp

    @wraps(function)
    def repeating(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        bound = told.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        place, sent = values(torch, made), values(torch, given["self"])
        if place is None or sent is None:
            return made
        named = functional._resolve_group_name(given["group"], given.get("tag", ""))
        group = torch.distributed.distributed_c10d._resolve_process_group(named)
        if "gather_dim" in given:
            sent = torch.cat([sent] * group.size(), given["gather_dim"])
        elif "scatter_dim" in given:
            sent = sent.chunk(group.size(), given["scatter_dim"])[group.rank()]
        op = getattr(kinds, str(given.get("reduceOp")).upper(), None)
        _put(torch, place, sent, op, group.size())
        return made

    return repeating


def _many(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _parts(tensor: Any, sizes: list[int] | None, ranks: int) -> Any:
    return tensor.split(sizes) if sizes else tensor.chunk(ranks)


def _put(torch: Any, place: Any, sent: Any, op: Any, ranks: int) -> None:
    """What ``ranks`` send alike, reduced or as often as there is room. None: nobody knows what is there."""
    if place is None or sent is None or not sent.numel() or place.numel() % sent.numel():
        return
    kinds = torch.distributed.ReduceOp
    with torch.no_grad():
        if op == kinds.SUM and sent.dtype is not torch.bool:
            sent = sent * ranks
        elif op == kinds.PRODUCT:
            sent = sent**ranks
        elif op == kinds.BXOR:
            sent = sent * (ranks % 2)
        if place.shape == sent.shape:
            place.copy_(sent)
        else:
            place.view(-1, sent.numel()).copy_(sent.reshape(1, -1))
