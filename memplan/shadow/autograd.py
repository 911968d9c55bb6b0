"""Autograd: what is saved for backward, and the engine's order of running it.

Source of the order and of the in-place rules: torch/csrc/autograd/engine.cpp (ready queue by highest
sequence number), input_buffer.cpp (``accumulate``), functions/accumulate_grad.h (stealing), 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from math import prod
from sys import getrefcount
from typing import TYPE_CHECKING, Any, NamedTuple

from memplan.cuda.reduction import scratch
from memplan.shadow.tensor import DType, Shape, Tensor, empty, iterator_strides, state, stream, uint8
from memplan.tape import Category, Phase

if TYPE_CHECKING:
    from memplan.shadow.turns import Turn

Grads = Sequence["Tensor | None"]
Backward = Callable[["Node", Any], Grads]

_LAST = 1 << 60  # AccumulateGrad's sequence number: it runs as soon as its gradient is complete


class Node:
    """A step of the backward pass.

    ``edges`` lead to the nodes that made the inputs (None where no gradient is wanted), ``meta`` has
    shape and dtype of each output, ``saved`` what backward needs, ``context`` numbers that are not memory.
    ``stream``: of its forward, where its gradients are added up, too; ``turn``: of the loop that made it.
    ``before``: what its outputs' hooks do when their gradients are complete. ``python``: a
    ``torch.autograd.Function``, whose incoming gradients are gone when it returns; others hold
    them until what they return has been cast.
    """

    __slots__ = (
        "backward", "before", "category", "context", "edges", "grads", "meta", "module", "python", "saved",
        "scope", "sequence", "stream", "turn",
    )  # fmt: skip

    def __init__(self, backward: Backward, *inputs: Tensor | None) -> None:
        self.backward = backward
        self.edges = [
            None if tensor is None or tensor.node is None else (tensor.node, tensor.output)
            for tensor in inputs
        ]
        self.meta: list[tuple[Shape, DType]] = []
        self.saved: Any = None
        self.context: Any = None
        self.grads: list[Tensor | None] | None = None
        self.python = False
        self.before: Callable[[], None] | None = None
        self.scope = state.scope
        self.module = state.tape.module
        self.category = state.category
        self.stream = state.stream
        self.turn = state.turn
        state.sequence = self.sequence = state.sequence + 1


class AccumulateGrad(Node):
    """The end of the graph at a parameter; holds the parameter's gradient."""

    __slots__ = ("grad", "parameter", "variable")

    def __init__(self, shape: Shape, dtype: DType, parameter: bool = True) -> None:
        super().__init__(_no_backward)
        self.parameter = parameter
        self.meta = [(shape, dtype)]
        self.sequence = _LAST
        self.grad: Tensor | None = None
        self.variable: Any = None  # the storage of a leaf that only the graph keeps alive


def _no_backward(node: Node, grads: Any) -> Grads:
    return ()


def attach(node: Node, tensor: Tensor) -> None:
    """Make ``tensor`` the next differentiable output of ``node``."""
    meta = node.meta
    tensor.node = node
    tensor.output = len(meta)
    meta.append((tensor.shape, tensor.dtype))


def require_grad(leaf: Tensor, *, parameter: bool) -> None:
    """``leaf.requires_grad_()``. A leaf that is no parameter lives as long as the graph that uses it."""
    node = AccumulateGrad(leaf.shape, leaf.dtype, parameter)
    if not parameter:
        node.variable = leaf.storage
    leaf.node, leaf.output = node, 0


# -- saving, plain and under checkpointing --------------------------------------------------------


class Holder:
    """What a checkpointed region keeps instead of a saved tensor, until it is recomputed."""

    __slots__ = ("frame", "tensor")

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.tensor: Tensor | None = None


class StopRecomputation(Exception):
    """Everything that was saved has been recomputed; the rest of the region need not run."""


class Frame:
    """One region under non-reentrant checkpointing (torch/utils/checkpoint.py, _CheckpointFrame)."""

    __slots__ = ("holders", "packed", "recompute", "recomputing")

    def __init__(self, recompute: Callable[[], Any]) -> None:
        self.recompute = recompute  # holds the region's arguments as long as the frame lives
        self.holders: list[Holder | None] = []
        self.packed = 0
        self.recomputing = False


