"""Weights become the codes that bitsandbytes gives them."""

from __future__ import annotations

from typing import Any

import pytest
from nf4_weights import BLOCKSIZES, DEVICE, DTYPES, functional, one_thread, same_bits, torch, values

from memplan.kernels import KernelError
from memplan.kernels.nf4_quantize import CUDA_BOUNDS, bounds, nf4_quantize, nf4_quantize_op, reference
from memplan.kernels.weight import NF4

assert one_thread


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (7, 33), (1, 5), (3, 96)], ids=str)
def test_equal_to_bitsandbytes(shape: tuple[int, int], dtype: Any) -> None:
    source = values(*shape, dtype=dtype)
    for blocksize in BLOCKSIZES:
        packed, state = nf4_quantize(source, blocksize, double_quant=True)
        wanted, wanted_state = functional.quantize_4bit(
            source, blocksize=blocksize, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(packed, wanted), blocksize
        assert torch.equal(state.absmax, wanted_state.absmax) and state == wanted_state
        ours, scales = reference(source.cpu(), blocksize)
        if DEVICE == "cpu":  # see the module about CUDA
            assert torch.equal(packed, ours)
        assert same_bits(scales, nf4_quantize(source, blocksize)[1].absmax.cpu())


def test_ties_go_to_the_lower_code() -> None:
    """Midpoints of the code, and their neighbours in fp32, under a scale of 1."""
    code = torch.tensor(NF4)
    middle = (code[:-1] + code[1:]) / 2
    one = torch.tensor(1.0)
    around = [middle, torch.nextafter(middle, one), torch.nextafter(middle, -one)]
    source = torch.cat([*around, torch.ones(64 - 45)]).to(DEVICE)
    packed, _ = nf4_quantize(source)
    wanted, _ = functional.quantize_4bit(source, quant_type="nf4")
    assert torch.equal(packed, wanted)
    nibbles = torch.stack((packed >> 4, packed & 15), 1).view(-1)[:45].view(3, 15).cpu()
    lower = torch.arange(15, dtype=torch.uint8)
    if DEVICE == "cpu":  # CUDA code has four of the midpoints rounded the other way
        assert torch.equal(nibbles, torch.stack((lower, lower + 1, lower)))


def test_the_midpoints_of_cuda_code() -> None:
    """The decimals in its source are cut off where fp32's neighbours are equally near: a bit off in four."""
    ours, cuda = bounds(torch.device("cpu")), torch.tensor(CUDA_BOUNDS)
    apart = ours.view(torch.int32) - cuda.view(torch.int32)
    assert apart.nonzero().flatten().tolist() == [0, 8, 12, 14] and apart.abs().max() == 1
    exact = torch.tensor(NF4, dtype=torch.float64)
    exact = (exact[:-1] + exact[1:]) / 2
    for rounded in (ours, cuda):  # both are nearest
        assert ((rounded.double() - exact).abs() <= exact.abs() * 2**-24).all()


def test_blocks_of_zeros_and_tiny_numbers() -> None:
    source = torch.zeros(4, 64, device=DEVICE)
    source[1, 3], source[2] = 1e-30, 3e-39
    packed, state = nf4_quantize(source)
    wanted, wanted_state = functional.quantize_4bit(source, quant_type="nf4")
    assert torch.equal(packed, wanted) and torch.equal(state.absmax, wanted_state.absmax)


def test_input_that_is_not_contiguous() -> None:
    source = values(128, 64).t()
    assert torch.equal(nf4_quantize(source)[0], nf4_quantize(source.contiguous())[0])


def test_the_operator_is_well_formed() -> None:
    torch.library.opcheck(nf4_quantize_op, (values(7, 33), 64))


def test_what_cant_be_quantised_is_refused() -> None:
    with pytest.raises(KernelError, match="int64"):
        nf4_quantize(torch.zeros(64, dtype=torch.int64))
    with pytest.raises(KernelError, match="blocks of 65"):
        nf4_quantize(values(64), 65)
