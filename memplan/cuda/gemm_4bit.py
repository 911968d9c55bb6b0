"""When bitsandbytes multiplies by 4-bit weights without dequantising them first.

``_gemm_4bit_use_custom_cuda`` in bitsandbytes/backends/cuda/ops.py (0.50) decides by card and shape; the
thresholds here are those of the reference card, an A100. They matter for short batches only: above 1,536
rows every card dequantises.
"""

from __future__ import annotations

from memplan.cuda.card import Card

_BLOCK = 64
_ANY_CARD = 4  # rows up to which the fused kernel always runs
_NEVER_ABOVE = 1536
_SMALL_WEIGHT = 4 << 20  # elements


def fused(card: Card, rows: int, outputs: int, inputs: int, itemsize: int) -> bool:
    """Whether the product of ``rows`` by a weight [outputs, inputs] runs without a dequantised weight."""
    if rows > _NEVER_ABOVE or inputs % _BLOCK:
        return False
    if rows <= _ANY_CARD:
        return True
    if itemsize == 4:
        return rows < 8
    processors = card.multiprocessors
    blocks = -(-outputs // _BLOCK)
    if outputs * inputs < _SMALL_WEIGHT:
        return rows <= _small_limit(blocks, processors, outputs, inputs)
    if rows > 512:
        return False
    if rows < 8:
        crowded = rows >= 6 and blocks >= 48
        tall = inputs > outputs and blocks * 4 < processors * 3
        square = inputs == outputs and blocks * 5 < processors * 3
        return not (crowded and (tall or square))
    return rows <= _large_limit(blocks, processors, outputs, inputs)


def _small_limit(blocks: int, processors: int, outputs: int, inputs: int) -> int:
    """Most rows for a small weight."""
    if inputs * 2 < outputs:
        return 1536 if blocks * 3 < processors else 512
    if blocks * 4 <= processors:
        if inputs < outputs:
            return 384
        return 32 if blocks * 8 <= processors else 128
    return 16 if blocks * 2 <= processors else 0


def _large_limit(blocks: int, processors: int, outputs: int, inputs: int) -> int:
    """Most rows, of 8 to 512, for a large weight."""
    if blocks >= processors * 3:
        return 128
    if blocks >= processors:
        return 64 if inputs < outputs else 32
    if inputs >= outputs * 3 and blocks * 4 > processors:
        return 0
    if inputs == outputs and blocks >= 48 and blocks * 5 < processors * 3:
        return 0
    if blocks * 2 < processors:
        if inputs <= outputs:
            return 128
        if blocks * 3 >= processors:
            return 0
    if blocks >= processors // 2 and inputs < outputs:
        return 128
    return 16