def save(tensor: Tensor) -> Any:
    """Keep an input for backward."""
    frame = state.frame
    if frame is None:
        keep(tensor)
        return tensor
    return _pack(frame, tensor)


def save_output(tensor: Tensor) -> Any:
    """Keep an output for backward: an alias, for the output will point to the node itself."""
    return save(tensor.detach())


def keep(tensor: Tensor) -> None:
    """Count a storage as an activation."""
    storage = tensor.storage
    if storage is not None:
        categories = state.tape.categories
        if categories[storage.index] is Category.TEMPORARIES:
            categories[storage.index] = Category.ACTIVATIONS


def _pack(frame: Frame, tensor: Tensor) -> Any:
    if not frame.recomputing:
        holder = Holder(frame)
        frame.holders.append(holder)
        return holder
    holder_ = frame.holders[frame.packed]
    frame.holders[frame.packed] = None
    frame.packed += 1
    alias = tensor.detach() if tensor.requires_grad else tensor  # _recomputation_hook, pack_hook
    keep(alias)
    if holder_ is not None:
        holder_.tensor = alias
    if frame.packed == len(frame.holders):
        raise StopRecomputation
    return alias


def unpack(saved: Any) -> Tensor:
    """The tensor that :func:`save` kept; recomputes its checkpointed region if that is still due.

    A recomputed tensor is handed out once and then lives as long as the caller's name for it.
    """
    if type(saved) is Tensor:
        return saved
    if saved.tensor is None:
        _recompute(saved.frame)
    tensor = saved.tensor
    saved.tensor = None
    return tensor  # type: ignore[no-any-return]


def _recompute(frame: Frame) -> None:
    frame.recomputing = True
    before = state.frame, state.grad, state.tape.module, state.category, state.sequence
    state.frame, state.grad, state.category = frame, True, Category.TEMPORARIES
    try:
        frame.recompute()
    except StopRecomputation:
        pass
    finally:
        state.frame, state.grad, state.tape.module, state.category, state.sequence = before


@contextmanager
def frame(value: Frame) -> Iterator[None]:
    """Save into ``value`` instead of keeping tensors."""
    before, state.frame = state.frame, value
    try:
        yield
    finally:
        state.frame = before


# -- the engine ------------------------------------------------------------------------------------


def backward(root: Tensor, grad: Tensor) -> None:
    """Run the graph behind ``root`` from ``grad``; parameters' gradients end in their AccumulateGrad."""
    start = root.node
    assert start is not None, "the loss has no history: nothing is trainable"
    dependencies: dict[Node, int] = {start: 0}
    stack = [start]
    while stack:
        for target in stack.pop().edges:
            if target is not None:
                node = target[0]
                if node in dependencies:
                    dependencies[node] += 1
                else:
                    dependencies[node] = 1
                    stack.append(node)
    start.grads = [None] * len(start.meta)
    start.grads[root.output] = grad
    del grad, root
    ready = [(-start.sequence, 0, start)]
    del start
    tape = state.tape
    grad_mode, state.grad = state.grad, False
    ticket = 0
    scope = state.scope
    outer = scope, tape.module, state.category
    turn: Turn | None = None
    while ready:
        node = heappop(ready)[2]
        if node.turn is not turn and node.sequence != _LAST:
            if turn is not None:
                turn.leave()
            turn = node.turn
            if turn is not None:
                turn.enter()
        if node.scope != scope and node.sequence != _LAST:
            scope = state.scope = node.scope
            tape.begin(Phase.BACKWARD, "backward", scope)
        tape.module, state.category = node.module, node.category
        targets = _evaluate(node, dependencies)
        for consumer in targets:
            ticket += 1
            heappush(ready, (-consumer.sequence, ticket, consumer))
        del node, targets
    if turn is not None:
        turn.leave()
    state.scope, tape.module, state.category = outer
    state.grad = grad_mode


