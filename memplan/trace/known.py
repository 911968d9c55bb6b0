"""Values that a step's shapes depend on: of whole numbers and truth values which the batch says (where its
images lie, how large they are), and of what follows from them. All other tensors have none."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

_MOST = 1 << 24  # elements that are followed


class Known:
    """The values of tensors without data, as far as they are known."""

    def __init__(self) -> None:
        self._values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __bool__(self) -> bool:
        """Whether any is."""
        return bool(self._values)

    def tell(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """This is the value of a tensor."""
        self._values[tensor] = value

    def number(self, tensor: torch.Tensor) -> Any:
        """The value of a tensor of one element; None if it is not known."""
        value = self._values.get(tensor)
        with torch._C._DisableTorchDispatch():
            return None if value is None else value.item()

    def count(self, tensor: torch.Tensor) -> int | None:
        """How much of a mask is true, or what numbers add up to."""
        value = self._values.get(tensor)
        with torch._C._DisableTorchDispatch():
            return None if value is None else int(value.sum())

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """``out`` is what an operator made of these arguments: its value, if theirs are known."""
        made = [one for one in pytree.tree_leaves(out) if isinstance(one, torch.Tensor)]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        given = [one for one in leaves if isinstance(one, torch.Tensor)]
        if not made or any(one.numel() > _MOST for one in made):
            return
        made_up = not given and any(one.is_floating_point() for one in made)  # of nothing that the batch says
        if made_up or "empty" in func._schema.name or not all(one in self._values for one in given):
            for one in made:
                self._values.pop(one, None)
            return
        real = [self._values[one] if isinstance(one, torch.Tensor) else one for one in leaves]
        real_args, real_kwargs = pytree.tree_unflatten(real, spec)
        with torch._C._DisableTorchDispatch():
            values = func(*real_args, **real_kwargs)
        found = [one for one in pytree.tree_leaves(values) if isinstance(one, torch.Tensor)]
        for one, value in zip(made, found, strict=True):
            self._values[one] = value
