"""FSDP2 as the recorder sees it: parameters whose storages are resized, lists that are split or laid end to
end (torch/distributed/fsdp/_fully_shard, 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.distributed.distributed_c10d import Work
from torch.distributed.fsdp._fully_shard import _fsdp_param_group  # with it come the operators below
from torch.nn.parallel import DistributedDataParallel

from memplan.cuda import lists
from memplan.tape import Category
from memplan.trace.operators import operator, workspace

fsdp = torch.ops.fsdp


@operator(fsdp.split_with_sizes_copy.default)
def split_with_sizes_copy(
    recorder: Any, whole: torch.Tensor, sizes: Sequence[int], dim: int = 0, *, out: list[torch.Tensor]
) -> None:
    """Out of the gathered bytes of all ranks, into each parameter."""
    chunks = [size * whole.itemsize for size in sizes]
    _held = workspace(lists.split_copy(chunks, whole.shape[0], recorder.card))


@operator(fsdp.chunk_cat.default)
def chunk_cat(
    recorder: Any, tensors: Sequence[torch.Tensor], dim: int, num_chunks: int, *, out: torch.Tensor
) -> None:
    """Gradients, laid end to end a rank; those of 16 bits that are summed in other 16 bits are cast first."""
    chunks = [-(-tensor.shape[0] // num_chunks) * tensor[0].numel() * out.itemsize for tensor in tensors]
    _held = workspace(lists.chunk_cat(chunks))


@contextmanager
def followed(recorder: Any) -> Iterator[None]:
    """Tell of storages that are resized, which is no operator, and which ones are there for the other ranks:
    what is gathered, and what gradients are laid end to end in."""
    resize = torch.UntypedStorage.resize_

    def told(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        before = storage.nbytes()
        resize(storage, size)
        recorder.resized(storage, before)
        return storage

    def shared(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with recorder.of(Category.COMMUNICATION):
                return function(*args, **kwargs)

        return wrapped

    def reduce(parameters: Any, gradients: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        recorder.is_of(gradients, Category.GRADIENTS)
        reduced = foreach_reduce(parameters, gradients, *args, **kwargs)
        recorder.gradients(parameter.sharded_param for parameter in parameters)
        return reduced

    wait = Work.wait

    def waited(work: Any, *args: Any, **kwargs: Any) -> Any:
        with recorder.pause():  # gloo ends some of its work here, with copies of its own
            return wait(work, *args, **kwargs)

    foreach_reduce = shared(_fsdp_param_group.foreach_reduce)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", told))
        stack.enter_context(mock.patch.object(Work, "wait", waited))
        for name in ("foreach_all_gather", "foreach_all_gather_copy_out"):
            function = shared(getattr(_fsdp_param_group, name))
            stack.enter_context(mock.patch.object(_fsdp_param_group, name, function))
        stack.enter_context(mock.patch.object(_fsdp_param_group, "foreach_reduce", reduce))
        # where buckets are made again after the first step
        before = shared(DistributedDataParallel._pre_forward)
        stack.enter_context(mock.patch.object(DistributedDataParallel, "_pre_forward", before))
        yield
