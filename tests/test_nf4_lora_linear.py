"""LoRA on an NF4 linear layer as one operator: PEFT's numbers, with x and a rank-r product saved."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from nf4_weights import DEVICE, distance, one_thread, quantized, torch, values
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from memplan.kernels import KernelError, launch, lora_dropout, nf4_dequantize, strips
from memplan.kernels.lora_dropout import reference_keep
from memplan.kernels.nf4_dequantize import reference as dequantized
from memplan.kernels.nf4_lora_linear import (
    lora_forward,
    lora_gradients,
    nf4_lora_linear,
    nf4_lora_linear_grad_op,
    nf4_lora_linear_op,
    reference,
)
from memplan.kernels.weight import weight_of
from memplan.tape import Tape
from memplan.trace.recorder import Recorder

assert one_thread

SEED = torch.tensor([99887766554433], device=DEVICE)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# dtypes of the product, of x, of the adapter: as PEFT prepares it, without the upcasts, all in 16 bits, under
# autocast
KINDS = ((FP32, FP32, FP32), (BF16, FP32, FP32), (BF16, BF16, FP32), (FP16, FP16, FP16), (BF16, FP32, BF16))
TOLERANCE = {BF16: 1e-2, FP16: 1.5e-3, FP32: 2e-6}


@pytest.fixture(autouse=True)
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


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(d).split(".")[1] for d in kind))
@pytest.mark.parametrize(
    ("shape", "rows", "rank"), [((320, 64), 33, 8), ((130, 100), 5, 33), ((64, 192), 1, 5)]
)
def test_values_and_gradients(shape: tuple[int, int], rows: int, rank: int, kind: Any, p: float) -> None:
    """Against the formula in double, for the weight as it was quantised."""
    dtype, x_dtype, factor_dtype = kind
    packed, state = quantized(*shape, dtype=dtype)
    weight = weight_of(packed, state)
    x = values(rows, shape[1], dtype=x_dtype, seed=1).requires_grad_()
    down = values(rank, shape[1], dtype=factor_dtype, seed=2).requires_grad_()
    up = values(shape[0], rank, dtype=factor_dtype, seed=3).requires_grad_()
    bias = values(shape[0], dtype=dtype, seed=4)
    seed = SEED if p else None
    y, hidden = nf4_lora_linear_op(x, down, up, bias, *weight, dtype, "strips", 0.5, p, seed)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, down, up)]
    keep = reference_keep(SEED, rows, shape[1], p) if p else None
    matrix = dequantized(weight, dtype).double()
    wanted = reference(exact[0], matrix, exact[1], exact[2], bias.double(), 0.5, keep, p)
    assert y.dtype is x_dtype and distance(y, wanted) < TOLERANCE[dtype]
    grad = values(*y.shape, dtype=x_dtype, seed=5)
    ours = torch.autograd.grad(y, (x, down, up), grad)
    theirs = torch.autograd.grad(wanted, exact, grad.double())
    for one, two, tensor in zip(ours, theirs, (x, down, up), strict=True):
        assert one.dtype is tensor.dtype and one.shape == tensor.shape
        assert distance(one, two) < TOLERANCE[dtype]
    assert hidden.shape == (rows, rank) and not hidden.requires_grad


def test_saved_for_backward_are_x_and_a_rank_r_product() -> None:
    packed, state = quantized(320, 64, dtype=BF16)
    x = values(40, 64, dtype=BF16, seed=1).requires_grad_()
    down, up = values(8, 64, seed=2).requires_grad_(), values(320, 8, seed=3).requires_grad_()
    for dropout in (0.0, 0.5):
        saved: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(_noted, saved), lambda t: t):
            nf4_lora_linear(x, packed, state, down, up, 0.5, dropout=dropout)
        known = {tensor.data_ptr() for tensor in (x, down, up)}
        other = [tensor for tensor in saved if tensor.data_ptr() not in known]
        assert sorted(tensor.nbytes for tensor in other) == ([8] if dropout else []) + [40 * 8 * 2]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_is_not_contiguous(p: float) -> None:
    """Rows of a wider tensor, transposed factors, a transposed gradient."""
    weight = weight_of(*quantized(320, 64))
    tail = (None, *weight, FP32, "strips", 0.5, p, SEED if p else None)
    tensors = values(33, 90, seed=1)[:, 7:71], values(64, 8, seed=2).t(), values(8, 320, seed=3).t()
    grad = values(320, 33, seed=4).t()
    results = []
    for inputs in (tensors, [tensor.contiguous() for tensor in tensors]):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        y = nf4_lora_linear_op(*leaves, *tail)[0]
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
        grad = grad.contiguous()
    for one, two in zip(*results, strict=True):
        assert distance(one, two) < 1e-6


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", [(FP32, FP32, FP32), (BF16, FP32, FP32), (FP16, FP32, FP16)], ids=str)
def test_without_data_it_allocates_what_it_does_with_data(
    kind: Any, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tracer runs is the same code: launches left out, no allocation is. Here they are left out of
    both, for the interpreter copies what it is given.
    """
    if DEVICE == "cuda":
        pytest.skip("the tracer stands on a CPU")
    monkeypatch.setattr(nf4_dequantize, "launch", lambda *_, **__: None)
    monkeypatch.setattr(lora_dropout, "launch", lambda *_, **__: None)
    dtype, x_dtype, factor_dtype = kind
    weight = weight_of(*quantized(320, 64, dtype=dtype))
    real = [
        values(40, 320, dtype=x_dtype), values(40, 64, dtype=x_dtype, seed=1),
        values(4, 64, dtype=factor_dtype, seed=2), values(320, 4, dtype=factor_dtype, seed=3),
    ]  # fmt: skip
    tail = (weight, dtype, "strips", 0.5, p, SEED if p else None)

    def run(tensors: list[Any]) -> list[int]:
        recorder = Recorder(Tape())
        grad, x, down, up = tensors
        with torch.no_grad(), recorder:
            _, hidden = lora_forward(x, down, up, None, *tail)
            lora_gradients(grad, x, hidden, down, up, *tail, True, True)
        return list(recorder.tape.sizes)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run([mode.from_tensor(tensor) for tensor in real])
    assert run(real) == fake and len(fake) > 6


