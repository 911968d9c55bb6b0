"""Complex numbers: pairs of reals that are viewed as one (derivatives.yaml and FunctionsManual.cpp, torch
2.13)."""

from __future__ import annotations

from typing import Any

from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, unpack
from memplan.shadow.tensor import Tensor, complex64, float32, normalized, strides_of


def view_as_complex(x: Tensor) -> Tensor:
    """[..., 2] of fp32 to [...]."""
    strides = tuple(stride // 2 for stride in strides_of(x)[:-1])
    out = _viewed(x, x.shape[:-1], strides)
    if ops.tracked(x):
        attach(Node(_as_complex_backward, x), out)
    return out


def _as_complex_backward(node: Node, grad: Tensor) -> Any:
    return (view_as_real(grad),)


def view_as_real(x: Tensor) -> Tensor:
    """[...] to [..., 2] of fp32."""
    strides = (*(2 * stride for stride in strides_of(x)), 1)
    out = _viewed(x, (*x.shape, 2), strides)
    if ops.tracked(x):
        attach(Node(_as_real_backward, x), out)
    return out


def _as_real_backward(node: Node, grad: Tensor) -> Any:
    return (view_as_complex(ops.contiguous(grad)),)


def _viewed(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    out = x.viewed(shape, normalized(shape, strides))
    out.dtype = float32 if x.dtype is complex64 else complex64
    return out


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """``x * y`` by a ``y`` that wants no gradient."""
    if not ops.tracked(x):
        return ops.pointwise("mul", x, y)
    node = Node(_multiply_backward, x)
    node.saved = save(y)
    out = ops.pointwise("mul", x, y)
    attach(node, out)
    return out


def _multiply_backward(node: Node, grad: Tensor) -> Any:
    """``grad * other.conj()``, which is written out first (ConjugateFallback.cpp)."""
    conjugate = ops.pointwise("conj_physical", unpack(node.saved))
    return (ops.pointwise("mul", grad, conjugate),)
