"""Integers are real, floats are imagined: on a card that computes nothing, whole numbers and truth values are
worked out on the host, in the card's memory, which is the host's.

So masks, labels, positions, counters and flags have the values that they have on a GPU, and shapes that
depend on them come out right. Floats are zero wherever somebody asks: a comparison, a number read back.
Where a router chooses among zeros, tokens are spread evenly, or as unevenly as they can be.

It stands at the functions that Python calls, above autograd: a dispatch mode below it would make PyTorch take
every tensor for a subclass's, and add gradients up out of place, which takes memory.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import memplan_zeros

_MOST = 1 << 22  # elements that are worked out: labels and masks, not packed weights, nor a mask of S × S
_BYTES = 1 << 16  # of them where they are of one byte, as packed weights are
# Their results are as long as values say, by ways of their own: made on the host, and brought to the card.
_FROM_VALUES = ("unique", "unique_consecutive", "bincount")
_CHOICES = ("topk", "sort", "argsort")  # of a router: indices of the largest
_RANDOM = (
    "randint", "randint_like", "randperm", "random_", "bernoulli", "bernoulli_", "geometric_", "poisson",
    "multinomial",
)  # fmt: skip
# What gives Python a value, and no tensor.
_READ = (
    "item", "tolist", "numpy", "equal", "is_nonzero", "allclose", "__bool__", "__int__", "__float__",
    "__index__", "__contains__", "__complex__",
)  # fmt: skip
# Attributes, and memory that nobody has written.
_LEFT = (
    "__get__", "__set__", "empty", "empty_like", "new_empty", "empty_strided", "data_ptr", "requires_grad_",
    "backward", "size", "stride", "dim", "numel", "__len__", "__repr__", "__format__", "register_hook",
    "untyped_storage", "is_floating_point", "element_size", "detach", "detach_", "storage_offset",
)  # fmt: skip


def start(torch: Any, *, skewed: bool = False) -> None:
    """Work them out from now on, in this thread, in those that it starts, and in backward's.
    ``skewed``: routers send every token to the first of their choices."""
    card = ctypes.CDLL(os.path.join(os.environ["MEMPLAN_CARD_LIBRARIES"], "libmemplan_card.so"))
    card.card_values_are_real()
    mode = _mode(torch, skewed)
    mode().__enter__()
    begin = getattr(threading.Thread, "_bootstrap_inner")  # noqa: B009  # calls run(), which classes override

    def beginning(thread: threading.Thread) -> None:
        with mode():
            begin(thread)

    setattr(threading.Thread, "_bootstrap_inner", beginning)  # noqa: B010  # of somebody else's class
    engine = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        """Tensor.backward and autograd.grad are functions that a mode stands at, so it is off inside of them,
        and would be for what is recomputed there."""
        if any(isinstance(one, mode) for one in torch.overrides._get_current_function_mode_stack()):
            return engine(*args, **kwargs)
        with mode():
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = backward
    torch.compile = _compiling(torch, mode)


def _compiling(torch: Any, mode: Any) -> Callable[..., Any]:
    """torch.compile, whose code nobody stands at: it would be compiled into it, or break it in parts."""
    from functools import wraps

    compile_, modules = torch.compile, torch.nn.modules.module
    hooks = [
        getattr(modules, name) for name in dir(modules) if name.startswith("_global_") and "hooks" in name
    ]
    hooks = [one for one in hooks if isinstance(one, dict)]

    def alone(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def calling(*args: Any, **kwargs: Any) -> Any:
            stack = torch.overrides._get_current_function_mode_stack()
            if not any(isinstance(one, mode) for one in stack):
                return call(*args, **kwargs)
            kept = [dict(one) for one in hooks]
            for one in hooks:
                one.clear()
            for _ in stack:
                torch.overrides._pop_mode()
            for one in stack:
                if not isinstance(one, mode):
                    torch.overrides._push_mode(one)
            try:
                return call(*args, **kwargs)
            finally:
                for one in stack:
                    if not isinstance(one, mode):
                        torch.overrides._pop_mode()
                for one in stack:
                    torch.overrides._push_mode(one)
                for one, was in zip(hooks, kept, strict=True):
                    one.update(was)

        return calling

    @wraps(compile_)
    def compiling(model: Any = None, *args: Any, **kwargs: Any) -> Any:
        if model is None:
            return lambda model: compiling(model, *args, **kwargs)
        made = compile_(model, *args, **kwargs)
        if not isinstance(made, torch.nn.Module):
            return alone(made)
        made.forward = alone(made.forward)
        return made

    return compiling


def values(torch: Any, tensor: Any) -> Any:
    """A tensor's values, to be read and written on the host; None if they are imagined."""
    is_real, twin, _ = _memory(torch)
    tensor = _own(tensor)
    if not tensor.is_cuda:
        return tensor
    return twin(tensor) if is_real(tensor) else None


