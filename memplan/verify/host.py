"""Training on a CPU, with the storages counted that CUDA's code would make.

A CPU's kernels allocate otherwise than CUDA's: they keep no log-sum-exp of attention, want other scratch,
save other things for backward. So an operator that the tracer has a stand-in for is run twice: the stand-in
makes, as real storages, what the CUDA kernel would make; then the CPU's kernel computes the result, which is
copied into the stand-in's output. The numbers are the training's own, the storages are real and counted while
they live. What is *not* seen: scratch inside the CPU's own kernels, and whether CUDA does what the stand-ins
say it does. Only a GPU can show that.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from memplan.asked.recipe import Recipe
from memplan.cuda.card import Card
from memplan.tape import Category, Phase, Tape, replay
from memplan.tape.categories import Moment, categorise
from memplan.trace import existing, standins
from memplan.trace.layers import Segments
from memplan.trace.recorder import Recorder, StandIn
from memplan.trace.sharded import followed
from memplan.trace.step import train_step
from memplan.verify import attention
from memplan.verify.measurement import Step

aten = torch.ops.aten
Values = Callable[..., Any]

# -- operators that CPUs have no kernel for ----------------------------------------------------------------


def _attention_values(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
    dropout, causal = (*rest[:2], *(0.0, False)[len(rest) :])[:2]
    return attention.forward(query, key, value, None, dropout, causal, named.get("scale"))[:1]


def _attention_gradients(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
    # out, logsumexp, two sequence tables, two lengths, then dropout and causal
    return attention.backward(grad, query, key, value, None, rest[6], rest[7], named.get("scale"))


def _efficient_values(
    query: Any, key: Any, value: Any, bias: Any, _lse: bool, dropout: float = 0.0, causal: bool = False,
    scale: float | None = None,
) -> Any:  # fmt: skip
    return attention.forward(query, key, value, bias, dropout, causal, scale)[:1]


def _efficient_gradients(
    grad: Any, query: Any, key: Any, value: Any, bias: Any, _out: Any, _lse: Any, _seed: Any, _offset: Any,
    dropout: float, _mask: Any, causal: bool = False, scale: float | None = None,
) -> Any:  # fmt: skip
    return attention.backward(grad, query, key, value, bias, dropout, causal, scale)


def _softmax(recorder: Any, x: Any, dim: int, half_to_float: bool) -> Any:
    return torch.empty_like(x, dtype=torch.float32 if half_to_float else x.dtype)


def _log_softmax_backward(recorder: Any, grad: Any, output: Any, dim: int, input_dtype: torch.dtype) -> Any:
    return torch.empty_like(grad, dtype=input_dtype)


def _of_fp32(overload: Any) -> Values:
    return lambda x, dim, half_to_float: overload(x.float() if half_to_float else x, dim, False)


def _in_own_dtype(overload: Any) -> Values:
    return lambda grad, output, dim, _dtype: overload(grad, output, dim, grad.dtype)


# CUDA converts in these kernels between fp16 and fp32, CPUs refuse to: one output, as on CUDA.
_CONVERTING: dict[Any, StandIn] = {
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
}
STANDINS: dict[Any, StandIn] = {**standins.OPERATORS, **_CONVERTING}

# How values are computed where the CPU's own kernel of that name can't do it.
VALUES: dict[Any, Values] = {
    aten._scaled_dot_product_flash_attention.default: _attention_values,
    aten._scaled_dot_product_flash_attention_backward.default: _attention_gradients,
    aten._scaled_dot_product_efficient_attention.default: _efficient_values,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_gradients,
    aten._softmax.default: _of_fp32(aten._softmax.default),
    aten._log_softmax.default: _of_fp32(aten._log_softmax.default),
    aten._softmax_backward_data.default: _in_own_dtype(aten._softmax_backward_data.default),
    aten._log_softmax_backward_data.default: _in_own_dtype(aten._log_softmax_backward_data.default),
}


class HostRecorder(Recorder):
    """A recorder whose stand-ins' results have values."""

    def __init__(self, tape: Tape, card: Card) -> None:
        super().__init__(tape, STANDINS, card)
        self._inside = False  # a stand-in: what it calls need not be computed
        self._late: list[int] = []  # was there before the step, and nobody had seen it
        self.reducing = False  # whether DDP's C++ is there, which has storages that no name reaches

    def _born(self, storage: torch.UntypedStorage, operation: str, category: Category) -> int | None:
        # DTensor finds out with tensors that have none how a result would lie
        return None if storage.device.type == "meta" else super()._born(storage, operation, category)

    def _counts(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not self.reducing or func not in _REDUCERS:
            return True
        there = kwargs.get("out", args[0])
        if self.index_of(there) is not None:
            return True
        if func in _ON_HOST:
            return False
        index = self.born(there, "bucket", Category.COMMUNICATION)
        self._late += [] if index is None else [index]
        return True

    def finish(self) -> None:
        """Also puts what was there all the time before the step."""
        tape = self.tape
        tape.finish()
        first = next(number for number, s in enumerate(tape.segments) if s.phase is not Phase.SETUP)
        for index in self._late:
            position = tape.events.index(index)
            tape.events.insert(tape.segments[first].start, tape.events.pop(position))
            for before, segment in pairwise(tape.segments[first - 1 :]):
                if segment.start <= position:
                    before.stop = segment.start = segment.start + 1
            tape.modules[index] = "ddp"
            self.births[index] = Moment(Phase.SETUP, False, False)
        super().finish()

    def _stand_in(self, standin: StandIn, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._inside:
            return super()._stand_in(standin, func, args, kwargs)
        self._inside = True
        try:
            out = super()._stand_in(standin, func, args, kwargs)
        finally:
            self._inside = False
        # the mode is off here: nothing that this allocates is noted
        _fill(out, VALUES.get(func, func)(*args, **kwargs))
        return out


def _fill(out: Any, values: Any) -> None:
    """Copy results into a stand-in's outputs; values may be fewer, the rest is read by nobody."""
    if isinstance(out, torch.Tensor):
        out.copy_(values)
    elif isinstance(out, tuple | list):
        for place, value in zip(out, values, strict=False):
            if isinstance(place, torch.Tensor) and value is not None:
                _fill(place, value)


# What DDP's reducer does with what it keeps (torch/csrc/distributed/c10d/reducer.cpp, 2.13): gradients go
# into buckets; where parameters may be unused, those used are noted on the host, which is copied to the card.
_ON_HOST = (aten.select.int, aten.fill_.Scalar)
_REDUCERS = (aten.mul.out, aten.copy_.default, *_ON_HOST)


# -- the backend -------------------------------------------------------------------------------------------


class Host:
    """Steps on a CPU: every one is recorded; :attr:`tape` is the last one's."""

    device = torch.device("cpu")

    def __init__(self, card: Card | None = None) -> None:
        self.card = card or Card()
        self.tape: Tape | None = None
        self.number = 0
        self._recorder: HostRecorder | None = None

    @contextmanager
    def environment(self) -> Iterator[None]:
        """CUDA's rules, in force from the making of the optimizer to the last step."""
        with standins.in_force(self.card, data=True):
            yield

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is allocated inside is no part of the step."""
        if self._recorder is None:
            yield
        else:
            with self._recorder.pause():
                yield

    def step(
        self,
        number: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: dict[str, torch.Tensor],
        recipe: Recipe,
        last: bool,
    ) -> tuple[torch.Tensor, Step]:
        """Train one step; its loss and what it took."""
        self.number = number
        with recorded(self.card, model, optimizer, batch) as recorder:
            self._recorder = recorder
            loss = train_step(model, optimizer, batch, recipe, recorder)
        self._recorder = None
        self.tape = recorder.tape
        return loss, Step(
            number=number,
            allocated_bytes=replay(self.tape).allocated_bytes,
            resting_bytes=sum(self.tape.deltas),
        )


@contextmanager
def recorded(
    card: Card, model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Any
) -> Iterator[HostRecorder]:
    """Record what happens inside, from what is there already on. Needs :meth:`Host.environment`."""
    recorder = HostRecorder(Tape(provenance="measured"), card)
    existing.note_module(recorder, model)
    if optimizer is not None:
        existing.note_optimizer(recorder, optimizer)
    existing.note_batch(recorder, batch)
    recorder.on_module = Segments(recorder)
    # Nothing that a step leaves waits for the garbage collector, which would come at an arbitrary moment.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with recorder, recorder.follow(model), followed(recorder):
            yield recorder
    finally:
        if collecting:
            gc.enable()
    recorder.finish()
    categorise(recorder)
