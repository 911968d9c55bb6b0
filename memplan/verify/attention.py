"""Attention with data, for the operators that no CPU has: the textbook's forward and backward in fp32.

Shapes: B batch, H heads, S positions, D head dimension. What it allocates on the way is nobody's business:
it is called where allocations are not recorded.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from memplan.errors import MemplanError


def _probabilities(
    query: Any, key: Any, bias: Any, causal: bool, scale: float | None
) -> tuple[Any, Any, Any, float]:
    """Probabilities and log-sum-exp [B, H, S(, S)], the keys of every query head, and the scale."""
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    keys = _expanded(key, query)
    scores = query.float() @ keys.transpose(-2, -1) * factor
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    lse = scores.logsumexp(-1)
    # rows that are masked all over are zeros
    probabilities = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return probabilities, lse, keys, factor


def _expanded(tensor: Any, query: Any) -> Any:
    """In fp32, for every query head."""
    return tensor.float().repeat_interleave(query.shape[1] // tensor.shape[1], 1)


def _no_dropout(dropout: float) -> None:
    if dropout:
        raise MemplanError("attention dropout can't be trained on a CPU in CUDA's way: set it to 0")


def forward(
    query: Any, key: Any, value: Any, bias: Any, dropout: float, causal: bool, scale: float | None
) -> tuple[Any, Any]:
    """The output [B, H, S, D] and the log-sum-exp [B, H, S]."""
    _no_dropout(dropout)
    probabilities, lse, _, _ = _probabilities(query, key, bias, causal, scale)
    return probabilities @ _expanded(value, query), lse


def backward(
    grad: Any, query: Any, key: Any, value: Any, bias: Any, dropout: float, causal: bool, scale: float | None
) -> tuple[Any, Any, Any]:
    """The gradients of query, key and value."""
    _no_dropout(dropout)
    probabilities, _, keys, factor = _probabilities(query, key, bias, causal, scale)
    grad = grad.float()
    values = _expanded(value, query)
    of_values = probabilities.transpose(-2, -1) @ grad
    of_probabilities = grad @ values.transpose(-2, -1)
    row_sums = (of_probabilities * probabilities).sum(-1, keepdim=True)
    of_scores = probabilities * (of_probabilities - row_sums) * factor
    of_keys = of_scores.transpose(-2, -1) @ query.float()

    def summed(expanded: Any, like: Any) -> Any:
        batch, heads, length, dim = like.shape
        return expanded.reshape(batch, heads, -1, length, dim).sum(2)

    return of_scores @ keys, summed(of_keys, key), summed(of_values, value)
