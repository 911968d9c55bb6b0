"""Where a step is: which module runs, in which phase and segment, before or past the output layer.

It watches modules' forwards and asks autograd which node runs; it sees no operators and no memory.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import _StopRecomputationError

from memplan.cuda.card import Card
from memplan.tape import Part, Phase, Tape
from memplan.tape.categories import Moment
from memplan.tape.modules import plain_name

_NO_NODE = 1 << 62


class Follower:
    """Opens the tape's segments and names the modules on it; ``card`` is the one that is written for.

    ``on_module`` is told each module that the step comes to, ``on_segment`` each phase and layer.
    """

    def __init__(self, tape: Tape, card: Card | None = None) -> None:
        self.tape = tape
        self.card = card or Card()
        self.phase = Phase.SETUP
        self.on_module: Callable[[str], None] | None = None
        self.on_segment: Callable[[Phase, int | None], None] | None = None
        self._modules: list[str] = []  # the modules whose forward is running, outermost first
        # autograd's sequence numbers at which the running module changed: they tell a node's module
        self._boundaries: list[int] = []
        self._boundary_modules: list[str] = []
        self._failure: tuple[BaseException | None, str] = None, ""  # an error, and the module it came from
        self._past_head = False
        self._head_nodes = range(0)  # nodes of the output layer's operations and of those after it

    def _now(self) -> Moment:
        after_head = self._past_head
        recomputing = False
        if self.phase is Phase.BACKWARD:
            recomputing = torch.is_grad_enabled()  # the engine disables it around a node's own work
            node = torch._C._current_autograd_node()
            after_head = not recomputing and node is not None and node._sequence_nr() in self._head_nodes
        return Moment(self.phase, recomputing, after_head)

    def _mark(self, module: str) -> None:
        self._boundaries.append(torch._C._autograd._get_sequence_nr())
        self._boundary_modules.append(module)
        self._arrive(module)

    def _arrive(self, module: str) -> None:
        if module != self.tape.module:
            self.tape.module = module
            if self.on_module is not None:
                self.on_module(module)

    def _locate(self) -> None:
        """In backward: the module whose forward made the node that is running."""
        if self._modules:  # recomputing
            return
        node = torch._C._current_autograd_node()
        number = _NO_NODE if node is None else node._sequence_nr()
        # AccumulateGrad nodes carry the largest number there is: they stay where they run.
        if number < _NO_NODE:
            position = bisect_right(self._boundaries, number) - 1
            if position >= 0:
                self._arrive(self._boundary_modules[position])

    @contextmanager
    def follow(
        self, model: torch.nn.Module, head: str = "lm_head", decoder: str | None = None
    ) -> Iterator[None]:
        """Name the running module of ``model`` on the tape while the context lasts. ``head`` is the output
        layer: from there on storages belong to logits and loss. Where it is never called they do from the end
        of ``decoder`` on."""
        names = {module: plain_name(name) for name, module in model.named_modules()}
        stack = self._modules

        def enter(module: torch.nn.Module, _args: Any) -> None:
            name = names.get(module)
            if name is not None:
                stack.append(name)
                self._mark(name)
                if name == head:
                    self._enter_head()

        def leave(module: torch.nn.Module, _args: Any, _out: Any) -> None:
            name = names.get(module)
            error = sys.exc_info()[1]
            # held, the exception that ends a recomputation would keep the tensors of all its frames
            stopped = isinstance(error, _StopRecomputationError)
            if error is not None and not stopped and error is not self._failure[0]:
                self._failure = error, stack[-1] if stack else ""
            if name is not None and name in stack:
                while stack.pop() != name:
                    pass
                self._mark(stack[-1] if stack else "")
                if name == decoder:
                    self._enter_head()

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

    def _enter_head(self) -> None:
        if self.phase is Phase.FORWARD:
            self._past_head = True
            self._head_nodes = range(torch._C._autograd._get_sequence_nr(), _NO_NODE)

    def begin(self, phase: Phase, name: str, layer: int | None = None, part: Part = Part.STEP) -> None:
        """Open the tape's next segment."""
        if phase is not self.phase:
            if phase is Phase.BACKWARD:
                self._head_nodes = range(self._head_nodes.start, torch._C._autograd._get_sequence_nr())
            self._past_head = False
            self.phase = phase
            if phase is not Phase.BACKWARD:
                self.tape.module = ""
        self.tape.begin(phase, name, layer, part)
        if self.on_segment is not None:
            self.on_segment(phase, layer)
