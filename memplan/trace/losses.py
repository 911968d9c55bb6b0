"""What stands in where a loss's own code is traced that was written for a GPU.

- Triton kernels read and write what they are given and allocate nothing: a launch does nothing.
- Questions of that code about the device (``x.device.type == "cuda"``) get CUDA's answer.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import nn

from memplan.cuda.card import Card
from memplan.errors import TraceError
from memplan.losses import Loss


def attach(model: nn.Module, loss: Loss) -> None:
    """Patch a model, PEFT's around it or not, as its user's trainer does. Raises TraceError if it can't."""
    loss.attach(model.get_base_model() if hasattr(model, "get_base_model") else model)


class _Launch:
    """A Triton kernel: ``kernel[grid](...)`` works in place and allocates nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._run

    def _run(self, *args: Any, **kwargs: Any) -> None:
        return None


class _OnCuda(ast.NodeTransformer):
    """Answers ``x.device.type == "cuda"`` and ``!=`` as on CUDA."""

    answered = 0

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        question = ast.unparse(node)
        for sign, answer in (("==", True), ("!=", False)):
            if question.endswith(f".device.type {sign} 'cuda'"):
                self.answered += 1
                return ast.Constant(answer)
        return node


@functools.cache
def on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, from its own source, with its questions about the device answered."""
    transformer = _OnCuda()
    tree = transformer.visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
    if not transformer.answered:
        raise TraceError(
            f"{function.__module__}.{function.__name__} asks nothing about the device any more, so this "
            "version of the library is not the one that memplan knows"
        )
    code = compile(ast.fix_missing_locations(tree), inspect.getsourcefile(function) or "", "exec")
    scope: dict[str, Any] = {}
    exec(code, function.__globals__, scope)
    made: Callable[..., Any] = scope[function.__name__]
    return made


class _StandIns:
    def launch(self) -> Any:
        return _Launch()

    def on_cuda(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return on_cuda(function)


@contextmanager
def in_force(loss: Loss, card: Card) -> Iterator[None]:
    """The stand-ins of a loss while the context lasts."""
    with ExitStack() as stack:
        for owner, name, replacement in loss.patches(_StandIns(), card):
            stack.enter_context(mock.patch.object(owner, name, replacement, create=True))
        yield
