"""``torch.autocast`` as CUDA applies it, on CPU tensors.

The CPU's and CUDA's autocast cast different operators. While :func:`cuda_rules` is on, the CPU's
autocast follows CUDA's lists of fp32 operators (ATen/autocast_mode.h, torch 2.13:
``AT_FORALL_FP32``, ``AT_FORALL_FP32_SET_OPT_DTYPE``). The lower-precision lists agree on the matrix
products, so those stay PyTorch's own, with its cache of cast weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

BELOW_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

# AT_FORALL_FP32, those that language models call
_FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm",
    "native_layer_norm", "rms_norm", "logsumexp", "kl_div", "dist", "cdist",
)  # fmt: skip
# AT_FORALL_FP32_SET_OPT_DTYPE: the operator is told to compute in fp32 unless told otherwise
_FP32_BY_DTYPE = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "sum", "sum.dim_IntList",
)  # fmt: skip
# AT_FORALL_PROMOTE: all floating arguments take the widest type among them
_PROMOTE = ("addcdiv", "addcmul", "atan2", "dot", "index_put", "scatter_add", "tensordot")
# The CPU's autocast promotes these; CUDA's leaves them alone, and its cat takes inputs of several types.
_PLAIN = ("cat", "stack", "index_copy")
_HALF = (torch.float16, torch.bfloat16)


def _to_fp32(argument: Any) -> Any:
    """``cached_cast`` to fp32; casts to fp32 are never cached."""
    if isinstance(argument, torch.Tensor):
        return argument.float() if argument.dtype in _HALF else argument
    if isinstance(argument, (list, tuple)):
        return type(argument)(_to_fp32(item) for item in argument)
    return argument


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _casting(name: str) -> Callable[..., Any]:
    overload = _overload(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOCAST):
            # in the order in which the compiler evaluates the wrapper's arguments: from the last
            return overload(*[_to_fp32(argument) for argument in reversed(args)][::-1], **kwargs)

    return kernel


def _setting_dtype(name: str) -> Callable[..., Any]:
    overload = _overload(name)
    positions = [argument.name for argument in overload._schema.arguments]
    position = positions.index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = args[position] if len(args) > position else kwargs.get("dtype")
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOCAST):
            if given is None and args[0].is_floating_point() and args[0].dtype is not torch.float64:
                args = args[:position]
                kwargs = {**kwargs, "dtype": torch.float32}
            return overload(*args, **kwargs)

    return kernel


def _promoting(name: str) -> Callable[..., Any]:
    overload = _overload(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        widest = any(tensor.dtype is torch.float32 for tensor in tensors)
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOCAST):
            if widest:
                args, kwargs = _to_fp32(args), {key: _to_fp32(value) for key, value in kwargs.items()}
            return overload(*args, **kwargs)

    return kernel


def _plain(name: str) -> Callable[..., Any]:
    overload = _overload(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(BELOW_AUTOCAST):
            return overload(*args, **kwargs)

    return kernel


@contextmanager
def cuda_rules() -> Iterator[None]:
    """CUDA's autocast lists for the CPU while the context lasts."""
    enabled = torch.is_autocast_enabled
    library = torch.library.Library("aten", "IMPL")
    rules = ((_FP32, _casting), (_FP32_BY_DTYPE, _setting_dtype), (_PROMOTE, _promoting), (_PLAIN, _plain))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # overriding
        for names, kernel in rules:
            for name in names:
                library.impl(name, kernel(name), "AutocastCPU", allow_override=True)
    try:
        with ExitStack() as stack:
            # without a device type it asks about CUDA, as PEFT's 4-bit layer does (peft/tuners/lora/bnb.py)
            stack.enter_context(
                mock.patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device))
            )
            yield
    finally:
        library._destroy()