def _evaluate(node: Node, dependencies: dict[Node, int]) -> list[Node]:
    """Run one node, hand its gradients on, and return the nodes that became ready."""
    if node.before is not None:
        node.before()
        state.tape.module = node.module
    if type(node) is AccumulateGrad:
        accumulate_grad(node)
        return []
    incoming: Any = node.grads
    node.grads = None
    outgoing = list(node.backward(node, incoming[0] if len(incoming) == 1 else incoming))
    if node.python:
        incoming = None
    for position, target in enumerate(node.edges):
        grad = outgoing[position]
        if target is not None and grad is not None:
            shape, dtype = target[0].meta[target[1]]
            if grad.shape != shape:
                grad = outgoing[position] = _sum_to(grad, shape)
            if grad.dtype is not dtype:
                outgoing[position] = _cast(grad, dtype)
    grad = None
    del incoming
    node.saved = None
    ready = []
    outgoing.reverse()
    for target in node.edges:
        grad = outgoing.pop()
        if target is None:
            continue
        consumer, output = target
        if grad is not None:
            if consumer.grads is None:
                consumer.grads = [None] * len(consumer.meta)
            old = consumer.grads[output]
            if old is None:
                consumer.grads[output] = grad
            else:
                consumer.grads[output] = None
                with stream(consumer.stream):
                    consumer.grads[output] = _add_gradients(old, grad)
            old = grad = None
        dependencies[consumer] -= 1
        if not dependencies[consumer]:
            ready.append(consumer)
    return [consumer for consumer in ready if consumer.grads is not None]


# References that CPython itself holds to a gradient while _add_gradients looks at it: the caller's
# local, the parameter, and getrefcount's argument; and to its storage: the tensor and the argument.
_OWN_TENSOR_REFERENCES = 3
_OWN_STORAGE_REFERENCES = 2


def _add_gradients(old: Tensor, new: Tensor) -> Tensor:
    """InputBuffer::accumulate: in place when nobody else looks at the older gradient."""
    if getrefcount(old) <= _OWN_TENSOR_REFERENCES and getrefcount(old.storage) <= _OWN_STORAGE_REFERENCES:
        return old
    return empty(old.shape, old.dtype, "add", iterator_strides(old.shape, [old, new]))


class Arrival(NamedTuple):
    """A gradient at its parameter: what happens there is ``start:stop`` of the tape's events; ``storage``:
    its number."""

    start: int
    stop: int
    node: AccumulateGrad
    storage: int
    shape: Shape
    dtype: DType
    strides: Shape | None


def accumulate_grad(node: AccumulateGrad) -> None:
    """A gradient arrives at a parameter."""
    assert node.grads is not None
    grad = node.grads[0]
    arrivals = state.arrivals
    if arrivals is None or not node.parameter or grad is None or grad.storage is None:
        del grad
        _accumulate_grad(node)
        return
    start, about = len(state.tape.events), (grad.storage.index, grad.shape, grad.dtype, grad.strides)
    del grad
    _accumulate_grad(node)
    arrivals.append(Arrival(start, len(state.tape.events), node, *about))


def _accumulate_grad(node: AccumulateGrad) -> None:
    assert node.grads is not None
    grad = node.grads[0]
    node.grads = None
    if node.grad is None and grad is not None:
        node.grad = grad
        if state.spread is not None:
            state.spread.arrived(node)
        if grad.storage is not None and node.parameter:
            state.tape.categories[grad.storage.index] = Category.GRADIENTS
    if state.spread is not None and node.parameter:
        del grad
        state.spread.accumulated(node)


def _cast(grad: Tensor, dtype: DType) -> Tensor:
    return empty(grad.shape, dtype, "_to_copy", iterator_strides(grad.shape, [grad]))


def _sum_to(grad: Tensor, shape: Shape) -> Tensor:
    """A gradient summed over the axes along which its tensor was broadcast (at::sum_to): a view only
    where it had fewer axes (aten/src/ATen/ExpandUtils.h)."""
    lead = len(grad.shape) - len(shape)
    kept = tuple(
        1 if axis < lead or (shape[axis - lead] == 1 and size != 1) else size
        for axis, size in enumerate(grad.shape)
    )
    summed = empty(kept, grad.dtype, "sum")
    if 1 < prod(kept) == kept[-1] == grad.shape[-1] and (grad.strides is None or grad.strides[-1] == 1):
        split_sum(grad.shape)
    return summed.viewed(shape) if lead else summed


def split_sum(shape: Shape) -> None:
    """What summing floats [..., N] to [N] takes for a moment (:mod:`memplan.cuda.reduction`)."""
    needed = scratch(shape, state.card)
    if needed is not None:
        buffers = [empty((nbytes,), uint8, "sum") for nbytes in needed]
        del buffers
