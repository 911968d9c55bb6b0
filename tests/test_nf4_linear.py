"""A linear layer with an NF4 weight, in strips: bitsandbytes' numbers without its dequantised weight."""

from __future__ import annotations

from typing import Any

import pytest
from nf4_weights import DEVICE, distance, one_thread, quantized, torch, values
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from memplan.kernels import KernelError, launch, strips
from memplan.kernels.nf4_dequantize import reference as dequantized
from memplan.kernels.nf4_linear import nf4_linear, nf4_linear_grad_op, nf4_linear_op, reference, scratch_bytes
from memplan.kernels.weight import weight_of

assert one_thread

# rows, columns of the weight; the last has blocks that straddle rows and an odd number of strips
WEIGHTS = ((320, 64), (64, 320), (130, 100), (33, 7))
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "STRIP_BYTES", 128 * 64 * 4)


@pytest.fixture(params=["kernels", "plain torch"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernels, and on a CPU in plain torch."""
    if request.param == "plain torch":
        if DEVICE == "cuda":
            pytest.skip("a GPU runs the kernels")
        monkeypatch.setattr(launch, "INTERPRETED", False)
    return str(request.param)


@pytest.mark.usefixtures("small_strips", "how")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_equal_to_a_dequantised_weight(shape: tuple[int, int], dtype: Any) -> None:
    packed, state = quantized(*shape, dtype=dtype)
    matrix = dequantized(weight_of(packed, state), dtype)
    bias = values(shape[0], dtype=dtype, seed=3)
    for leading in ((33,), (2, 3), ()):
        for x_dtype in (dtype, torch.float32):
            x = values(*leading, shape[1], dtype=x_dtype, seed=1).requires_grad_()
            y = nf4_linear(x, packed, state, bias, dtype=dtype)
            wanted = reference(x.to(dtype), matrix, bias).to(x_dtype)
            grad = values(*y.shape, dtype=x_dtype, seed=2)
            (ours,) = torch.autograd.grad(y, x, grad)
            (theirs,) = torch.autograd.grad(wanted, x, grad)
            assert y.dtype is ours.dtype is x_dtype
            assert distance(y, wanted) < TOLERANCE[dtype]
            assert distance(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.usefixtures("how")
def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sum is split: the same numbers but for what a library does otherwise at another size."""
    packed, state = quantized(640, 512)
    x = values(40, 512, seed=1).requires_grad_()
    results = []
    for size in (1 << 30, 512 * 256 * 4, 1):
        monkeypatch.setattr(strips, "STRIP_BYTES", size)
        y = nf4_linear(x, packed, state)
        results.append((y, torch.autograd.grad(y.sum(), x)[0]))
    for y, grad in results[1:]:
        assert torch.allclose(y, results[0][0], rtol=1e-5, atol=1e-4)
        assert torch.allclose(grad, results[0][1], rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("small_strips")
def test_what_is_not_contiguous() -> None:
    """Values, not bits: in what order cuBLAS adds up depends on how a matrix lies. Asked is what every order
    of fp32 sums keeps to."""
    packed, state = quantized(320, 192)
    weight = weight_of(packed, state)
    matrix = dequantized(weight, torch.float32)
    x = values(33, 400, seed=1)[:, 7:199].requires_grad_()
    y = nf4_linear(x, packed, state)
    grad = values(320, 33, seed=2).t()
    assert not x.is_contiguous() and not grad.is_contiguous()
    (ours,) = torch.autograd.grad(y, x, grad)
    for result, left, right in ((y, x, matrix.t()), (ours, grad, matrix)):
        assert_product(result, left, right)
    for result, left, right in (
        (nf4_linear(x.detach().contiguous(), packed, state), x, matrix.t()),
        (nf4_linear_grad_op(grad.contiguous(), *weight, torch.float32, "strips"), grad, matrix),
    ):
        assert_product(result, left, right)


def assert_product(result: Any, left: Any, right: Any) -> None:
    """``result`` is ``left @ right`` within the error that fp32 sums of n products have in whatever order:
    n u / (1 - n u) of the sum of their magnitudes (Higham, Accuracy and Stability, 3.5), u = 2^-24."""
    left, right = left.detach().double(), right.detach().double()
    nu = left.shape[-1] * 2.0**-24
    assert ((result.double() - left @ right).abs() <= nu / (1 - nu) * (left.abs() @ right.abs())).all()


def test_gradients_that_are_asked_for() -> None:
    packed, state = quantized(64, 128)
    for for_x in (False, True):
        for for_bias in (False, True):
            x, bias = values(5, 128, seed=1), values(64, seed=2)
            x.requires_grad_(for_x), bias.requires_grad_(for_bias)
            y = nf4_linear(x, packed, state, bias)
            assert y.requires_grad is (for_x or for_bias)
            if y.requires_grad:
                y.sum().backward()
            assert (x.grad is not None) is for_x and (bias.grad is not None) is for_bias
            if for_bias:
                assert torch.equal(bias.grad, torch.full_like(bias, 5))


def test_empty_input() -> None:
    packed, state = quantized(64, 128)
    x = values(0, 128).requires_grad_()
    y = nf4_linear(x, packed, state)
    y.sum().backward()
    assert y.shape == (0, 64) and x.grad.shape == (0, 128)


@pytest.mark.usefixtures("small_strips")
def test_gradcheck_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)  # doubles are for plain torch
    packed, state = (piece.cpu() if isinstance(piece, torch.Tensor) else piece.to("cpu") or piece
                     for piece in quantized(9, 14))  # fmt: skip
    x = torch.randn(4, 14, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: nf4_linear(x, packed, state, bias), (x, bias))


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_survives_checkpointing(reentrant: bool) -> None:
    packed, state = quantized(64, 64)

    def block(x: Any) -> Any:
        return torch.relu(nf4_linear(torch.relu(nf4_linear(x, packed, state)), packed, state))

    x = values(20, 64, seed=1).requires_grad_()
    (wanted,) = torch.autograd.grad(block(x).sum(), x)
    block_again = checkpoint(block, x, use_reentrant=reentrant)
    block_again.sum().backward()
    assert torch.equal(x.grad, wanted)


def test_it_traces_without_data() -> None:
    packed, state = quantized(64, 128)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 20, 128, requires_grad=True)
        y = nf4_linear(x, packed, state)
        y.sum().backward()
    assert y.shape == (2, 20, 64) and x.grad.shape == x.shape


def test_the_operators_are_well_formed() -> None:
    weight = weight_of(*quantized(128, 64))
    x, bias = values(3, 64).requires_grad_(), values(128).requires_grad_()
    torch.library.opcheck(nf4_linear_op, (x, bias, *weight, torch.float32, "strips"))
    torch.library.opcheck(nf4_linear_op, (x.detach(), None, *weight, torch.float32, "strips"))
    torch.library.opcheck(nf4_linear_grad_op, (values(3, 128), *weight, torch.float32, "strips"))


def test_a_wrong_shape_or_method_is_refused() -> None:
    packed, state = quantized(64, 128)
    with pytest.raises(KernelError, match=r"128 inputs can't multiply a tensor of the shape \(5, 64\)"):
        nf4_linear(values(5, 64), packed, state)
    with pytest.raises(KernelError, match="no method 'magic'"):
        nf4_linear(values(5, 128), packed, state, method="magic")


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "shape",
    [(28672, 8192), (8192, 28672), (14336, 4096), (1024, 8192), (128256, 16384), (5, 3), (1, 1 << 26)],
)
def test_strips_are_32_mib_at_most_or_one_tile(shape: tuple[int, int], itemsize: int) -> None:
    for length, across, used in zip(shape, shape[::-1], scratch_bytes(shape, itemsize), strict=True):
        size = strips.strip(length, across, itemsize)
        assert 0 < size <= length
        assert used == size * across * itemsize
        assert used <= strips.STRIP_BYTES or size == min(strips.MULTIPLE, length)
        assert size == length or size % strips.MULTIPLE == 0


def test_a_converted_result_is_no_larger_than_a_strip() -> None:
    rows = 16384
    size = strips.strip(28672, 8192, 2, rows)
    assert size % strips.MULTIPLE == 0 and rows * size * 2 <= strips.STRIP_BYTES
    assert strips.strip(28672, 8192, 2, 64) == strips.strip(28672, 8192, 2)


def test_a_70bs_largest_weight_needs_a_fourteenth() -> None:
    """448 MiB whole, 32 MiB in strips."""
    assert 28672 * 8192 * 2 == 448 << 20
    assert max(scratch_bytes((28672, 8192), 2)) == 32 << 20
