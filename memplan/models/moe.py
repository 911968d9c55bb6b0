"""Mixture of experts (placeholder until families are reconciled)."""

from __future__ import annotations

from typing import Any

from memplan.shadow.tensor import Tensor
from memplan.spec import ModelSpec


def sparse_mlp(m: dict[str, Any], x: Tensor, spec: ModelSpec) -> Tensor:
    raise NotImplementedError
