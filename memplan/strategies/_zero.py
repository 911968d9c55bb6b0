"""What the stages of DeepSpeed's ZeRO share (deepspeed 0.19.8, runtime/zero, runtime/utils.py), as
transformers 5.23 and accelerate 1.15 set it up: bf16, the Trainer's optimizer, its two groups of parameters.

The model is cast to bf16 as a whole (runtime/engine.py, ``_configure_distributed_model``): there is no
autocast.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from memplan import optimizers
from memplan.asked.recipe import DTypeName, Recipe
from memplan.cuda.reduction import whole_scratch
from memplan.optimizers import Group, State
from memplan.parts.loop import Loop
from memplan.shadow.autograd import AccumulateGrad, require_grad
from memplan.shadow.tensor import (
    DTYPES,
    DType,
    Shape,
    Tensor,
    bfloat16,
    bool_,
    category,
    empty,
    float32,
    float64,
    state,
    uint8,
)
from memplan.strategies import Coming
from memplan.strategies._host import Hosted
from memplan.tape import Category

REDUCING = 1  # the stream ``reduction_stream``


@dataclass(slots=True, eq=False)
class Trained:
    """A trained parameter: what the model computes with, its elements, where they begin in the flat group."""

    tensor: Tensor
    numel: int
    decays: bool
    start: int = 0

    @property
    def node(self) -> AccumulateGrad:
        node = self.tensor.node
        assert isinstance(node, AccumulateGrad)
        return node


class Zero(Hosted):
    """What all stages begin with. ``dtype``: of the model; ``accumulates``: micro-steps of a step."""

    autocast = False
    divides = False
    inside = True  # accelerate, utils/deepspeed.py, DeepSpeedEngineWrapper.backward

    def __init__(self, recipe: Recipe, rank: int | None = None) -> None:
        super().__init__(recipe.gpus, rank)
        self.dtype = DTYPES[recipe.dtype.value] if recipe.dtype is DTypeName.FLOAT16 else bfloat16
        self.clips = bool(recipe.max_grad_norm)
        self.trained: list[Trained] = []
        self.by_node: dict[AccumulateGrad, Trained] = {}
        self.masters: list[Tensor] = []
        self.kind = Category.WEIGHTS
        self.kept_norm: Tensor | None = None
        self.offloads = recipe.offload is not None  # the optimizer, with its masters and gradients
        self.overlap = recipe.overlap_comm is not False
        self.accumulates = recipe.gradient_accumulation_steps > 1

    def computed(self, dtype: DType) -> DType:
        """What ``module.bfloat16()`` makes of a parameter's dtype."""
        return self.dtype if dtype.floating else dtype

    def remember(self, tensor: Tensor) -> None:
        require_grad(tensor, parameter=True)
        name, shape = state.tape.module, tensor.shape
        one = Trained(tensor, prod(shape), len(shape) > 1 or name.endswith("lora_magnitude_vector"))
        self.trained.append(one)
        self.by_node[one.node] = one

    def grouped(self) -> list[list[Trained]]:
        """The Trainer's two groups, decayed and not; DeepSpeed drops one that is empty
        (runtime/engine.py, ``_configure_optimizer``)."""
        groups = ([one for one in self.trained if one.decays is wanted] for wanted in (True, False))
        return [group for group in groups if group]

    def master(self, elements: int, name: str) -> None:
        """A flat part of the fp32 parameters, which the optimizer updates."""
        if self.offloads:
            return
        state.tape.module = name
        with category(self.kind):
            master = empty((elements,), float32, "parameter")
        require_grad(master, parameter=True)
        self.masters.append(master)

    def optimize(self, master: Tensor, grad: Tensor, recipe: Recipe, kept: State) -> None:
        """``optimizer.step()`` of one master."""
        node = master.node
        assert isinstance(node, AccumulateGrad)
        node.grad = grad
        state.tape.module = recipe.optimizer
        optimizers.find(recipe.optimizer).step([Group(None, 1, [master])], kept)
        state.tape.module = "deepspeed"
        node.grad = None

    def keep_norm(self, norm: Tensor | None, loop: Loop[Tensor] | None) -> None:
        """``_global_grad_norm``, until the next one is there; of a loop's numbers it is the norm. Of what the
        host updates it is on the host."""
        if self.offloads:
            return
        if loop is not None and norm is not None:
            loop.clipped(norm)
        elif not self.looped:
            self.kept_norm = norm or scalar(float32, "_global_grad_norm")

    # -- flat groups -------------------------------------------------------------------------------------

    def laid(self, group: list[Trained], alignment: int) -> int:
        """Say where each parameter of a group begins; all elements, padded."""
        start = 0
        for one in group:
            one.start = start
            start += one.numel
        return -(-start // alignment) * alignment


def count_of(asked: int | Literal["auto"] | None, otherwise: int) -> int:
    """Elements that a setting asks for; 0 for those that follow from the model's width
    (transformers/integrations/deepspeed.py, ``trainer_config_finalize``)."""
    return 0 if asked == "auto" else otherwise if asked is None else asked


def by_name(coming: Coming) -> dict[str, int]:
    """Bytes of whole parameters by their names."""
    found = {name: nbytes for name, nbytes in coming.whole.items() if isinstance(name, str)}
    for number, name, _ in coming.resting:
        found[name] = found.get(name, 0) + coming.whole[number]
    return found


# -- scalars on the card: each is an allocation ----------------------------------------------------------


def scalar(dtype: DType, operation: str) -> Tensor:
    return empty((), dtype, operation)


def isfinite(x: Tensor, operation: str) -> Tensor:
    """``at::isfinite``: ``(x == x) * (x.abs() != inf)``."""
    same = empty(x.shape, bool_, operation)
    magnitude = empty(x.shape, x.dtype, operation)
    bounded = empty(x.shape, bool_, operation)
    out = empty(x.shape, bool_, operation)
    del bounded, magnitude, same
    return out


def _scratch(count: int, itemsize: int, accumulator: int, operation: str) -> None:
    for needed in whole_scratch(count, itemsize, accumulator, state.card):
        buffers = [empty((nbytes,), uint8, operation) for nbytes in needed]
        while buffers:
            buffers.pop()


def _extreme(elements: int, dtype: DType) -> Tensor:
    """``x.amax()``."""
    out = scalar(dtype, "has_inf_or_nan")
    _scratch(elements, dtype.itemsize, dtype.itemsize, "has_inf_or_nan")
    return out


def has_inf_or_nan(elements: int, dtype: DType) -> None:
    """runtime/utils.py: ``isfinite(x.amax()).logical_and(isfinite(x.amin())).logical_not()``, added up."""
    name = "has_inf_or_nan"
    largest = _extreme(elements, dtype)
    above = isfinite(largest, name)
    del largest
    smallest = _extreme(elements, dtype)
    below = isfinite(smallest, name)
    del smallest
    both = scalar(bool_, name)
    del above, below
    neither = scalar(bool_, name)
    del both, neither


def vector_norm(elements: int, dtype: DType, operation: str) -> Tensor:
    """``torch.linalg.vector_norm(x.to(get_norm_dtype()))``: fp64."""
    wide = empty((elements,), float64, operation) if dtype is not float64 else None
    out = scalar(float64, operation)
    _scratch(elements, 8, 8, operation)
    del wide
    return out


def mask_nan_or_inf(norm: Tensor) -> None:
    """runtime/utils.py, ``mask_nan_or_inf_with_val_inplace``."""
    name = "mask_nan_or_inf_with_val_inplace"
    magnitude = scalar(norm.dtype, name)
    norm_is_inf = scalar(bool_, name)
    del magnitude
    norm_is_nan = scalar(bool_, name)
    inf_or_nan = scalar(bool_, name)
    err = scalar(float32, name)
    del norm_is_inf, norm_is_nan, inf_or_nan, err


def combine_grad_norm_groups(norms: list[Tensor]) -> Tensor:
    """runtime/utils.py."""
    name = "combine_grad_norm_groups"
    shape: Shape = (len(norms),)
    stacked = empty(shape, float32, name)
    finite = isfinite(stacked, name)
    infinite = empty(shape, bool_, name)
    del finite
    negative = empty(shape, bool_, name)
    either = empty(shape, bool_, name)
    del infinite, negative
    invalid = scalar(bool_, name)
    del either
    combined = scalar(float32, name)
    infinity = scalar(float32, name)
    out = scalar(float32, name)
    del infinity, stacked, invalid, combined
    return out


def is_invalid_grad_norm(norm: Tensor) -> None:
    """runtime/utils.py: ``bool((~isfinite(norm) | (norm < 0)).any())``."""
    name = "is_invalid_grad_norm"
    finite = isfinite(norm, name)
    infinite = scalar(bool_, name)
    del finite
    negative = scalar(bool_, name)
    either = scalar(bool_, name)
    del infinite, negative
    found = scalar(bool_, name)
    del either, found


def unscale_and_clip_grads(norm: Tensor) -> None:
    """In place, by a factor that is made for each group (stage_1_and_2.py)."""
    is_invalid_grad_norm(norm)
    unscale(norm)


def unscale(norm: Tensor) -> None:
    """The same as stage3.py has it."""
    name = "unscale_and_clip_grads"
    scaled = scalar(float32, name)
    raised = scalar(float32, name)
    del scaled
    clip = scalar(float32, name)
    del raised
    clamped = scalar(float32, name)
    del clip
    combined_scale = scalar(float32, name)
    inverse = scalar(float32, name)
    factor = scalar(float32, name)
    del inverse
    del factor, combined_scale, clamped


# -- loading -----------------------------------------------------------------------------------------------


def place(name: str) -> tuple[int, int]:
    """Where a module is in the model: the embedding, layers, the norm, the output layer."""
    if name.startswith("model.layers."):
        return 1, int(name.split(".")[2])
    return {"model.embed_tokens": 0, "model.norm": 2}.get(name, 3), 0
