"""What Qwen2's and Qwen3's configuration classes have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.parts.config import COMMON

DEFAULTS: Mapping[str, Any] = {
    **COMMON,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
NULLABLE = ("num_key_value_heads", "sliding_window", "layer_types")
