"""Experts that are published in MXFP4, two numbers a byte and for each 32 a scale of a byte, which loading
makes 16 or 32 bits of, for nothing trains them packed (transformers 5.23, integrations/mxfp4.py,
``_convert_moe_packed_tensors``)."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from memplan.shadow.tensor import Shape
from memplan.weights import LoadStep, Temporary

_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_OF_A_SCALE = 32  # numbers; in a row of 16 bytes
_ROWS = 32768 * 1024  # that are unpacked at once
_TABLE = 16  # numbers that four bits may stand for


def is_packed(name: str) -> bool:
    """Whether a parameter of that name is."""
    return name.endswith(_EXPERTS)


def published(name: str) -> str:
    """The name under which a parameter begins in the checkpoint, which is loaded in the order of names."""
    return f"{name}_blocks" if is_packed(name) else name


def unpacked(shape: Shape, itemsize: int, arrives: LoadStep, temporary: Temporary) -> Iterator[LoadStep]:
    """How a parameter is loaded: it comes packed, and what it is looked up by is several times as large."""
    count = prod(shape)
    rows = count // _OF_A_SCALE

    def there(nbytes: int) -> tuple[LoadStep, LoadStep]:
        take, number = temporary(nbytes)
        return take, ("drop", number)

    blocks, no_blocks = there(count // 2)
    scales, no_scales = there(rows)
    wide, no_wide = there(4 * rows)
    exponents, no_exponents = there(4 * rows)
    table, no_table = there(_TABLE * itemsize)
    out, no_out = there(count * itemsize)
    yield from (blocks, scales, wide, exponents, no_wide, table, out)
    for first in range(0, rows, _ROWS):
        numbers = min(_ROWS, rows - first) * _OF_A_SCALE // 2
        for _ in ("low", "high"):
            half, no_half = there(numbers)  # & 0x0F, >> 4
            index, no_index = there(4 * numbers)
            long_index, no_long_index = there(8 * numbers)  # indexing makes int64 of int32
            found, no_found = there(itemsize * numbers)
            yield from (half, index, no_half, long_index, found, no_long_index, no_found, no_index)
    yield arrives  # transposed
    yield from (no_exponents, no_table, no_out, no_blocks, no_scales)