def _along(name: str, args: Any, kwargs: dict[str, Any]) -> int:
    """The dimension of a choice: ``topk(x, k, dim)``, ``sort(x, dim)``."""
    at = 2 if name == "topk" else 1
    given = kwargs.get("dim", args[at] if len(args) > at else -1)
    return given if type(given) is int else -1


def _own(tensor: Any) -> Any:
    """Itself, or what has its memory: of what is sharded (DTensor) this rank's part, of what a collective is
    bringing its result."""
    while _is_made_of_others(tensor):
        part = getattr(tensor, "_local_tensor", getattr(tensor, "elem", None))
        if part is None:
            break
        tensor = part
    return tensor


def _is_made_of_others(tensor: Any) -> bool:
    """Whether it wraps tensors, and has no memory of its own."""
    return hasattr(type(tensor), "__tensor_flatten__")


def _memory(torch: Any) -> tuple[Callable[[Any], bool], Callable[[Any], Any], Callable[[Any], Any]]:
    """Which tensors are worked out; the same memory as the host sees it; the same of whatever holds some."""
    whole = {torch.bool, torch.int16, torch.int32, torch.int64, torch.uint8, torch.int8}
    whole |= {getattr(torch, name) for name in ("uint16", "uint32", "uint64") if hasattr(torch, name)}
    tensor_of = torch.Tensor

    def is_real(tensor: Any) -> bool:
        tensor = _own(tensor)
        if tensor.dtype not in whole or tensor.layout is not torch.strided:
            return False
        return bool(tensor.numel() <= (_BYTES if tensor.dtype in (torch.uint8, torch.int8) else _MOST))

    def twin(tensor: Any) -> Any:
        tensor = _own(tensor)
        if not tensor.is_cuda or tensor.layout is not torch.strided:
            return tensor
        if tensor.is_floating_point() or tensor.is_complex():  # as many zeros
            return torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        reach = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = (ctypes.c_char * (reach * tensor.element_size())).from_address(tensor.data_ptr())
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=reach)
        return flat.as_strided(tensor.shape, tensor.stride())

    def on_host(value: Any) -> Any:
        if isinstance(value, tensor_of):
            return twin(value)
        if isinstance(value, (list, tuple)):
            many = [on_host(one) for one in value]
            return many if isinstance(value, list) else tuple(many)
        if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
            return torch.device("cpu")
        return value

    return is_real, twin, on_host


