"""Integers are real, floats are imagined: on a card that computes nothing, whole numbers and truth values are
worked out on the host, in the card's memory, which is the host's.

So masks, labels, positions, counters and flags have the values that they have on a GPU, and shapes that
depend on them come out right. Floats are zero wherever somebody asks: a comparison, a number read back.
Where a router chooses among zeros, tokens are spread evenly.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from typing import Any

_MOST = 1 << 22  # elements that are worked out: labels and masks, not packed weights, nor a mask of S × S
_BYTES = 1 << 16  # of them where they are of one byte, as packed weights are
# Their results are as long as values say, by ways of their own: made on the host, and brought to the card.
_FROM_VALUES = (
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave",
    "bincount",
)  # fmt: skip
_CHOICES = ("topk", "sort", "argsort")  # of a router: indices of the largest


def mode(torch: Any) -> Any:
    """A dispatch mode that does so; the thread that trains enters it once, and backward has it, too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    card = ctypes.CDLL(os.path.join(os.environ["MEMPLAN_CARD_LIBRARIES"], "libmemplan_card.so"))
    card.card_values_are_real()
    whole = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    tensor_of = torch.Tensor

    def is_real(tensor: Any) -> bool:
        """Whether its values are worked out."""
        if tensor.dtype not in whole:
            return False
        return bool(tensor.numel() <= (_BYTES if tensor.dtype in (torch.uint8, torch.int8) else _MOST))

    def twin(tensor: Any) -> Any:
        """The same memory, as the host sees it; of floats as many zeros."""
        if not tensor.is_cuda:
            return tensor
        if tensor.is_floating_point() or tensor.is_complex():
            return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        reach = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = (ctypes.c_char * (reach * tensor.element_size())).from_address(tensor.data_ptr())
        return torch.frombuffer(memory, dtype=tensor.dtype, count=reach).as_strided(
            tensor.shape, tensor.stride()
        )

    def on_host(value: Any) -> Any:
        if isinstance(value, tensor_of):
            return twin(value)
        if isinstance(value, (list, tuple)):
            return type(value)(map(on_host, value))
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return value

    def call(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        told = {
            name: on_host(value) for name, value in kwargs.items() if name not in ("pin_memory", "generator")
        }
        return func(*on_host(args), **told)

    def tensors(value: Any) -> Iterable[Any]:
        if isinstance(value, tensor_of):
            yield value
        elif isinstance(value, (list, tuple)):
            for one in value:
                yield from tensors(one)

    def spread(name: str, args: Any, made: Any) -> bool:
        """A choice among imagined numbers: the columns in turn, one row after the other."""
        if name not in _CHOICES or not args[0].is_floating_point():
            return False
        for indices in tensors(made):
            if indices.dtype is torch.int64 and indices.dim() and is_real(indices):
                columns = args[0].shape[-1] if args[0].dim() else 1
                turns = torch.arange(indices.numel()).remainder_(max(columns, 1))
                twin(indices).copy_(turns.view(indices.shape))
        return True

    class Integers(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            given = [*tensors(args), *tensors(list(kwargs.values()))]
            device = kwargs.get("device")
            if not any(one.is_cuda for one in given) and (device is None or "cuda" not in str(device)):
                return func(*args, **kwargs)
            name = func.overloadpacket.__name__
            if name == "_local_scalar_dense" and (args[0].is_floating_point() or args[0].is_complex()):
                return 0.0
            if name in _FROM_VALUES and all(not one.is_floating_point() for one in given):
                place = next(one.device for one in given if one.is_cuda)
                made = call(func, args, kwargs)
                return made.to(place) if isinstance(made, tensor_of) else tuple(one.to(place) for one in made)
            made = func(*args, **kwargs)
            _work_out(func, name, args, kwargs, made)
            return made

    def gathered(func: Any, name: str, args: Any, made: Any) -> bool:
        """What others would send is what this rank sends (memplan_ranks.py)."""
        if "c10d" not in func.namespace:
            return False
        if "gather" in name and "reduce" not in name:
            base = name in ("_allgather_base_", "all_gather_into_tensor")
            sent = [*tensors(args[1] if base and name[0] == "_" else args[0] if base else args[1])]
            places = [made] if name == "all_gather_into_tensor" else [*tensors(args[0])]
            for place in places:
                if sent and place.is_cuda and is_real(place) and sent[0].numel():
                    twin(place).view(-1, sent[0].numel()).copy_(twin(sent[0]).reshape(1, -1))
        return True

    def _work_out(func: Any, name: str, args: Any, kwargs: dict[str, Any], made: Any) -> None:
        if gathered(func, name, args, made):
            return
        returns = func._schema.returns
        results = list(tensors(made))
        if name in ("_to_copy", "copy_") and len(results) == 1 and not results[0].is_cuda:
            source = args[0] if name == "_to_copy" else args[1]
            if source.is_cuda and (source.is_floating_point() or source.is_complex()):
                results[0].zero_()  # what nobody computed is read back as zero
                return
        if not any(one.is_cuda and is_real(one) for one in results):
            return
        alias = returns[0].alias_info if returns else None
        if (alias is not None and not alias.is_write) or name.startswith("empty") or name == "new_empty":
            return  # a view, or memory that nobody has written
        if spread(name, args, made):
            return
        try:
            if alias is not None:  # in place: the twins are written
                call(func, args, kwargs)
                return
            for one, value in zip(results, tensors(call(func, args, kwargs)), strict=True):
                if one.is_cuda and is_real(one):
                    twin(one).copy_(value)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # the host can't: they are zero
            for one in results:
                if alias is None and one.is_cuda and is_real(one):
                    twin(one).zero_()

    return Integers()
