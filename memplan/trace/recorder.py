"""The recorder: every storage's birth and death during a step, written to a tape.

A ``TorchDispatchMode`` sees each operator below autograd, so every output whose storage is new is a birth.
A weak reference to the storage tells its death: PyTorch keeps a storage's Python object alive for exactly
as long as the storage itself, views and saved tensors included (so in torch 2.13; tests/test_trace.py
compares with what its allocator does). It works under ``FakeTensorMode`` and around real tensors alike.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import graph as autograd_graph
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.cuda.card import Card
from memplan.errors import TraceError
from memplan.tape import Category, Phase, Tape
from memplan.tape.categories import Moment
from memplan.trace.follower import Follower
from memplan.trace.known import Known

StandIn = Callable[..., Any]

_ADD = torch.ops.aten.add.Tensor
_ADD_INPLACE = torch.ops.aten.add_.Tensor
_LOCAL_SCALAR = torch.ops.aten._local_scalar_dense.default
# Formulas in torch/csrc/autograd/FunctionsManual.cpp that work in place on zeros they made, but out of place
# while a dispatch mode is on (areAnyTensorSubclassLike): index_backward, gather's and the selecting
# reductions' backward.
_IN_PLACE_FORMULAS = {
    torch.ops.aten.index_put.default: torch.ops.aten.index_put_.default,
    torch.ops.aten.scatter.src: torch.ops.aten.scatter_.src,
    torch.ops.aten.scatter_add.default: torch.ops.aten.scatter_add_.default,
}
_LIFT = torch.ops.aten.lift_fresh.default  # what torch.tensor(number) ends in: a tensor on the host
_ENGINE_FRAME = autograd_graph._engine_run_backward.__code__


def _puts(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether values are put, not added: that is ``index_put``'s own backward, which copies."""
    return func is torch.ops.aten.index_put.default and not (len(args) > 3 and args[3])


def _owners(tensor: torch.Tensor) -> tuple[int, int, int]:
    """References to a tensor, to its storage, and to its Python object."""
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return tensor._use_count(), storage, sys.getrefcount(tensor)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor that is spread over several."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plain_operation(name: str) -> str:
    """``aten::mm`` is known as ``mm``."""
    return name.rpartition("::")[2]


