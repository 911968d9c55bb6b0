"""DDP: every rank has all of the model; gradients are summed in flat buckets that are kept beside them
(torch/nn/parallel/distributed.py, torch/csrc/distributed/c10d/reducer.cpp, 2.13; as transformers 5.23 trainer.py
``create_accelerator_and_postprocess`` sets it up).

A bucket is closed when it has 25 MiB, the first one at 1 MiB. Where no parameter can be unused, buckets are made
again after the first step in the order in which gradients came; else they stay in the order of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memplan.asked.recipe import Mode, Recipe
from memplan.optimizers import Group
from memplan.shadow.autograd import Node, attach
from memplan.shadow.tensor import (
    DType,
    Tensor,
    category,
    empty,
    float32,
    int32,
    state,
)
from memplan.strategies import Spread, Strategy
from memplan.tape import Category

_FIRST, _CAP = 1 << 20, 25 << 20  # bytes: dist._DEFAULT_FIRST_BUCKET_BYTES, bucket_cap_mb


class Ddp(Spread):
    """A step on one rank of ``world``. ``unused``: ``find_unused_parameters``, which is on unless the model is
    transformers' own and checkpoints."""

    autocast = True

    def __init__(self, recipe: Recipe) -> None:
        self.world = recipe.gpus
        self.unused = not (recipe.mode is Mode.FULL and recipe.gradient_checkpointing)
        self._kept: list[Tensor] = []

    def rest(self, groups: list[Group], arrived: list[Tensor] | None) -> None:
        """Write the buckets. ``arrived``: parameters in the order in which their gradients came."""
        parameters = [parameter for group in groups for _ in range(group.repeat) for parameter in group.parameters]
        order = parameters if self.unused or arrived is None else arrived
        state.tape.module = "ddp"
        with category(Category.COMMUNICATION):
            sizes = list(_buckets(order))
            for nbytes, dtype in reversed(sizes) if order is parameters else sizes:
                self._kept.append(empty((nbytes // dtype.itemsize,), dtype, "bucket"))
            if self.unused:
                self._kept.append(empty((len(parameters),), int32, "locally_used_map"))

    def before(self) -> None:
        """``_sync_buffers``: the rotary tables' are broadcast as one."""
        state.tape.module = "ddp"
        together = empty((1,), float32, "broadcast_coalesced")
        del together

    def after(self, loss: Any, logits: Tensor | None) -> Any:
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


STRATEGY = Strategy(Ddp)