def _mode(torch: Any, skewed: bool) -> Any:
    from torch.overrides import TorchFunctionMode

    is_real, twin, on_host = _memory(torch)
    tensor_of, wrapped = torch.Tensor, torch._C._functorch.is_functorch_wrapped_tensor
    dispatch_mode, fakes = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.FAKE

    def call(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        left = ("pin_memory", "generator", "non_blocking")
        told = {name: on_host(value) for name, value in kwargs.items() if name not in left}
        with torch.no_grad(), ExitStack() as around:
            if getattr(func, "__name__", "") in _RANDOM:  # by the card's generator, not the host's
                around.enter_context(torch.random.fork_rng(devices=()))
            if by_default():
                around.enter_context(torch.device("cpu"))
            return func(*on_host(args), **told)

    def by_default() -> bool:
        """Whether torch.set_default_device has named the card, in a mode below this one."""
        context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
        return context is not None and context.device.type == "cuda"

    def tensors(value: Any) -> Iterable[Any]:
        if isinstance(value, tensor_of):
            yield _own(value)
        elif isinstance(value, (list, tuple)):
            for one in value:
                yield from tensors(one)

    def spread(name: str, args: Any, kwargs: dict[str, Any], results: list[Any]) -> bool:
        """A choice among imagined numbers: the columns in turn, one row after the other, or the first ones
        in each row."""
        if name not in _CHOICES or not args[0].is_floating_point():
            return False
        for indices in results:
            if indices.dtype is torch.int64 and indices.dim() and is_real(indices):
                along = _along(name, args, kwargs) % indices.dim()
                columns = args[0].shape[along] if args[0].dim() else 1
                chosen = indices.shape[along] if skewed else columns
                turns = torch.arange(indices.numel(), device="cpu").remainder_(max(chosen, 1))
                place = twin(indices).movedim(along, -1)
                place.copy_(turns.view(place.shape))
        return True

    class Integers(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            if name in _LEFT or (getattr(func, "__module__", None) or "").startswith("torch.distributed"):
                return func(*args, **kwargs)
            if dispatch_mode(fakes) is not None:  # of what is compiled: nobody has memory
                return func(*args, **kwargs)
            given = [*tensors(args), *tensors(list(kwargs.values()))]
            if not any(one.is_cuda for one in given) and "cuda" not in str(kwargs.get("device", "")):
                if name in memplan_zeros.CONVERSIONS and args:
                    zeros = memplan_zeros.converted(torch, func, args, kwargs)
                    if zeros is not None:
                        return zeros
                made = func(*args, **kwargs)
                if name in ("to", "cuda") and isinstance(made, tensor_of) and made.is_cuda and is_real(made):
                    twin(made).copy_(args[0])  # as large as it may be
                elif by_default() and any(one.is_cuda for one in tensors(made)):
                    work_out(func, name, args, kwargs, made, given)
                return made
            if any(
                wrapped(one) or _is_made_of_others(one) or one.layout is not torch.strided for one in given
            ):
                return func(*args, **kwargs)  # vmap's, sparse ones: no memory of their own to be read
            if name in _READ:
                return call(func, args, kwargs)
            if name in _FROM_VALUES and not any(one.is_floating_point() for one in given):
                place = next(one.device for one in given if one.is_cuda)
                made = call(func, args, kwargs)
                return made.to(place) if isinstance(made, tensor_of) else tuple(one.to(place) for one in made)
            if name == "one_hot" and kwargs.get("num_classes", args[1] if len(args) > 1 else -1) == -1:
                args, kwargs = args[:1], {**kwargs, "num_classes": int(twin(args[0]).max()) + 1}
            if name == "repeat_interleave" and kwargs.get("output_size") is None:
                repeats = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
                if isinstance(repeats, tensor_of) and repeats.is_cuda and repeats.dim():
                    kwargs = {**kwargs, "output_size": int(twin(repeats).sum())}
            made = func(*args, **kwargs)
            work_out(func, name, args, kwargs, made, given)
            return made

    def work_out(
        func: Any, name: str, args: Any, kwargs: dict[str, Any], made: Any, given: list[Any]
    ) -> None:
        results = list(tensors(made))
        if len(results) == 1 and not results[0].is_cuda:  # read back to the host
            source = next((one for one in given if one.is_cuda), None)
            if source is not None and source.numel() == results[0].numel() and name in ("cpu", "to", "copy_"):
                results[0].detach().copy_(twin(source).reshape(results[0].shape))
            return
        if name == "__setitem__" and not is_real(args[0]):
            return  # floats, at places that whole numbers say
        inside = "out" in kwargs or made is None or any(_own(made) is one for one in given)
        places = [one for one in given if one.is_cuda and is_real(one)] if inside else results
        if not any(one.is_cuda and is_real(one) for one in places):
            return
        if spread(name, args, kwargs, results):
            return
        known = {one.untyped_storage().data_ptr() for one in given if one.is_cuda}
        fresh = [one for one in results if one.is_cuda and one.untyped_storage().data_ptr() not in known]
        if not inside and not fresh:
            return  # views
        try:
            if inside:  # in place: the twins are written
                if made is not None and not is_real(results[0]):
                    return
                call(func, args, kwargs)
                return
            for one, value in zip(results, tensors(call(func, args, kwargs)), strict=True):
                if one.is_cuda and is_real(one):
                    twin(one).copy_(value)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):  # the host can't: zero
            for one in fresh if not inside else ():
                if is_real(one):
                    twin(one).zero_()

    return Integers