class Recorder(Follower, TorchDispatchMode):
    """Writes a tape while it is active.

    ``standins`` replace operators whose CUDA kernels allocate otherwise, unless they return NotImplemented;
    ``card`` is what they look up; ``answers`` are values of fake tensors, by the name of the function that
    asks for one; ``known``: values of those that have some.
    """

    def __init__(
        self,
        tape: Tape,
        standins: dict[Any, StandIn] | None = None,
        card: Card | None = None,
        answers: dict[str, Any] | None = None,
    ) -> None:
        Follower.__init__(self, tape, card)
        TorchDispatchMode.__init__(self)
        self.standins = standins or {}
        self.answers = answers or {}
        self.known = Known()
        self.paused = 0
        self.device: str | None = None  # the only kind of device that counts, if set
        self.births: list[Moment] = []  # one for each storage on the tape
        self.deaths: dict[int, Moment] = {}
        self.inplace_accumulations = 0
        self._indices: dict[int, int] = {}  # storage address -> index on the tape
        self._handles: dict[int, weakref.ref[Any]] = {}
        self._operation = ""  # the operator that a stand-in is standing in for
        self._category = Category.TEMPORARIES  # of what is born

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch.utils._python_dispatch wraps __torch_dispatch__ in torch._disable_dynamo if this is true:
        # frames and references that we would have to see through, and time.
        return False

    # -- storages --------------------------------------------------------------------------------------

    def born(self, tensor: torch.Tensor, operation: str, category: Category | None = None) -> int | None:
        """Note a tensor's storage unless it is known; its index. Nothing is noted of an empty one, nor of one
        that is elsewhere."""
        tensor = own_part(tensor)
        if self.device is not None and tensor.device.type != self.device:
            return None
        return self._born(tensor.untyped_storage(), operation, category or self._category)

    def _born(self, storage: torch.UntypedStorage, operation: str, category: Category) -> int | None:
        key = storage._cdata
        index = self._indices.get(key)
        if index is not None:
            return index
        nbytes = storage.nbytes()
        if not nbytes:
            return None
        index = self._indices[key] = self.reserve(nbytes, operation, category)

        def died(_: Any, key: int = key, index: int = index) -> None:
            del self._indices[key]
            del self._handles[key]
            self.deaths[index] = self._now()
            self.tape.free(index)

        self._handles[key] = weakref.ref(storage, died)
        return index

    def reserve(self, nbytes: int, operation: str, category: Category, *, workspace: bool = False) -> int:
        """Note memory that no tensor stands for; its index."""
        self.births.append(self._now())
        return self.tape.alloc(nbytes, operation, category, workspace=workspace)

    def index_of(self, tensor: torch.Tensor) -> int | None:
        """The tape's index of a tensor's storage, if it was noted."""
        return self._indices.get(own_part(tensor).untyped_storage()._cdata)

    def resized(self, storage: torch.UntypedStorage, before: int) -> None:
        """A storage that had ``before`` bytes has others now: what it had is gone, what it has is new."""
        if self.paused or storage.nbytes() == before:
            return
        index = self._indices.pop(storage._cdata, None)
        if index is not None:
            del self._handles[storage._cdata]
            self.deaths[index] = self._now()
            self.tape.free(index)
        self._born(storage, self._operation or "resize_", self._category)

    @contextmanager
    def named(self, operation: str) -> Iterator[None]:
        """Births inside are this operation's."""
        outer = self._operation
        self._operation = outer or operation
        try:
            yield
        finally:
            self._operation = outer

    @contextmanager
    def of(self, category: Category) -> Iterator[None]:
        """Births inside are of this category."""
        outer, self._category = self._category, category
        try:
            yield
        finally:
            self._category = outer

    def is_of(self, tensors: Iterable[torch.Tensor], category: Category) -> None:
        """What they lie in is of this category after all."""
        for tensor in tensors:
            index = self.index_of(tensor)
            if index is not None:
                self.tape.categories[index] = category

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Births inside are not noted (what happens on the host, or outside the step)."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    # -- operators -------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if types and any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls operators of what this rank has, which come here again
        if self.phase is Phase.BACKWARD:
            self._locate()
            if func is _ADD and self._accumulates_in_place(args, kwargs):
                self.inplace_accumulations += 1
                _ADD_INPLACE(*args)
                return args[0]
            if func in _IN_PLACE_FORMULAS and self._called_by_engine() and not _puts(func, args):
                func = _IN_PLACE_FORMULAS[func]
        if func is _LOCAL_SCALAR:
            return self._answer(func, args)
        standin = self.standins.get(func)
        if standin is not None:
            out = self._stand_in(standin, func, args, kwargs)
            if out is not NotImplemented:
                if self.known:
                    self._known(func, args, kwargs, out)
                return out
        counts = not self.paused and func is not _LIFT and self._counts(func, args, kwargs)
        out = func(*args, **kwargs)
        if counts:
            self._note(out, self._operation or plain_operation(func._schema.name))
        if self.known:
            self._known(func, args, kwargs, out)
        return out

    def _known(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func is _LIFT:
            self.known.tell(out, args[0])
        else:
            self.known.follow(func, args, kwargs, out)

    def _counts(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether what an operator returns is noted."""
        return True

    def _stand_in(self, standin: StandIn, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.named(plain_operation(func._schema.name)), self:
            return standin(self, *args, **kwargs)

    def _note(self, out: Any, operation: str) -> None:
        if isinstance(out, torch.Tensor):
            self.born(out, operation)
        elif isinstance(out, (tuple, list)):
            for item in out:
                self._note(item, operation)

    def _accumulates_in_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this addition is the engine's own, into a gradient that nothing else holds.

        ``accumulate`` (torch/csrc/autograd/input_buffer.cpp) adds in place if it holds the last reference
        to a dense gradient, but never while a dispatch mode is on: ``isTensorSubclassLike`` is then true
        of every tensor. A run without a mode does add in place, so the tape must.
        """
        if kwargs or len(args) != 2 or torch.is_grad_enabled():
            return False
        old, new = args
        if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
            return False
        if not self._called_by_engine(3):
            return False
        dense = torch._prims_common.is_non_overlapping_and_dense_or_false(old)
        return dense and old.dtype == new.dtype and old.shape == new.shape and _owners(old) == _SOLE_OWNER

    @staticmethod
    def _called_by_engine(depth: int = 2) -> bool:
        """Whether C++ code of the autograd engine called the operator: no Python function in between.
        ``depth`` counts this method, its callers in this class, and ``__torch_dispatch__``."""
        return sys._getframe(depth).f_code is _ENGINE_FRAME

    def _answer(self, func: Any, args: tuple[Any, ...]) -> Any:
        """The value of a tensor without one, where we know what the function that asks would find."""
        value = self.known.number(args[0])
        if value is not None:
            return value
        caller = sys._getframe(2).f_code.co_name
        if isinstance(args[0], FakeTensor):
            if caller in self.answers:
                return self.answers[caller]
            where = f"{sys._getframe(2).f_code.co_filename}:{sys._getframe(2).f_lineno}"
            raise TraceError(
                f"{self.tape.module or 'the model'} asks for the value of a tensor in {caller} ({where}), "
                "which a trace without data can't answer"
            )
        return func(*args)

    # -- the end ---------------------------------------------------------------------------------------

    def place_of(self, error: BaseException) -> str:
        """Where an error came from, as the end of a sentence: the operator, the module, the phase."""
        operation = ""
        traceback = error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code is Recorder.__torch_dispatch__.__code__:
                operation = f" at {plain_operation(traceback.tb_frame.f_locals['func']._schema.name)}"
            traceback = traceback.tb_next
        module = self._failure[1] if self._failure[0] is error else self.tape.module
        phase = "" if self.phase is Phase.SETUP else f" ({self.phase.value})"
        return f"{operation}{f' in {module}' if module else ''}{phase}"

    def finish(self) -> None:
        """Close the tape and forget all storages: what dies later is no part of it."""
        self.tape.finish()
        self._handles.clear()
        self._indices.clear()

    def gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Storages that are parameters' gradients now are in the category of gradients."""
        self.is_of((p.grad for p in parameters if p.grad is not None), Category.GRADIENTS)


def _sole_owner() -> tuple[int, int, int]:
    """What ``_owners`` says of a gradient that only the engine holds: measured where that is so."""
    seen: list[tuple[int, int, int]] = []

    class Probe(Recorder):
        def _accumulates_in_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
            old, new = args
            seen.append(_owners(old))
            return False

    probe = Probe(Tape())
    with torch.enable_grad(), probe:
        leaf = torch.ones(4, requires_grad=True)
        x = leaf * 2
        probe.phase = Phase.BACKWARD
        # two unrelated gradients for x, each made by its own node and held by nobody else
        (x.sin() * x.cos()).sum().backward()
    return seen[-1]


_SOLE_OWNER = _sole_owner()
