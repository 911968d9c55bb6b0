"""Which cards a run can be on, and what its step has to be written for there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memplan import attention
from memplan.asked.gpus import DEFAULT_GPUS, Gpu
from memplan.asked.recipe import DTypeName, Kernels, Recipe
from memplan.cuda.card import FLASH_CAPABILITY, KERNELS_CAPABILITY, Card
from memplan.device.here import find_cards
from memplan.errors import MemplanError
from memplan.tape import Tape

# Attention's fused kernels, as tapes name them.
_FLASH = ("_flash_attn_forward", "_scaled_dot_product_flash_attention")
_EFFICIENT = "_scaled_dot_product_efficient_attention"

# The compute capability from which on PyTorch's builds for CUDA 12.8 and later have kernels
# (pytorch/pytorch#172352, #190385).
_IN_DEFAULT_BUILDS = (7, 5)


def judged(gpus: Iterable[str] | None) -> list[Gpu]:
    """The cards of these names, each once, or the representative set."""
    if isinstance(gpus, str):
        gpus = [gpus]
    found = (gpu for name in (DEFAULT_GPUS if gpus is None else gpus) for gpu in find_cards(name))
    return list({gpu.name: gpu for gpu in found}.values())


def able(recipe: Recipe, gpus: Iterable[str] | None) -> list[Gpu]:
    """The cards to judge; without those of the representative set on which memplan's kernels, if the recipe
    has them, don't run. Raises MemplanError if one of those was asked for."""
    return _able(recipe, judged(gpus), named=gpus is not None)


def _able(recipe: Recipe, cards: list[Gpu], *, named: bool) -> list[Gpu]:
    if recipe.kernels is Kernels.STOCK:
        return cards
    found = []
    for card in cards:
        if card.capability is not None and card.capability >= KERNELS_CAPABILITY:
            found.append(card)
        elif named:
            raise MemplanError(
                f"memplan's kernels run on NVIDIA GPUs from Ampere on, which the {card.name} is not: "
                "use stock kernels"
            )
    return found


def written_for(recipe: Recipe, gpu: Gpu) -> Card | None:
    """The card that a step has to be written for, None for the reference card: before Ampere other kernels
    run. Raises MemplanError if the recipe's kernels don't run on it."""
    _able(recipe, [gpu], named=True)
    if gpu.capability is None or gpu.capability >= FLASH_CAPABILITY:
        return None
    if attention.of(recipe).package:
        raise _no_flash(gpu, recipe)
    return Card(gpu.capability)


def _no_flash(gpu: Gpu, recipe: Recipe) -> MemplanError:
    half = ", and --dtype fp16, for it has no bf16 either" if _in_bf16(recipe) else ""
    return MemplanError(
        f"this step runs FlashAttention, which needs Ampere or newer, and the {gpu.name} is older: give "
        f"--attn sdpa{half}"
    )


_CUDNN_FIRST = (9, 10)  # capabilities (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, 2.13)


def remark(gpu: Gpu, recipe: Recipe, *, named: bool = True) -> str | None:
    """What a verdict about a card has to say beside its figures: what was taken for it, whose its memory is,
    what it lacks and what PyTorch does there; of one that was ``named``, what is played in another's
    place."""
    told = [gpu.assumed] if gpu.assumed else []
    if gpu.kind == "shared":
        told.append(
            "its memory is the host's, too: what the system and the program hold there is not counted"
        )
    if gpu.capability is not None and gpu.capability < FLASH_CAPABILITY:
        lacks = "has no FlashAttention"
        if _in_bf16(recipe):  # torch/cuda/__init__.py, is_bf16_supported(including_emulation=True)
            lacks += " and no bf16, which PyTorch emulates there, slowly (--dtype fp16 is fast)"
        told.append(lacks)
        if gpu.capability < _IN_DEFAULT_BUILDS:
            told.append("needs PyTorch's build for CUDA 12.6, the last with kernels for it")
    newer = gpu.capability is not None and gpu.capability[0] in _CUDNN_FIRST
    if named and newer and recipe.attn in (None, "sdpa"):
        told.append("flash attention is played where it takes cuDNN's")
    return "; ".join(told) or None


def _in_bf16(recipe: Recipe) -> bool:
    dtypes = (recipe.dtype, recipe.compute_dtype)
    return DTypeName.BFLOAT16 in dtypes or (recipe.autocast and recipe.dtype is not DTypeName.FLOAT16)


def as_told(
    tape: Tape, recipe: Recipe, gpus: Iterable[Gpu], *, named: bool, rewritable: bool
) -> Iterator[tuple[Gpu, Card | None]]:
    """The cards to judge by a tape, each with what the run has to be written for. Before Ampere there is no
    FlashAttention, and no efficient one in bfloat16. So the step is written again; flash-attn itself, and a
    tape made for Ampere that can't be rewritten, can't be judged there: such a card is left out, or refused
    if somebody ``named`` it."""
    fused = {name for name in (*_FLASH, _EFFICIENT) if name in tape.operations}
    if recipe.dtype is DTypeName.FLOAT16 or (recipe.dtype is DTypeName.FLOAT32 and not recipe.autocast):
        fused.discard(_EFFICIENT)
    package = _FLASH[0] in fused
    for gpu in gpus:
        if gpu.capability is None or gpu.capability >= FLASH_CAPABILITY:
            yield gpu, None
        elif rewritable and not package:
            yield gpu, Card(gpu.capability)
        elif not fused:
            yield gpu, None
        elif named:
            if package:
                raise _no_flash(gpu, recipe)
            kind = "FlashAttention" if _FLASH[1] in fused else "efficient attention in bfloat16"
            raise MemplanError(
                f"this step runs {kind}, which the {gpu.name} can't: plan without a trace, or trace with "
                "--attn eager"
            )
