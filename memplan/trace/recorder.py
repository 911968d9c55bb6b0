"""The recorder: every storage's birth and death during a step, written to a tape.

A ``TorchDispatchMode`` sees each operator below autograd, so every output whose storage is new is a birth.
A weak reference to the storage tells its death: PyTorch keeps a storage's Python object alive for exactly
as long as the storage itself (torch/csrc/StorageMethods and PyObjectSlot, torch 2.13), views and saved
tensors included. It works under ``FakeTensorMode`` and around real tensors alike.
"""

from __future__ import annotations

import sys
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import graph as autograd_graph
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.tape import Category, Phase, Tape

StandIn = Callable[..., Any]

_ADD = torch.ops.aten.add.Tensor
_ADD_INPLACE = torch.ops.aten.add_.Tensor
_ENGINE_FRAME = autograd_graph._engine_run_backward.__code__


def _owners(tensor: torch.Tensor) -> tuple[int, int, int]:
    """References to a tensor, to its storage, and to its Python object."""
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return tensor._use_count(), storage, sys.getrefcount(tensor)


def plain_name(name: str) -> str:
    """A module's name without PEFT's wrappers around the model."""
    return "" if name in ("base_model", "base_model.model") else name.removeprefix("base_model.model.")


class Recorder(TorchDispatchMode):
    """Writes a tape while it is active. ``standins`` replace operators whose CUDA kernels allocate otherwise."""

    def __init__(self, tape: Tape, standins: dict[Any, StandIn] | None = None) -> None:
        super().__init__()
        self.tape = tape
        self.standins = standins or {}
        self.paused = 0
        self.indices: dict[int, int] = {}  # storage address -> index on the tape
        self.handles: dict[int, weakref.ref[Any]] = {}
        self.born_in: list[tuple[Phase, bool]] = []  # per storage: phase, and whether in recomputation
        self.died_in: dict[int, tuple[Phase, bool]] = {}
        self.born_by: list[int] = []  # per storage: sequence number of the autograd node that made it
        self.phase = Phase.SETUP
        self.modules: list[str] = []
        # autograd's sequence numbers at which the running module changed: tells a node's module
        self.boundaries: list[int] = []
        self.boundary_modules: list[str] = []
        self.on_module: Callable[[str], None] | None = None
        self.inplace_accumulations = 0
        self.forward_end = 0  # autograd's sequence number when the backward began
        self.head_from: int | None = None  # the first storage born at or after the output layer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch.utils._python_dispatch wraps __torch_dispatch__ in torch._disable_dynamo if this is true:
        # frames and references that we would have to see through, and time.
        return False

    # -- storages --------------------------------------------------------------------------------------

    def born(self, tensor: torch.Tensor, operation: str, category: Category = Category.TEMPORARIES) -> int:
        """Note a tensor's storage unless it is known; its index."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        index = self.indices.get(key)
        if index is not None:
            return index
        index = self.tape.alloc(storage.nbytes(), operation, category)
        self.born_in.append((self.phase, torch.is_grad_enabled()))
        node = torch._C._current_autograd_node() if self.phase is Phase.BACKWARD else None
        self.born_by.append(-1 if node is None else node._sequence_nr())
        self.indices[key] = index

        def died(_: Any, key: int = key, index: int = index) -> None:
            del self.indices[key]
            del self.handles[key]
            self.died_in[index] = (self.phase, torch.is_grad_enabled())
            self.tape.free(index)

        self.handles[key] = weakref.ref(storage, died)
        return index

    def index_of(self, tensor: torch.Tensor) -> int | None:
        """The tape's index of a tensor's storage, if it was noted."""
        return self.indices.get(tensor.untyped_storage()._cdata)

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
        if self.phase is Phase.BACKWARD:
            self._locate()
            if func is _ADD and self._accumulates_in_place(args, kwargs):
                self.inplace_accumulations += 1
                _ADD_INPLACE(*args)
                return args[0]
        standin = self.standins.get(func)
        if standin is not None:
            with self:
                return standin(self, func, *args, **kwargs)
        out = func(*args, **kwargs)
        if not self.paused:
            self._note(out, func._schema.name)
        return out

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
        if sys._getframe(2).f_code is not _ENGINE_FRAME:  # this method, __torch_dispatch__, whoever called
            return False
        dense = torch._prims_common.is_non_overlapping_and_dense_or_false(old)
        return dense and old.dtype == new.dtype and old.shape == new.shape and _owners(old) == _SOLE_OWNER

    # -- where we are ----------------------------------------------------------------------------------

    def _mark(self, module: str) -> None:
        self.boundaries.append(torch._C._autograd._get_sequence_nr())
        self.boundary_modules.append(module)
        self._arrive(module)

    def _arrive(self, module: str) -> None:
        if module != self.tape.module:
            self.tape.module = module
            if self.on_module is not None:
                self.on_module(module)

    def _locate(self) -> None:
        """In backward: the module whose forward made the node that is running."""
        if self.modules:  # recomputing
            return
        node = torch._C._current_autograd_node()
        if node is None:
            return
        number = node._sequence_nr()
        position = bisect_right(self.boundaries, number) - 1
        # AccumulateGrad nodes carry the largest number there is: they stay where they run.
        if position >= 0 and number < 1 << 62:
            self._arrive(self.boundary_modules[position])

    @contextmanager
    def follow(self, model: torch.nn.Module) -> Iterator[None]:
        """Name the running module of ``model`` on the tape while the context lasts."""
        names = {module: plain_name(name) for name, module in model.named_modules()}
        stack = self.modules

        def enter(module: torch.nn.Module, _args: Any) -> None:
            name = names.get(module)
            if name is not None:
                stack.append(name)
                self._mark(name)
                if name == "lm_head" and self.head_from is None:
                    self.head_from = len(self.tape.sizes)

        def leave(module: torch.nn.Module, _args: Any, _out: Any) -> None:
            name = names.get(module)
            if name is not None and name in stack:
                while stack.pop() != name:
                    pass
                self._mark(stack[-1] if stack else "")

        hooks = torch.nn.modules.module
        # always_call: non-reentrant checkpointing leaves a recomputation by raising.
        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, phase: Phase, name: str, layer: int | None = None) -> None:
        """Open the tape's next segment."""
        if phase is Phase.BACKWARD and self.phase is Phase.FORWARD:
            self.forward_end = torch._C._autograd._get_sequence_nr()
        self.phase = phase
        self.tape.begin(phase, name, layer)

    def stop(self) -> None:
        """Forget all storages: what dies later is no part of the tape."""
        self.handles.clear()
        self.indices.clear()

    def gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Storages that are parameters' gradients now are in the category of gradients."""
        for parameter in parameters:
            if parameter.grad is not None:
                index = self.index_of(parameter.grad)
                if index is not None:
                    self.tape.categories[index] = Category.GRADIENTS


def _sole_owner() -> tuple[int, int, int]:
    """What ``_owners`` says of a gradient that only the engine holds, measured on a graph where that is so."""
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


@contextmanager
def record(standins: dict[Any, StandIn] | None = None) -> Iterator[Recorder]:
    """Record whatever runs inside: ``with record() as recorder: ...``; the tape is ``recorder.tape``."""
    recorder = Recorder(Tape(provenance="traced"), standins)
    recorder.begin(Phase.SETUP, "setup")
    with recorder:
        yield recorder
    recorder.tape.finish()
