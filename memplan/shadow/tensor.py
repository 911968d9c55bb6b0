"""Tensors without data, and the state that they are recorded in."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

from memplan.cuda.card import Card
from memplan.tape import Category, Tape

if TYPE_CHECKING:
    from memplan.shadow.autograd import Arrival, Frame, Node
    from memplan.shadow.spread import Spread
    from memplan.shadow.turns import Turn, Turns

Shape = tuple[int, ...]


class DType:
    """An element type: its name in torch, its bytes, whether it is a floating type."""

    __slots__ = ("floating", "itemsize", "name")

    def __init__(self, name: str, itemsize: int, floating: bool) -> None:
        self.name, self.itemsize, self.floating = name, itemsize, floating

    def __repr__(self) -> str:
        return self.name


float64 = DType("float64", 8, True)
float32 = DType("float32", 4, True)
bfloat16 = DType("bfloat16", 2, True)
float16 = DType("float16", 2, True)
complex64 = DType("complex64", 8, False)  # no dtype of reals to autocast
int64 = DType("int64", 8, False)
int32 = DType("int32", 4, False)
uint8 = DType("uint8", 1, False)
bool_ = DType("bool", 1, False)

DTYPES = {dtype.name: dtype for dtype in (float32, bfloat16, float16, int64, int32, uint8, bool_)}


class State:
    """Where operations write, and the modes that change what they do. It belongs to whoever is inside
    :func:`playing`."""

    __slots__ = (
        "arrivals",
        "autocast",
        "autocast_cache",
        "card",
        "category",
        "frame",
        "grad",
        "loops",
        "scope",
        "sequence",
        "spread",
        "stream",
        "tape",
        "turn",
    )

    def __init__(self, card: Card | None = None) -> None:
        self.card = card or Card()
        self.tape = Tape()
        self.grad = True
        self.category = Category.TEMPORARIES
        self.scope: int | None = None  # the decoder layer that is running
        self.sequence = 0  # autograd's sequence number
        self.frame: Frame | None = None  # the checkpointed region that is running
        self.stream = 0  # the CUDA stream that allocations belong to
        self.spread: Spread | None = None  # over ranks
        self.autocast: DType | None = None
        self.autocast_cache: dict[int, Tensor] = {}
        self.arrivals: list[Arrival] | None = None  # of gradients, where somebody wants to know
        self.turn: Turn | None = None  # of the loop that is running
        self.loops: list[Turns] = []  # of which one turn stands for others


state = State()
_one_at_a_time = threading.Lock()


@contextmanager
def playing() -> Iterator[None]:
    """To play in: the only place where the shadow may be used. One thread at a time has it, and begins with
    modes of its own (:func:`begin`); the others wait, which costs them nothing that Python's lock does not.

    The shadow makes thousands of objects and no cycles: looking for some would cost a tenth of a plan.
    """
    with _one_at_a_time:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            state.__init__()  # type: ignore[misc]
            if enabled:
                gc.enable()


def begin(card: Card | None) -> Tape:
    """A new tape, on which everything is recorded from here on, with no mode on. ``card`` is the reference
    card unless given."""
    assert _one_at_a_time.locked(), "the shadow is used outside of playing()"
    state.__init__(card)  # type: ignore[misc]
    return state.tape


class Storage:
    """A block of memory. Born when made, released when the last tensor that views it goes."""

    __slots__ = ("events", "index")

    def __init__(self, nbytes: int, operation: str) -> None:
        # Tape.alloc, spelled out: this runs a thousand times a plan.
        tape = state.tape
        events = self.events = tape.events
        sizes = tape.sizes
        index = self.index = len(sizes)
        sizes.append((nbytes + 511) // 512 * 512)
        tape.categories.append(state.category)
        tape.operations.append(operation)
        tape.modules.append(tape.module)
        events.append(index)
        if state.stream:
            tape.streams[index] = state.stream

    def __del__(self) -> None:
        self.events.append(~self.index)


class Resizable(Storage):
    """A storage that begins without memory and is given some now and then (``resize_``): each time it is
    another block on the tape."""

    __slots__ = ()

    def __init__(self) -> None:
        self.index = -1

    def resize(self, nbytes: int, operation: str = "") -> None:
        """To nothing, or from nothing to ``nbytes``."""
        if self.index >= 0:
            self.events.append(~self.index)
            self.index = -1
        if nbytes:
            super().__init__(nbytes, operation)

    def __del__(self) -> None:
        if self.index >= 0:
            self.events.append(~self.index)


class Tensor:
    """Shape, dtype, storage, strides (None: contiguous) and grad history.

    ``node`` and ``output`` say which autograd node made it, as its how-many-eth output (unset without
    one). A view keeps its ``base`` alive, as PyTorch's do: that is why the engine does not add into a
    viewed gradient.
    """

    __slots__ = ("base", "dtype", "node", "output", "shape", "storage", "strides")

    output: int

    def __init__(
        self, shape: Shape, dtype: DType, storage: Storage | None, strides: Shape | None = None
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.storage = storage
        self.strides = strides
        self.node: Node | None = None
        self.base: Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient reaches it: leaves that want one carry an AccumulateGrad."""
        return self.node is not None

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize

    def detach(self) -> Tensor:
        """The same storage without history."""
        return Tensor(self.shape, self.dtype, self.storage, self.strides)

    def viewed(self, shape: Shape, strides: Shape | None = None) -> Tensor:
        """A view without history."""
        out = Tensor(shape, self.dtype, self.storage, strides)
        out.base = self if self.base is None else self.base
        return out

    def __repr__(self) -> str:
        return f"Tensor({self.shape}, {self.dtype}{', grad' if self.requires_grad else ''})"


