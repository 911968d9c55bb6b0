"""The product that decodes its weight in registers agrees with the strips."""

from __future__ import annotations

from typing import Any

import pytest
from nf4_weights import distance, one_thread, quantized, torch, values

from memplan.kernels import KernelError, launch
from memplan.kernels.nf4_linear import nf4_linear

assert one_thread

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(256, 128), (130, 100), (31, 6)], ids=str)
def test_fused_is_strips(shape: tuple[int, int], dtype: Any, nested: bool) -> None:
    packed, state = quantized(*shape, nested=nested, dtype=dtype)
    bias = values(shape[0], dtype=dtype, seed=3)
    for rows in (1, 70):
        for x_dtype in (dtype, torch.float32):
            x = values(rows, shape[1], dtype=x_dtype, seed=1).requires_grad_()
            results = []
            for method in ("strips", "fused"):
                y = nf4_linear(x, packed, state, bias, dtype=dtype, method=method)
                (grad,) = torch.autograd.grad(y, x, values(*y.shape, dtype=x_dtype, seed=2))
                results.append((y, grad))
            for strips, fused in zip(*results, strict=True):
                assert fused.dtype is strips.dtype
                assert distance(fused, strips) < TOLERANCE[dtype]


def test_an_odd_number_of_columns_is_refused() -> None:
    packed, state = quantized(64, 33)
    with pytest.raises(KernelError, match="even number of columns, not 33"):
        nf4_linear(values(5, 33), packed, state, method="fused")


def test_plain_torch_where_nothing_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, state = quantized(64, 32)
    x = values(5, 32)
    wanted = nf4_linear(x, packed, state, method="fused")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert distance(nf4_linear(x, packed, state, method="fused"), wanted) < 2e-6
