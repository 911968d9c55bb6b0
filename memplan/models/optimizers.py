"""Optimizers: the states they keep and the temporaries of a step.

Sources: torch/optim/adam.py, sgd.py and utils/clip_grad.py (2.13), bitsandbytes/optim/optimizer.py (0.50),
transformers/optimization.py (5.23). Parameters come in groups, one a decoder layer, so that the tape
can be folded; the order is that of ``model.parameters()``.
"""

from __future__ import annotations

from math import prod

from memplan.recipe import Optimizer, Recipe
from memplan.shadow.autograd import AccumulateGrad
from memplan.shadow.tensor import DType, Shape, Storage, Tensor, category, empty, float32, state, uint8
from memplan.tape import Category, Phase

Group = tuple["int | None", list[Tensor]]

_MIN_8BIT_SIZE = 4096  # smaller parameters keep 32-bit states
_BLOCK_8BIT = 256
_PAGED_FROM = 100_000  # smaller states stay on the device


def states(groups: list[Group], recipe: Recipe) -> list[Tensor]:
    """Write the states of every trainable parameter; the tensors that hold them."""
    kept: list[Tensor] = []
    tape = state.tape
    with category(Category.OPTIMIZER_STATE):
        for layer, parameters in groups:
            tape.begin(Phase.SETUP, "optimizer states", layer)
            for parameter in parameters:
                for shape, dtype in state_shapes(parameter.shape, parameter.dtype, recipe):
                    kept.append(empty(shape, dtype, "state"))
        shared = _shared_maps(recipe)
        if shared:
            tape.begin(Phase.SETUP, "optimizer maps")
            kept += [empty((256,), float32, "qmap") for _ in range(shared)]
    return kept


def _shared_maps(recipe: Recipe) -> int:
    return {Optimizer.ADAMW_BNB_8BIT: 2, Optimizer.PAGED_ADAMW_8BIT: 2, Optimizer.LION_8BIT: 1,
            Optimizer.PAGED_LION_8BIT: 1}.get(recipe.optimizer, 0)  # fmt: skip


def state_shapes(shape: Shape, dtype: DType, recipe: Recipe) -> list[tuple[Shape, DType]]:
    """Shapes and dtypes of one parameter's states on the device."""
    optimizer = recipe.optimizer
    if optimizer in (Optimizer.ADAMW_TORCH, Optimizer.ADAMW_TORCH_FUSED):
        moments = [(shape, dtype), (shape, dtype)]
        # fused keeps the step count on the device, foreach on the host (adam.py, _init_group)
        return ([((), float32)] if optimizer is Optimizer.ADAMW_TORCH_FUSED else []) + moments
    if optimizer is Optimizer.SGD:
        return [(shape, dtype)] if recipe.momentum else []
    if optimizer is Optimizer.ADAFACTOR:
        if len(shape) >= 2:
            return [(shape[:-1], float32), ((*shape[:-2], shape[-1]), float32)]
        return [(shape, float32)]
    count = prod(shape)
    moments_count = 1 if optimizer in (Optimizer.LION_8BIT, Optimizer.PAGED_LION_8BIT) else 2
    paged = optimizer.value.startswith("paged") and count >= _PAGED_FROM
    if optimizer is Optimizer.PAGED_ADAMW_32BIT or count < _MIN_8BIT_SIZE:
        return [] if paged else [(shape, float32)] * moments_count
    blocks = -(-count // _BLOCK_8BIT)
    scales: list[tuple[Shape, DType]] = [((blocks,), float32)] * moments_count
    return scales if paged else [(shape, uint8)] * moments_count + scales


def clip(groups: list[Group]) -> None:
    """``clip_grad_norm_`` with foreach: a norm a gradient, stacked, and gradients scaled in place."""
    tape = state.tape
    tape.module = "clip_grad_norm_"
    norms: list[tuple[int | None, list[Storage]]] = []
    count = 0
    for layer, parameters in groups:
        tape.begin(Phase.OPTIMIZER, "norms", layer)
        norms.append((layer, [Storage(4, "_foreach_norm") for p in parameters if _gradient(p) is not None]))
        count += len(norms[-1][1])
    tape.begin(Phase.OPTIMIZER, "clip")
    stacked = empty((count,), float32, "stack")
    total = empty((), float32, "linalg_vector_norm")
    del stacked
    release(norms, "free norms")
    tape.begin(Phase.OPTIMIZER, "clipped")
    coefficient = empty((), float32, "add")
    coefficient = empty((), float32, "reciprocal")
    coefficient = empty((), float32, "mul")
    clamped = empty((), float32, "clamp")
    del total, coefficient, clamped


def release(lists: list[tuple[int | None, list[Storage]]], name: str) -> None:
    """Drop lists of storages group by group, in segments of their own."""
    for layer, storages in lists:
        state.tape.begin(Phase.OPTIMIZER, name, layer)
        storages.clear()


def _gradient(parameter: Tensor) -> Tensor | None:
    node = parameter.node
    return node.grad if isinstance(node, AccumulateGrad) else None


def step(groups: list[Group], recipe: Recipe) -> None:
    """One ``optimizer.step()``."""
    tape = state.tape
    tape.module = recipe.optimizer.value
    if recipe.optimizer is Optimizer.ADAMW_TORCH:
        _foreach_adamw(groups)
    elif recipe.optimizer is Optimizer.ADAFACTOR:
        _adafactor(groups)
    # fused AdamW, SGD (in place with foreach) and bitsandbytes update in one kernel, without temporaries


def decays(parameter: Tensor) -> bool:
    """The Trainer's groups: norms and biases are not decayed. Both are vectors here."""
    return len(parameter.shape) > 1


def _foreach_adamw(groups: list[Group]) -> None:
    """``_multi_tensor_adam``: square roots of all second moments at once, group by group, dtype by dtype."""
    for decayed in (True, False):
        roots: list[tuple[int | None, list[Storage]]] = []
        for layer, parameters in groups:
            chosen = [p for p in parameters if decays(p) is decayed]
            if chosen:
                state.tape.begin(Phase.OPTIMIZER, f"sqrt {decayed}", layer)
                roots.append((layer, [Storage(p.nbytes, "_foreach_sqrt") for p in chosen]))
        release(roots, f"free sqrt {decayed}")


def _adafactor(groups: list[Group]) -> None:
    """transformers' Adafactor: parameter by parameter, the update in fp32 (filled in when reconciled)."""
    tape = state.tape
    for layer, parameters in groups:
        tape.begin(Phase.OPTIMIZER, "adafactor", layer)
        for parameter in parameters:
            grad = _gradient(parameter)
            if grad is None:
                continue
            shape = parameter.shape
            upcast = empty(shape, float32, "_to_copy") if parameter.dtype is not float32 else None
            weight = empty(shape, float32, "_to_copy") if parameter.dtype is not float32 else None
            update = empty(shape, float32, "pow")
            update = empty(shape, float32, "add")
            factor = empty(shape, float32, "mul")
            del upcast, weight, update, factor


def zero_grad(groups: list[Group]) -> None:
    """``zero_grad(set_to_none=True)``."""
    for layer, parameters in groups:
        state.tape.begin(Phase.OPTIMIZER, "zero_grad", layer)
        for parameter in parameters:
            node = parameter.node
            if isinstance(node, AccumulateGrad):
                node.grad = None
