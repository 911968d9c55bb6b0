"""Gradient checkpointing of one decoder layer (torch/utils/checkpoint.py, 2.13)."""

from __future__ import annotations

from typing import Any

from memplan.parts.context import Context, Layer, Leaves
from memplan.shadow import autograd, ops
from memplan.shadow.autograd import AccumulateGrad, Frame, Node, attach, require_grad, save
from memplan.shadow.tensor import DType, Tensor, no_grad, state


def checkpoint(layer: Layer, modules: Leaves, hidden: Tensor, context: Context, *, reentrant: bool) -> Tensor:
    """Run ``layer`` and keep only its inputs."""
    if reentrant:
        return _reentrant(layer, modules, hidden, context)
    autograd.keep(hidden)
    if context.per_layer_input is not None:
        autograd.keep(context.per_layer_input)
    autocast = state.autocast

    def recompute() -> None:
        with _autocast(autocast):
            layer(modules, hidden, context)

    frame = Frame(recompute)
    with autograd.frame(frame):
        return layer(modules, hidden, context)


class _autocast:
    """Re-enter the region that the forward ran in; its cache of casts is its own."""

    def __init__(self, dtype: DType | None) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        state.autocast = self.dtype

    def __exit__(self, *error: Any) -> None:
        state.autocast = None
        state.autocast_cache.clear()


def _reentrant(layer: Layer, modules: Leaves, hidden: Tensor, context: Context) -> Tensor:
    """CheckpointFunction: forward without history; backward runs forward and a nested backward."""
    beside = context.per_layer_input
    node = Node(_reentrant_backward, hidden, beside) if ops.tracked(hidden, beside) else None
    if node is not None:
        node.saved = save(hidden), None if beside is None else save(beside)
        node.context = layer, modules, context._replace(per_layer_input=None), state.autocast
    with no_grad():
        out = layer(modules, hidden, context)
    if node is not None:
        out = out.detach()
        attach(node, out)
    return out


def _reentrant_backward(node: Node, grad: Tensor) -> Any:
    layer, modules, context, autocast = node.context
    hidden, beside = (
        None if saved is None else _leaf(saved, edge)
        for saved, edge in zip(node.saved, node.edges, strict=True)
    )
    context = context._replace(per_layer_input=beside)
    scope = state.scope
    state.grad = True
    with _autocast(autocast):
        out = layer(modules, hidden, context)
    state.grad = False
    autograd.backward(out, grad)
    state.scope = scope
    return _gradient(hidden), _gradient(beside)


def _leaf(saved: Tensor, edge: Any) -> Tensor:
    """``detach_variable``: an input once more, which requires a gradient if it did."""
    again = saved.detach()
    if edge is not None:
        require_grad(again, parameter=False)
    return again


def _gradient(leaf: Tensor | None) -> Tensor | None:
    return leaf.node.grad if leaf is not None and isinstance(leaf.node, AccumulateGrad) else None