def _noted(saved: list[Any], tensor: Any) -> Any:
    saved.append(tensor)
    return tensor


def test_gradients_that_are_asked_for() -> None:
    packed, state = quantized(64, 128)
    for number in range(16):
        asked = [bool(number >> bit & 1) for bit in range(4)]
        x, down, up, bias = tensors = (
            values(20, 128, seed=1), values(4, 128, seed=2), values(64, 4, seed=3), values(64, seed=4),
        )  # fmt: skip
        for tensor, wanted in zip(tensors, asked, strict=True):
            tensor.requires_grad_(wanted)
        y = nf4_lora_linear(x, packed, state, down, up, 0.5, bias)
        assert y.requires_grad is any(asked)
        if any(asked):
            y.sum().backward()
        assert [tensor.grad is not None for tensor in tensors] == asked


def test_gradcheck_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward that is written by hand, against finite differences."""
    monkeypatch.setattr(launch, "INTERPRETED", False)  # doubles are for plain torch
    packed, state = quantized(9, 14)
    weight = [piece.cpu() if isinstance(piece, torch.Tensor) else piece for piece in weight_of(packed, state)]
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((4, 14), (3, 14), (9, 3), (9,))
    ]
    for p, seed in ((0.0, None), (0.4, SEED.cpu())):
        tail = (*weight, torch.float64, "strips", 0.5, p, seed)
        assert torch.autograd.gradcheck(partial(_output, tail), leaves)


def _output(tail: Any, *inputs: Any) -> Any:
    return nf4_lora_linear_op(*inputs, *tail)[0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_it_survives_checkpointing(reentrant: bool, dropout: float) -> None:
    """Recomputation draws the same seed, so it drops the same elements."""
    packed, state = quantized(64, 64)
    down, up = values(4, 64, seed=2).requires_grad_(), values(64, 4, seed=3).requires_grad_()

    def block(x: Any) -> Any:
        for _ in range(2):
            x = torch.relu(nf4_lora_linear(x, packed, state, down, up, 0.5, dropout=dropout))
        return x

    x = values(20, 64, seed=1).requires_grad_()
    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        results.append(
            torch.autograd.grad(run(x).sum(), (x, down, up)) if not reentrant else _accumulated(run(x), x)
        )
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def _accumulated(y: Any, x: Any) -> Any:
    x.grad = None
    y.sum().backward()
    return (x.grad,)


def test_it_traces_without_data() -> None:
    packed, state = quantized(64, 128)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 20, 128, requires_grad=True)
        down, up = torch.empty(8, 128, requires_grad=True), torch.empty(64, 8, requires_grad=True)
        y = nf4_lora_linear(x, packed, state, down, up, 0.5, dropout=0.1)
        y.sum().backward()
    assert y.shape == (2, 20, 64) and x.grad.shape == x.shape and down.grad.shape == down.shape


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_operators_are_well_formed(p: float) -> None:
    weight = weight_of(*quantized(128, 64))
    x, down, up = (
        values(3, 64).requires_grad_(),
        values(8, 64).requires_grad_(),
        values(128, 8).requires_grad_(),
    )
    tail = (*weight, FP32, "strips", 0.5, p, SEED if p else None)
    torch.library.opcheck(nf4_lora_linear_op, (x, down, up, values(128).requires_grad_(), *tail))
    torch.library.opcheck(
        nf4_lora_linear_grad_op,
        (values(3, 128), *(t.detach() for t in (x, values(3, 8), down, up)), *tail, True, True),
    )


def test_empty_input() -> None:
    packed, state = quantized(64, 128)
    x, down, up = values(0, 128), values(4, 128), values(64, 4)
    leaves = [tensor.requires_grad_() for tensor in (x, down, up)]
    y = nf4_lora_linear(x, packed, state, down, up, 0.5)
    y.sum().backward()
    assert y.shape == (0, 64) and all(leaf.grad.shape == leaf.shape for leaf in leaves)
    assert not down.grad.any() and not up.grad.any()


def test_adapters_of_another_layer_are_refused() -> None:
    packed, state = quantized(64, 128)
    with pytest.raises(KernelError, match=r"128 inputs can't multiply a tensor of the shape \(5, 256\)"):
        nf4_lora_linear(values(5, 256), packed, state, values(4, 128), values(64, 4), 0.5)
    with pytest.raises(KernelError, match=r"\(4, 127\) and \(64, 4\) don't belong"):
        nf4_lora_linear(values(5, 128), packed, state, values(4, 127), values(64, 4), 0.5)
