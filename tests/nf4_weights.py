"""What the kernels' tests share: a device, weights of bitsandbytes, and what it makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    functional = pytest.importorskip("bitsandbytes.functional")
    default_ops = pytest.importorskip("bitsandbytes.backends.default.ops")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For every test of a module that imports it: several threads slow down what is so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def values(*shape: int, dtype: Any = torch.float32, seed: int = 0) -> Any:
    """Normally distributed numbers, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def quantized(
    rows: int,
    columns: int,
    blocksize: int = 64,
    *,
    nested: bool = True,
    dtype: Any = torch.float32,
    seed: int = 0,
) -> tuple[Any, Any]:
    """A weight packed by bitsandbytes, and its QuantState."""
    source = values(rows, columns, dtype=dtype, seed=seed)
    return functional.quantize_4bit(source, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")


def theirs(packed: Any, state: Any, dtype: Any) -> Any:
    """What bitsandbytes dequantises. Its native CPU code (0.50.2) gives other numbers where blocks run over
    the end of a row; its code in plain torch, which it takes for odd shapes, does not.
    """
    if DEVICE == "cuda" or state.shape[1] % state.blocksize == 0:
        state.dtype = dtype
        return functional.dequantize_4bit(packed, state)
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    plain = default_ops._dequantize_4bit_compute.__wrapped__  # not by way of torch.compile
    return plain(packed.reshape(-1), absmax, state.code, state.blocksize, state.shape, dtype)


def same_bits(one: Any, two: Any) -> bool:
    """Equal to the last bit, signs of zeros too."""
    kind = BITS[one.dtype]
    return one.dtype is two.dtype and one.shape == two.shape and torch.equal(one.view(kind), two.view(kind))


def distance(one: Any, two: Any) -> float:
    """Of two tensors, relative to the second's norm."""
    one, two = one.detach().double(), two.detach().double()
    return float((one - two).norm() / two.norm())
