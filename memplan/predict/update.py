"""The end of a step: optimizer states, clipping, the update, and gradients dropped.

Sources: torch/nn/utils/clip_grad.py (2.13), transformers/trainer.py (5.23).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from memplan import optimizers
from memplan.asked.recipe import Recipe
from memplan.cuda.foreach import partial_norms
from memplan.optimizers import Group, State
from memplan.optimizers._lists import gradient, release
from memplan.parts.loop import Loop
from memplan.shadow.autograd import AccumulateGrad
from memplan.shadow.tensor import DType, Storage, Tensor, category, empty, float32, state, uint8
from memplan.tape import Category, Part, Phase


def states(groups: list[Group], recipe: Recipe, embeddings: Sequence[Tensor]) -> State:
    """Write the states of every trainable parameter. ``embeddings``: weights of embeddings, the decoder's
    first."""
    optimizer = optimizers.find(recipe.optimizer)
    kept: State = {}
    tape = state.tape
    tape.module = "optimizer"
    with category(Category.OPTIMIZER_STATE):
        for group in groups:
            tape.begin(Phase.SETUP, "optimizer states", group.layer, Part.RESTING)
            for parameter in group.parameters:
                shapes = optimizer.states(
                    parameter.shape, parameter.dtype, recipe, any(parameter is one for one in embeddings)
                )
                kept[parameter] = [empty(shape, dtype, "state") for shape, dtype in shapes]
        if optimizer.maps:
            tape.begin(Phase.SETUP, "optimizer maps", part=Part.RESTING)
            maps = [empty((256,), float32, "qmap") for _ in range(optimizer.maps)]
            kept[embeddings[0]] = kept.get(embeddings[0], []) + maps
    return kept


def clip(groups: list[Group], loop: Loop[Tensor] | None) -> None:
    """``clip_grad_norm_`` with foreach: a norm a gradient, stacked, and gradients scaled in place."""
    tape = state.tape
    if loop is not None:
        tape.begin(Phase.OPTIMIZER, "norms")
        loop.clipping()
    tape.module = "clip_grad_norm_"
    count = sum(group.repeat * len(group.parameters) for group in groups)
    norms: list[tuple[int | None, list[Storage]]] = []
    sizes = _gradient_sizes(groups)
    # one list a dtype, from an unordered_map that hands out last what came first (ForeachUtils.h)
    for dtype, (length, longest) in reversed(sizes.items()):
        tape.begin(Phase.OPTIMIZER, f"partial norms, {dtype}")
        partial = empty((partial_norms(length, longest),), uint8, "_foreach_norm")
        for group in groups:
            wanted = [p for p in group.parameters if p.dtype is dtype and gradient(p) is not None]
            if wanted:
                tape.begin(Phase.OPTIMIZER, f"norms, {dtype}", group.layer)
                norms.append((group.layer, [Storage(dtype.itemsize, "_foreach_norm") for _ in wanted]))
        tape.begin(Phase.OPTIMIZER, f"norms, {dtype}, done")
        del partial
    tape.begin(Phase.OPTIMIZER, "total norm")
    stacked = empty((count,), float32 if len(sizes) > 1 else next(iter(sizes)), "stack")
    everywhere = stacked if state.spread is None else state.spread.norm(stacked)
    total = empty((), float32, "linalg_vector_norm")
    del everywhere, stacked
    release(norms, "free norms")
    tape.begin(Phase.OPTIMIZER, "clip")
    raised = empty((), float32, "add")
    inverse = empty((), float32, "reciprocal")
    coefficient = empty((), float32, "mul")
    del raised, inverse
    clamped = empty((), float32, "clamp")
    if loop is not None:
        loop.clipped(total)
    del total, coefficient, clamped


def _gradient_sizes(groups: list[Group]) -> dict[DType, tuple[int, int]]:
    """For each dtype of gradients: how many, and the elements of the largest."""
    counts: dict[DType, int] = {}
    longest: dict[DType, int] = {}
    for group in groups:
        for parameter in group.parameters:
            dtype = parameter.dtype
            counts[dtype] = counts.get(dtype, 0) + group.repeat
            longest[dtype] = max(longest.get(dtype, 0), prod(parameter.shape))
    return {dtype: (counts[dtype], longest[dtype]) for dtype in counts}


def step(groups: list[Group], recipe: Recipe, kept: State) -> None:
    """One ``optimizer.step()``."""
    state.tape.module = recipe.optimizer
    optimizers.find(recipe.optimizer).step(groups, kept)


def zero_grad(groups: list[Group]) -> None:
    """``zero_grad(set_to_none=True)``."""
    for group in groups:
        state.tape.begin(Phase.OPTIMIZER, "zero_grad", group.layer)
        for parameter in group.parameters:
            node = parameter.node
            if isinstance(node, AccumulateGrad):
                node.grad = None
