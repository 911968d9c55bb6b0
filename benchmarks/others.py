"""What other libraries have in the kernels' place, for benchmarks/kernels.py to time beside them: NF4 of
torchao and Unsloth, and losses that never hold all logits.

memplan depends on none of them but those of its extras. One that is not installed, or that refuses to be
imported, is left out, and :func:`found` says why in a word. Read in the source of torchao 0.18, unsloth
2026.10.9, liger-kernel 0.8.5, trl 1.16 and cut-cross-entropy 25.1.1.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor, nn

T = TypeVar("T")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [tokens, H], weight [V, H], targets [tokens]


def found(makers: dict[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, str]]:
    """Which libraries are there, and of the others why not: ``missing``, or the name of the error that their
    import ends in.
    """
    there: dict[str, T] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
            made = attempt(make)
        if isinstance(made, Exception):
            missing = isinstance(made, ModuleNotFoundError) and made.name == name
            absent[name] = "missing" if missing else type(made).__name__
            print(f"{name} is left out: {made!r:.300}", flush=True)
        else:
            there[name] = made
    return there, absent


def attempt(make: Callable[..., T], *given: Any) -> T | Exception:
    """What is made, or the error that this ends in."""
    try:
        return make(*given)
    except Exception as error:
        return error


# -- NF4: what a library has for a part of the benchmark, under the part's name ----------------------------


class Torchao:
    """``NF4Tensor``: its own format, timed at the same shape. Scales are always quantised twice, to int8 with
    a factor in the weight's dtype for each 256, and their mean taken out; all of it in plain torch.
    """

    def __init__(self) -> None:
        try:
            from torchao.quantization import to_nf4
        except ImportError:  # until 0.17
            from torchao.dtypes.nf4tensor import to_nf4
        self.to_nf4 = to_nf4

    def _weight(self, packed: Tensor, state: Any) -> Any:
        return self.to_nf4(bnb_functional.dequantize_4bit(packed, state))

    def quantize(self, source: Tensor) -> Callable[[], object]:
        """bf16 to its tensor."""
        return partial(self.to_nf4, source)

    def dequantize(self, packed: Tensor, state: Any) -> Callable[[], Tensor] | None:
        """Its tensor of the same values to bf16. None where scales are quantised once."""
        if not state.nested:
            return None
        return self._weight(packed, state).get_original_weight

    def linear(self, packed: Tensor, state: Any) -> Callable[[Tensor], Tensor]:
        """``linear_nf4`` by way of ``F.linear``: dequantises the weight, forward and backward."""
        weight = self._weight(packed, state)
        return lambda x: nn.functional.linear(x, weight)


class Unsloth:
    """``unsloth.kernels``, on bitsandbytes' weights. Forward dequantises into a buffer that it keeps for
    good: a peak beyond what is there does not show it.
    """

    def __init__(self) -> None:
        utils, fast_lora = bare("unsloth.kernels.utils", "unsloth.kernels.fast_lora")
        self.fast_dequantize = utils.fast_dequantize
        self.matmul_lora = utils.matmul_lora
        self.apply_lora_o = fast_lora.apply_lora_o

    def dequantize(self, packed: Tensor, state: Any) -> Callable[[], Tensor]:
        """The weight to a new tensor."""
        return partial(self.fast_dequantize, packed, state)

    def linear(self, packed: Tensor, state: Any) -> Callable[[Tensor], Tensor]:
        """What ``LoRA_W`` does, without the adapter."""
        return lambda x: _UnslothLinear.apply(x, packed, state, self)

    def lora(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """PEFT's layer as a patched model runs its ``o_proj``. x [rows, inputs] goes as a batch of one."""
        attention = SimpleNamespace(o_proj=layer)
        return lambda x: self.apply_lora_o(attention, x[None])[0]


class _UnslothLinear(torch.autograd.Function):
    """``matmul_lora`` without an adapter, and of ``LoRA_W.backward`` the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, state: Any, unsloth: Unsloth) -> Tensor:
        ctx.weight, ctx.unsloth = (packed, state), unsloth
        y: Tensor = unsloth.matmul_lora(x, packed, state, None, None, None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        packed, state = ctx.weight
        weight = ctx.unsloth.fast_dequantize(packed.t(), state, dtype=grad.dtype)
        return grad @ weight.t(), None, None, None


UNSLOTH = ("unsloth", "unsloth_zoo", "unsloth.kernels")


def bare(*names: str) -> list[ModuleType]:
    """Modules of Unsloth without what ``import unsloth`` does beside: it patches torch, transformers and PEFT
    for the whole process, where the stock candidates run too, and asks for a dozen libraries more. Packages
    that run nothing take the place of its own. Raises what the modules raise; Unsloth's, without a GPU.
    """
    before = set(sys.modules)
    try:
        for name in UNSLOTH:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
        return [importlib.import_module(name) for name in names]
    except BaseException:
        for name in set(sys.modules) - before:  # half of a package is of no use to anybody
            if name.split(".")[0] in UNSLOTH:
                del sys.modules[name]
        raise


NF4: dict[str, Callable[[], Any]] = {"torchao": Torchao, "unsloth": Unsloth}


def equivalents(libraries: dict[str, Any], part: str, *given: Any) -> dict[str, Any]:
    """What the libraries have for ``part``, made of what is ``given``. One that fails at it fails again when
    it is called, where failures are counted.
    """
    made = {
        name: attempt(getattr(library, part), *given)
        for name, library in libraries.items()
        if hasattr(library, part)
    }
    return {
        name: partial(_fail, candidate) if isinstance(candidate, Exception) else candidate
        for name, candidate in made.items()
        if candidate is not None
    }


def _fail(error: Exception, *_: Any) -> None:
    raise error


# -- losses of a frozen head: means over all tokens, and through autograd the hidden states' gradient ------


def _transformers() -> dict[str, Loss]:
    from transformers.loss.loss_utils import ForCausalLMLoss

    def stock(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden, weight)
        loss: Tensor = ForCausalLMLoss(logits, None, weight.shape[0], shift_labels=targets)
        return loss

    return {"stock": stock}


def _liger() -> dict[str, Loss]:
    """Its chunk, and with ``chunk_mem_const`` chunks of 4 and 16 times as many rows (up to a power of two).
    No gradient of the weight is made where it needs none.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

    larger = {f"liger × {times}": partial(fused, chunk_mem_const=times) for times in (4, 16)}
    return {"liger": fused, **larger}


def _trl() -> dict[str, Loss]:
    """As ``add_fused_lm_head`` of SFTTrainer calls it, but for the copy of the rows whose labels count. The
    logits are made again in backward: three products.
    """
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    outputs = ("log_probs", "entropy", "is_top1")

    def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, outputs)
        loss: Tensor = -found[0].mean()
        return loss

    return {"trl": chunked}


def _torch() -> dict[str, Loss]:
    """torch 2.13, in its default chunks."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    return {"torch": partial(linear_cross_entropy, options=LinearCrossEntropyOptions())}


def _cut() -> dict[str, Loss]:
    """Apple's; leaves out gradients that are too small to matter in bf16."""
    from cut_cross_entropy import linear_cross_entropy

    return {"cut": linear_cross_entropy}


LOSSES: dict[str, Callable[[], dict[str, Loss]]] = {
    "transformers": _transformers,
    "liger_kernel": _liger,
    "trl": _trl,
    "torch": _torch,
    "cut_cross_entropy": _cut,
}
