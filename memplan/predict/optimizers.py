"""Optimizers: the states they keep and the temporaries of a step.

Sources: torch/optim/adam.py, sgd.py and utils/clip_grad.py (2.13), bitsandbytes/optim/optimizer.py (0.50),
transformers/optimization.py and trainer_optimizer.py (5.23). Parameters come in groups, one a decoder
layer, in the order of ``model.parameters()``; a group of a repeated layer says how often it repeats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from memplan.asked.recipe import Optimizer, Recipe
from memplan.shadow.autograd import AccumulateGrad
from memplan.shadow.ops import pointwise
from memplan.shadow.tensor import DType, Shape, Storage, Tensor, category, empty, float32, state, uint8
from memplan.tape import Category, Phase


@dataclass(slots=True)
class Group:
    """Trainable parameters of one place: a layer (``repeat`` of them in a folded play) or outside."""

    layer: int | None
    repeat: int
    parameters: list[Tensor]


_MIN_8BIT_SIZE = 4096  # smaller parameters keep 32-bit states
_BLOCK_8BIT = 256
_PAGED_FROM = 100_000  # smaller states stay on the device

_LION = (Optimizer.LION_8BIT, Optimizer.PAGED_LION_8BIT)
_EIGHT_BIT = (Optimizer.ADAMW_BNB_8BIT, Optimizer.PAGED_ADAMW_8BIT, *_LION)

State = dict[Tensor, list[Tensor]]


def states(groups: list[Group], recipe: Recipe, embedding: Tensor) -> State:
    """Write the states of every trainable parameter. ``embedding`` is the embedding's weight, which the
    Trainer exempts from 8 bits."""
    kept: State = {}
    tape = state.tape
    tape.module = "optimizer"
    with category(Category.OPTIMIZER_STATE):
        for group in groups:
            tape.begin(Phase.SETUP, "optimizer states", group.layer)
            for parameter in group.parameters:
                shapes = state_shapes(parameter.shape, parameter.dtype, recipe, parameter is embedding)
                kept[parameter] = [empty(shape, dtype, "state") for shape, dtype in shapes]
        if recipe.optimizer in _EIGHT_BIT:
            tape.begin(Phase.SETUP, "optimizer maps")
            maps = 1 if recipe.optimizer in _LION else 2
            kept[embedding] = kept.get(embedding, []) + [empty((256,), float32, "qmap") for _ in range(maps)]
    return kept


def state_shapes(
    shape: Shape, dtype: DType, recipe: Recipe, embedding: bool = False
) -> list[tuple[Shape, DType]]:
    """Shapes and dtypes of one parameter's states on the device."""
    optimizer = recipe.optimizer
    if optimizer in (Optimizer.ADAMW_TORCH, Optimizer.ADAMW_TORCH_FUSED):
        # fused keeps the step count on the device, foreach on the host (adam.py, _init_group)
        step: list[tuple[Shape, DType]] = [((), float32)] if optimizer is Optimizer.ADAMW_TORCH_FUSED else []
        return [*step, (shape, dtype), (shape, dtype)]
    if optimizer is Optimizer.SGD:
        return [(shape, dtype)] if recipe.momentum else []
    if optimizer is Optimizer.ADAFACTOR:
        rms: tuple[Shape, DType] = ((), float32)
        if len(shape) >= 2:
            return [(shape[:-1], float32), ((*shape[:-2], shape[-1]), float32), rms]
        return [(shape, float32), rms]
    count = prod(shape)
    moments = 1 if optimizer in _LION else 2
    paged = optimizer.value.startswith("paged") and count >= _PAGED_FROM
    if optimizer is Optimizer.PAGED_ADAMW_32BIT or count < _MIN_8BIT_SIZE or embedding:
        return [] if paged else [(shape, float32)] * moments
    blocks = -(-count // _BLOCK_8BIT)
    scales: list[tuple[Shape, DType]] = [((blocks,), float32)] * moments
    return scales if paged else [(shape, uint8)] * moments + scales


def _gradient(parameter: Tensor) -> Tensor | None:
    node = parameter.node
    return node.grad if isinstance(node, AccumulateGrad) else None


# -- clipping --------------------------------------------------------------------------------------


def clip(groups: list[Group]) -> None:
    """``clip_grad_norm_`` with foreach: a norm a gradient, stacked, and gradients scaled in place."""
    tape = state.tape
    tape.module = "clip_grad_norm_"
    count = sum(group.repeat * len(group.parameters) for group in groups)
    norms: list[tuple[int | None, list[Storage]]] = []
    sizes = _gradient_sizes(groups)
    # one list a dtype, from an unordered_map that hands out last what came first (ForeachUtils.h)
    for dtype, (length, longest) in reversed(sizes.items()):
        tape.begin(Phase.OPTIMIZER, f"partial norms, {dtype}")
        # ForeachReduceOp.cu: fp32 partial sums for each chunk of 65,536 elements of the longest tensor
        partial = empty((length * -(-longest // 65_536),), float32, "_foreach_norm")
        for group in groups:
            wanted = [p for p in group.parameters if p.dtype is dtype and _gradient(p) is not None]
            if wanted:
                tape.begin(Phase.OPTIMIZER, f"norms, {dtype}", group.layer)
                norms.append((group.layer, [Storage(dtype.itemsize, "_foreach_norm") for _ in wanted]))
        tape.begin(Phase.OPTIMIZER, f"norms, {dtype}, done")
        del partial
    tape.begin(Phase.OPTIMIZER, "total norm")
    stacked = empty((count,), float32 if len(sizes) > 1 else next(iter(sizes)), "stack")
    total = empty((), float32, "linalg_vector_norm")
    del stacked
    _release(norms, "free norms")
    tape.begin(Phase.OPTIMIZER, "clip")
    raised = empty((), float32, "add")
    inverse = empty((), float32, "reciprocal")
    coefficient = empty((), float32, "mul")
    del raised, inverse
    clamped = empty((), float32, "clamp")
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


def _release(lists: list[tuple[int | None, list[Storage]]], name: str) -> None:
    """Drop lists of storages group by group, in segments of their own."""
    for layer, storages in lists:
        state.tape.begin(Phase.OPTIMIZER, name, layer)
        storages.clear()


# -- steps -----------------------------------------------------------------------------------------


def step(groups: list[Group], recipe: Recipe, kept: State) -> None:
    """One ``optimizer.step()``. Fused AdamW, SGD and bitsandbytes update in place without temporaries."""
    state.tape.module = recipe.optimizer.value
    if recipe.optimizer is Optimizer.ADAMW_TORCH:
        _foreach_adamw(groups)
    elif recipe.optimizer is Optimizer.ADAFACTOR:
        _adafactor(groups, kept)


def _by_decay(groups: list[Group]) -> Iterator[tuple[str, list[tuple[int | None, list[Tensor]]]]]:
    """The Trainer's two parameter groups: norms and biases are not decayed."""
    for name, wanted in (("decayed", True), ("not decayed", False)):
        chosen = [(group.layer, [p for p in group.parameters if _decays(p) is wanted]) for group in groups]
        yield name, [(layer, parameters) for layer, parameters in chosen if parameters]


def _decays(parameter: Tensor) -> bool:
    """Told by names (transformers/trainer.py, get_decay_parameter_names, 5.23): of the vectors only DoRA's
    magnitudes have none that exempts them."""
    if len(parameter.shape) > 1 or parameter.storage is None:
        return True
    return state.tape.modules[parameter.storage.index].endswith("lora_magnitude_vector")


def _foreach_adamw(groups: list[Group]) -> None:
    """``_multi_tensor_adam``: square roots of all second moments at once, one parameter group and dtype at a
    time; the name that holds a dtype's list keeps it until the next one's is there."""
    for name, chosen in _by_decay(groups):
        roots: list[tuple[int | None, list[Storage]]] = []
        before = ""
        for dtype in reversed(list(dict.fromkeys(p.dtype for _, parameters in chosen for p in parameters))):
            earlier, roots = roots, []
            for layer, parameters in chosen:
                wanted = [parameter for parameter in parameters if parameter.dtype is dtype]
                if wanted:
                    state.tape.begin(Phase.OPTIMIZER, f"square roots, {name}, {dtype}", layer)
                    roots.append(
                        (layer, [Storage(parameter.nbytes, "_foreach_sqrt") for parameter in wanted])
                    )
            _release(earlier, f"free square roots, {name}{before}")
            before = f", {dtype}"
        _release(roots, f"free square roots, {name}{before}")


def _adafactor(groups: list[Group], kept: State) -> None:
    """transformers' Adafactor, parameter by parameter, in fp32. Names keep the last parameter's tensors
    alive into the next, as the loop's own do."""
    tape = state.tape
    grad = weight = update = None
    for name, chosen in _by_decay(groups):
        for layer, parameters in chosen:
            tape.begin(Phase.OPTIMIZER, f"adafactor, {name}", layer)
            for parameter in parameters:
                grad = _gradient(parameter)
                if grad is None:
                    continue
                if grad.dtype.itemsize == 2:
                    grad = pointwise("_to_copy", grad, dtype=float32)
                weight = parameter
                if weight.dtype.itemsize == 2:
                    weight = pointwise("_to_copy", weight, dtype=float32)
                with category(Category.OPTIMIZER_STATE):
                    kept[parameter][-1] = _rms(weight)
                power = pointwise("pow", grad)
                update = pointwise("add", power)
                del power
                if len(parameter.shape) >= 2:
                    row = empty(parameter.shape[:-1], float32, "mean")
                    del row
                    column = empty((*parameter.shape[:-2], parameter.shape[-1]), float32, "mean")
                    del column
                    update = _approximate_square(parameter.shape)
                else:
                    update = pointwise("rsqrt", update)
                rms = _rms(update)
                ratio = empty((), float32, "div")
                del rms, ratio
                negative = pointwise("neg", update)
                del negative
        tape.begin(Phase.OPTIMIZER, f"adafactor, {name}, done")
    del grad, weight, update


def _rms(x: Tensor) -> Tensor:
    norm = empty((), float32, "linalg_vector_norm")
    rms = empty((), float32, "div")
    del norm
    return rms


def _approximate_square(shape: Shape) -> Tensor:
    """``_approx_sq_grad``: the product of a row and a column factor."""
    mean = empty((*shape[:-2], 1), float32, "mean")
    row = empty(shape[:-1], float32, "div")
    del mean
    column = empty((*shape[:-2], shape[-1]), float32, "rsqrt")
    product = empty(shape, float32, "mul")
    del row, column
    return product


def zero_grad(groups: list[Group]) -> None:
    """``zero_grad(set_to_none=True)``."""
    for group in groups:
        state.tape.begin(Phase.OPTIMIZER, "zero_grad", group.layer)
        for parameter in group.parameters:
            node = parameter.node
            if isinstance(node, AccumulateGrad):
                node.grad = None
