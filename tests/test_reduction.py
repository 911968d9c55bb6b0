"""Partial sums of CUDA's reductions, as PyTorch's CUDA build asked for them on an emulated A100."""

from __future__ import annotations

import pytest

from memplan.cuda.card import Card
from memplan.cuda.reduction import scratch


@pytest.mark.parametrize(
    ("shape", "bytes_"),
    [
        ((2, 512, 896), (7_340_032, 28)),  # Qwen2.5-0.5B's norms, 2 × 512 tokens
        ((2, 512, 128), (1_048_576, 4)),  # and its biases of keys and values
        ((2, 8, 896), None),  # few rows stay in one block
    ],
)
def test_rows_that_blocks_share(shape: tuple[int, ...], bytes_: tuple[int, int] | None) -> None:
    assert scratch(shape, Card()) == bytes_