def empty(shape: Shape, dtype: DType, operation: str, strides: Shape | None = None) -> Tensor:
    """A new tensor in a new storage (none for no elements)."""
    nbytes = prod(shape) * dtype.itemsize
    return Tensor(shape, dtype, Storage(nbytes, operation) if nbytes else None, strides)


@contextmanager
def category(value: Category) -> Iterator[None]:
    """Storages born inside belong to ``value``."""
    before, state.category = state.category, value
    try:
        yield
    finally:
        state.category = before


@contextmanager
def stream(number: int) -> Iterator[None]:
    """Storages born inside belong to another CUDA stream."""
    before, state.stream = state.stream, number
    try:
        yield
    finally:
        state.stream = before


@contextmanager
def no_grad() -> Iterator[None]:
    """``torch.no_grad``."""
    before, state.grad = state.grad, False
    try:
        yield
    finally:
        state.grad = before


# -- strides -----------------------------------------------------------------------------------------


def contiguous_strides(shape: Shape) -> Shape:
    """Row-major strides, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def strides_of(tensor: Tensor) -> Shape:
    """Strides, in elements."""
    return contiguous_strides(tensor.shape) if tensor.strides is None else tensor.strides


def normalized(shape: Shape, strides: Shape) -> Shape | None:
    """None when ``strides`` describe a contiguous tensor (axes of size 1 do not count)."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride != expected:
            return strides
        expected *= size
    return None


def is_dense(tensor: Tensor) -> bool:
    """Non-overlapping and dense: some permutation of its axes is contiguous."""
    if tensor.strides is None:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def view_strides(shape: Shape, strides: Shape, new: Shape) -> Shape | None:
    """Strides of a view of another shape, or None if it needs a copy (ATen computeStride)."""
    result = [0] * len(new)
    axis = len(new) - 1
    base, chunk, viewed = strides[-1] if strides else 1, 1, 1
    for old in range(len(shape) - 1, -1, -1):
        chunk *= shape[old]
        if old == 0 or (shape[old - 1] != 1 and strides[old - 1] != chunk * base):
            while axis >= 0 and (viewed < chunk or new[axis] == 1):
                result[axis] = viewed * base
                viewed *= new[axis]
                axis -= 1
            if viewed != chunk:
                return None
            if old > 0:
                base, chunk, viewed = strides[old - 1], 1, 1
    return tuple(result) if axis == -1 else None


def iterator_strides(shape: Shape, operands: list[Tensor]) -> Shape | None:
    """Strides that ATen's TensorIterator gives a fresh output: the operands' order of axes
    (aten/src/ATen/TensorIterator.cpp, reorder_dimensions)."""
    same = [operand for operand in operands if operand.shape == shape]
    if all(operand.strides is None for operand in operands):
        return None
    if len(same) == len(operands) and len({operand.strides for operand in same}) == 1 and is_dense(same[0]):
        return same[0].strides
    rank = len(shape)
    columns = []
    for operand in operands:
        pad = rank - len(operand.shape)
        strides = strides_of(operand)
        columns.append(
            [0] * pad
            + [0 if size == 1 else stride for size, stride in zip(operand.shape, strides, strict=True)]
        )

    def order(first: int, second: int) -> int:
        for column in columns:
            one, two = column[first], column[second]
            if one == 0 or two == 0:
                continue
            if one != two:
                return 1 if one > two else -1
            if shape[first] > shape[second]:
                return 1
        return 0

    permutation = list(range(rank - 1, -1, -1))
    for i in range(1, rank):
        here = i
        for j in range(i - 1, -1, -1):
            comparison = order(permutation[j], permutation[here])
            if comparison > 0:
                permutation[j], permutation[here] = permutation[here], permutation[j]
                here = j
            elif comparison < 0:
                break
    strides_out = [0] * rank
    step = 1
    for axis in permutation:
        strides_out[axis] = step
        step *= shape[axis]
    return normalized(shape, tuple(strides_out))
