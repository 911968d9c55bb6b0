"""DDP: every rank has all of the model; gradients are summed in flat buckets that are kept beside them
(torch/nn/parallel/distributed.py, torch/csrc/distributed/c10d/reducer.cpp, 2.13; as transformers 5.23
trainer.py, ``_build_accelerator_args``, sets it up).

A bucket is closed when it has 25 MiB, the first one at 1 MiB. Where no parameter can be unused, buckets are
made again after the first step in the order in which gradients came; else they stay in the order of the
parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import groupby, repeat
from operator import itemgetter
from typing import Any

from memplan.asked.recipe import DTypeName, Mode, Recipe
from memplan.optimizers import Group
from memplan.shadow.autograd import AccumulateGrad, Node, attach
from memplan.shadow.spread import Spread
from memplan.shadow.tensor import (
    DType,
    Tensor,
    category,
    empty,
    float32,
    int32,
    state,
)
from memplan.strategies import Strategy
from memplan.strategies._broadcast import LIMIT, flying
from memplan.tape import Category, Part, Phase, Tape
from memplan.weights import LoadStep, Temporary

_FIRST, _CAP = 1 << 20, 25 << 20  # bytes: dist._DEFAULT_FIRST_BUCKET_BYTES, bucket_cap_mb
_BUCKETS = "buckets"  # a segment


class Ddp(Spread):
    """``unused``: ``find_unused_parameters``, which is on unless the model is transformers' own and
    checkpoints."""

    def __init__(self, recipe: Recipe, rank: int | None = None) -> None:
        super().__init__(recipe.gpus, rank)
        self._groups: list[Group] = []
        self._numbers: dict[int, tuple[int, int]] = {}  # parameters by group and number
        self._arrived: list[tuple[int, int]] = []
        self.unused = not (recipe.mode is Mode.FULL and recipe.gradient_checkpointing)
        self._kept: list[Tensor] = []

    def rest(self, groups: list[Group]) -> None:
        """Write the buckets."""
        self._groups = groups
        self._numbers = {
            id(parameter.node): (place, number)
            for place, group in enumerate(groups)
            for number, parameter in enumerate(group.parameters)
        }
        parameters = self._in_order(self._numbers.values())
        tape = state.tape
        tape.begin(Phase.SETUP, _BUCKETS, part=Part.RESTING)
        tape.module = "ddp"
        with category(Category.COMMUNICATION):
            for nbytes, dtype in reversed(list(_buckets(parameters))):
                self._kept.append(empty((nbytes // dtype.itemsize,), dtype, "bucket"))
            tape.begin(Phase.SETUP, "used", part=Part.RESTING)
            if self.unused:
                self._kept.append(empty((len(parameters),), int32, "locally_used_map"))

    def _in_order(self, order: Iterable[tuple[int, int]]) -> list[Tensor]:
        """Parameters of all layers; what repeats, layer after layer."""
        groups = self._groups
        return [
            groups[place].parameters[number]
            for place, run in groupby(order, key=itemgetter(0))
            for numbers in repeat([number for _, number in run], groups[place].repeat)
            for number in numbers
        ]

    def arrived(self, node: AccumulateGrad) -> None:
        """Gradients come in the order in which buckets are made again."""
        if id(node) in self._numbers:
            self._arrived.append(self._numbers[id(node)])

    def played(self, tape: Tape) -> None:
        """The buckets are those that later steps have."""
        if self.unused:
            return
        segment = next(one for one in tape.segments if one.name == _BUCKETS)
        tape.exchange(segment, [nbytes for nbytes, _ in _buckets(self._in_order(self._arrived))])
        segment.part = Part.RENEWED

    def before(self) -> None:
        """``_sync_buffers``: the rotary tables' are broadcast as one."""
        state.tape.module = "ddp"
        together = empty((1,), float32, "broadcast_coalesced")
        del together

    def after(self, loss: Any, logits: Tensor | None) -> tuple[Any, Tensor | None]:
        """``_DDPSink``, which copies what the model returns."""
        if not self.unused:
            return loss, logits
        state.tape.module = "ddp"
        return _copied(loss), None if logits is None else _copied(logits)


def _buckets(parameters: Iterable[Tensor]) -> Iterable[tuple[int, DType]]:
    """``compute_bucket_assignment_by_size``: bytes and dtype of each; those of a dtype are filled apart."""
    closed: list[tuple[int, DType]] = []
    filling: dict[DType, int] = {}
    limits: dict[DType, int] = {}
    for parameter in parameters:
        dtype = parameter.dtype
        filling[dtype] = filling.get(dtype, 0) + parameter.nbytes
        if filling[dtype] >= limits.setdefault(dtype, _FIRST):
            closed.append((filling.pop(dtype), dtype))
            limits[dtype] = _CAP
    return [*closed, *((nbytes, dtype) for dtype, nbytes in filling.items())]


def _copied(returned: Any) -> Any:
    if isinstance(returned, tuple):
        return type(returned)(*map(_copied, returned))
    if not isinstance(returned, Tensor) or returned.node is None:
        return returned
    node = Node(_passed_on, returned)
    node.python = True
    out = empty(returned.shape, returned.dtype, "clone")
    attach(node, out)
    return out


def _passed_on(node: Node, grad: Tensor) -> Any:
    return (grad,)


def _wrap(recipe: Recipe, step: Tape, temporary: Temporary) -> Iterator[LoadStep]:
    """``DistributedDataParallel(model)``: what the first rank has is broadcast in flat tensors, two at a time
    (``_sync_module_states``; csrc/distributed/c10d/comm.cpp, ``broadcast_coalesced``), and buckets are made,
    of parameters in their order; those that are made again after the first step stay until then."""
    loaded = [
        event
        for segment in step.segments
        if segment.part is Part.LOADED
        for event in step.events[segment.start : segment.stop]
        if event >= 0
    ]
    parts = [event for event in loaded if step.categories[event] is not Category.QUANTIZATION_STATE]
    yield from flying(_filled(recipe, step, parts, LIMIT), temporary)
    if any(segment.part is Part.RENEWED for segment in step.segments):
        parameters = [event for event in loaded if step.modules[event] != "model.rotary_emb"]
        for nbytes, _ in reversed(list(_filled(recipe, step, parameters, sys.maxsize))):
            yield temporary(nbytes)[0]


def _filled(recipe: Recipe, step: Tape, storages: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Bytes of buckets and how many tensors each has, in the order in which they begin; one a dtype."""
    quantised = {module.removesuffix(".absmax") for module in step.modules if module.endswith(".absmax")}
    weights = DTypeName.FLOAT32 if recipe.kbit_prep else recipe.dtype
    adapters = DTypeName.FLOAT32 if recipe.adapter_dtype is DTypeName.FLOAT32 else weights

    def dtype(storage: int) -> str:
        if step.modules[storage].removesuffix(".weight") in quantised:
            return "uint8"
        return (adapters if step.categories[storage] is Category.ADAPTERS else weights).value

    found: list[tuple[int, int, int]] = []
    filling: dict[str, tuple[int, int, int]] = {}
    for place, storage in enumerate(storages):
        kind = dtype(storage)
        begun, nbytes, count = filling.pop(kind, (place, 0, 0))
        nbytes += step.sizes[storage]
        if nbytes >= limit:
            found.append((begun, nbytes, count + 1))
        else:
            filling[kind] = begun, nbytes, count + 1
    yield from ((nbytes, count) for _, nbytes, count in sorted([*found, *filling.values()]))


STRATEGY = Strategy(Ddp, wrap=_wrap)
