"""NF4 is decoded bit by bit as bitsandbytes decodes it."""

from __future__ import annotations

from typing import Any

import pytest
from nf4_weights import (
    BLOCKSIZES,
    DEVICE,
    DTYPES,
    functional,
    one_thread,
    quantized,
    same_bits,
    theirs,
    torch,
    values,
)

from memplan.kernels import KernelError
from memplan.kernels.nf4_dequantize import dequantize_into, nf4_dequantize, nf4_dequantize_op, reference
from memplan.kernels.weight import NF4, check_code, weight_of

assert one_thread

# whole blocks in a row, blocks that straddle rows, half a byte at the end of a row, less than a block
SHAPES = ((64, 128), (3, 96), (7, 33), (1, 5))


def test_the_code_is_bitsandbytes_own() -> None:
    assert tuple(functional.get_4bit_type("nf4", device="cpu").tolist()) == NF4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_equal_to_bitsandbytes_bit_by_bit(blocksize: int, nested: bool, dtype: Any) -> None:
    for shape in SHAPES:
        packed, state = quantized(*shape, blocksize, nested=nested, dtype=dtype)
        ours = nf4_dequantize(packed, state, dtype)
        assert same_bits(ours, theirs(packed, state, dtype)), shape
        assert same_bits(reference(weight_of(packed, state), dtype), ours), shape


def test_every_code_by_every_scale() -> None:
    """All bytes, under scales that fp32 rounds in every way."""
    packed, state = quantized(256, 512, 64, nested=True)
    packed = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(256).view(-1, 1)
    for dtype in DTYPES:
        assert same_bits(nf4_dequantize(packed, state, dtype), theirs(packed, state, dtype))


@pytest.mark.parametrize("select", [False, True], ids=["table", "comparisons"])
@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 128), (0, 192)), ((3, 50), (0, 192)), ((0, 128), (64, 128)), ((5, 6), (7, 9))]
)
def test_a_strip_is_a_part_of_the_whole(rows: Any, columns: Any, select: bool) -> None:
    packed, state = quantized(128, 192)
    weight = weight_of(packed, state)
    out = values(rows[1] - rows[0], columns[1] - columns[0])
    dequantize_into(out, weight, rows, columns, select=select)
    assert same_bits(out, reference(weight, torch.float32)[slice(*rows), slice(*columns)].contiguous())


def test_an_empty_strip_is_left_alone() -> None:
    dequantize_into(values(0, 64), weight_of(*quantized(128, 64)), (3, 3), (0, 64))


def test_other_storage_than_bytes() -> None:
    """FSDP keeps the packed codes in the dtype of the model."""
    source = values(64, 128)
    packed, state = functional.quantize_4bit(source, quant_type="nf4", quant_storage=torch.bfloat16)
    plain, _ = functional.quantize_4bit(source, quant_type="nf4")
    assert packed.dtype is torch.bfloat16
    assert same_bits(nf4_dequantize(packed, state), nf4_dequantize(plain, state))


def test_the_operator_is_well_formed() -> None:
    for nested in (False, True):
        torch.library.opcheck(
            nf4_dequantize_op, (*weight_of(*quantized(64, 128, nested=nested)), torch.float32)
        )


def _refused(change: dict[str, Any], **arguments: Any) -> str:
    packed, state = quantized(64, 128)
    for key, value in change.items():
        setattr(state, key, value)
    with pytest.raises(KernelError) as caught:
        nf4_dequantize(packed, state, **arguments)
    return str(caught.value)


def test_what_is_not_nf4_is_refused() -> None:
    assert "'fp4'" in _refused({"quant_type": "fp4"})
    assert "float64" in _refused({}, dtype=torch.float64)
    assert "blocks of 48" in _refused({"blocksize": 48})
    assert "(2, 32, 128)" in _refused({"shape": (2, 32, 128)})
    assert "can't be a weight" in _refused({"shape": (6400, 128)})
    assert "128 scales" in _refused({"shape": (32, 128)})
    with pytest.raises(KernelError, match="not quantised yet"):
        nf4_dequantize(values(3), None)


def test_a_code_that_is_not_nf4s_is_found() -> None:
    packed, state = quantized(64, 128)
    check_code(weight_of(packed, state))
    state.code = state.code.flip(0)
    with pytest.raises(KernelError, match="not NF4's"):
        check_code(weight_of(packed, state))
