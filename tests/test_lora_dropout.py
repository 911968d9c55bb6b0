"""Dropout whose mask is made again from a seed: Philox, in the kernels and in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
from nf4_weights import DEVICE, distance, one_thread, torch, values

from memplan.kernels.lora_dropout import (
    _high,
    add_input_gradient,
    down_gradient_into,
    down_into,
    dropped,
    reference_keep,
    threshold,
)

assert one_thread

SEED = torch.tensor([1234567890123456789], device=DEVICE)


def test_plain_torch_computes_philox() -> None:
    """Known answers of Philox 4x32-10 (Random123's kat_vectors): all zero, and a counter and key of all ones.

    Only the first of the four numbers is used, from counters (column, row, 0, 0).
    """
    zero = torch.zeros(1, dtype=torch.int64)
    assert _first(zero, 0, 0) == 0x6627E8D5
    assert _high(0xFFFFFFFF, torch.tensor([0xFFFFFFFF])).item() == 0xFFFFFFFE


def _first(seed: Any, column: int, row: int) -> int:
    """The number of one element, by bisection over p: an element is kept while p is at most number /
    2**32.
    """
    low, high = 0, 1 << 32
    while high - low > 1:
        middle = (low + high) // 2
        kept = reference_keep(seed, row + 1, column + 1, middle / (1 << 32))[row, column]
        low, high = (middle, high) if kept else (low, middle)
    return low


def test_the_mask_drops_as_many_as_it_should() -> None:
    for p in (0.05, 0.5):
        keep = reference_keep(SEED, 400, 500, p).double()
        assert abs(keep.mean().item() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5
        assert abs(keep.mean(0).std().item() - (p * (1 - p) / 400) ** 0.5) < 0.1 * (p * (1 - p) / 400) ** 0.5
    assert not torch.equal(reference_keep(SEED, 9, 9, 0.5), reference_keep(SEED + 1, 9, 9, 0.5))
    assert threshold(0.5) == 1 << 31


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(70, 130, 8), (1, 33, 33), (200, 7, 1), (40, 70, 150)])
def test_kernels_are_plain_torch(rows: int, columns: int, rank: int, dtype: Any) -> None:
    """Each of the three products, with the rounding of the dtype."""
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6}[dtype]
    x, grad = values(rows, columns, dtype=dtype), values(rows, rank, dtype=dtype, seed=1)
    down = values(rank, columns, seed=2)
    inner = dropped(x.double(), SEED, 0.3)
    hidden = torch.empty(rows, rank, dtype=dtype, device=DEVICE)
    down_into(hidden, x, down, SEED, 0.3)
    assert distance(hidden, inner @ down.to(dtype).double().t()) < tolerance
    down_grad = torch.empty_like(down)
    down_gradient_into(down_grad, x, grad, SEED, 0.3)
    assert distance(down_grad, grad.double().t() @ inner) < 1e-6
    out = values(rows, columns, dtype=dtype, seed=3)
    start, stop = columns // 3, columns
    wanted = (
        out[:, start:stop].double()
        + dropped(grad.double() @ down.to(dtype).double(), SEED, 0.3)[:, start:stop]
    )
    before = out.clone()
    add_input_gradient(out[:, start:stop], grad, down, SEED, 0.3, start, stop)
    assert distance(out[:, start:stop], wanted) < tolerance
    assert torch.equal(out[:, :start], before[:, :start])


def test_dropout_of_everything() -> None:
    """``nn.Dropout(1.0)`` gives zeros."""
    x, grad, down = values(70, 33), values(70, 4, seed=1), values(4, 33, seed=2)
    assert not dropped(x, SEED, 1.0).any()
    hidden, down_grad, out = torch.ones(70, 4, device=DEVICE), torch.ones_like(down), torch.ones_like(x)
    down_into(hidden, x, down, SEED, 1.0)
    down_gradient_into(down_grad, x, grad, SEED, 1.0)
    add_input_gradient(out, grad, down, SEED, 1.0, 0, 33)
    assert not hidden.any() and not down_grad.any() and (out == 1).all()
