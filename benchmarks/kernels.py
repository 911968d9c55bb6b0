"""Times memplan's kernels on a GPU against bitsandbytes, PEFT and what else is installed
(benchmarks/others.py), and whole QLoRA steps with and without them.

    python benchmarks/kernels.py [--part NAME ...] [--seconds N] [--rounds N] [--out FOLDER]
    python benchmarks/kernels.py --rehearse

All candidates of a case take turns in the same run, so that clocks and heat are the same for all; medians and
the 10th and 90th percentile of the rounds are kept, beside ceilings measured in the same run: what a copy
moves, what a 16-bit product computes. Each run becomes one file with the device and the versions, written
anew after every case, so that a run that is cut off keeps what it has; docs/kernels.md is made from them
(python docs/generate.py). What matters most comes first, and no case begins after ``--seconds``. A candidate
that fails in a case is left out of it, and the record says with which error; so is a part that fails.
``--rehearse`` goes through everything in small sizes on a CPU and keeps nothing: what it prints are no
measurements.
"""

from __future__ import annotations

import sys
from pathlib import Path

# This file has the name of a Hugging Face library that transformers looks for: its folder must not be on the
# path.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]

import argparse
import importlib.util
import json
import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median, quantiles
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import nn

from memplan import kernels
from memplan.kernels import strips
from memplan.kernels.nf4_dequantize import dequantize_into, nf4_dequantize
from memplan.kernels.nf4_linear import nf4_linear, scratch_bytes
from memplan.kernels.nf4_quantize import nf4_quantize
from memplan.kernels.weight import weight_of
from memplan.losses.liger import chunk_size

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "measurements" / "kernels"
LIBRARIES = (
    "memplan", "torch", "triton", "bitsandbytes", "peft", "transformers",
    "torchao", "unsloth", "liger_kernel", "trl", "cut_cross_entropy",
)  # fmt: skip

Candidates = dict[str, Callable[[], object]]

# [outputs, inputs] of a layer's matrices
SHAPES = {
    "llama-3.1-8b": {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "up_proj": (14336, 4096),
                     "down_proj": (4096, 14336)},
    "llama-3.3-70b": {"q_proj": (8192, 8192), "k_proj": (1024, 8192), "up_proj": (28672, 8192),
                      "down_proj": (8192, 28672)},
}  # fmt: skip
ROWS = (2048, 512, 8192, 1024, 4096, 16384)  # the middle first
CASE_SECONDS = 2.0  # a case has fewer rounds than were asked for, where they take longer
STEP_SECONDS = 20.0
LEAST_ROUNDS, LEAST_STEPS = 5, 3
SMALL_SHAPES = {"rehearsal": {"up_proj": (384, 128), "down_proj": (128, 384)}}
SMALL_ROWS = (32,)
HEADS = {"llama-3.1-8b": (128256, 4096), "llama-3.3-70b": (128256, 8192), "qwen-2.5-7b": (152064, 3584)}
TOKENS = (2048, 8192)
CHUNKS = (64, 256, 1024)  # rows whose logits are made at once; Liger's are 64 for a Llama 3 at 2048 tokens
SMALL_HEADS, SMALL_TOKENS, SMALL_CHUNKS = {"rehearsal": (500, 64)}, (48,), (16,)
STRIPS = (strips.STRIP_BYTES, 16 << 20, 8 << 20)  # what is taken today, and smaller
SMALL_STRIPS = (strips.STRIP_BYTES, 1 << 15)
RANK = 16
DEVICE_ERRORS = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()  # since torch 2.8


def beside(name: str) -> ModuleType:
    """A module of this folder, which is not on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


others = beside("others")


class Bench:
    """Where and how often things are timed, and what other libraries there are to time."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        real = device == "cuda"
        self.shapes = SHAPES if real else SMALL_SHAPES
        self.rows: tuple[int, ...] = ROWS if real else SMALL_ROWS
        self.strips: tuple[int, ...] = STRIPS if real else SMALL_STRIPS
        self.heads = HEADS if real else SMALL_HEADS
        self.tokens: tuple[int, ...] = TOKENS if real else SMALL_TOKENS
        self.chunks: tuple[int, ...] = CHUNKS if real else SMALL_CHUNKS
        # larger than any L2 cache: written before each call, so that it finds its weight in memory, as in a
        # step, and so that the call is launched while the card is busy, as in a step
        self.flush = torch.empty(256 << 20 if device == "cuda" else 1, dtype=torch.int8, device=device)
        self.dice = random.Random(0)
        self.absent: dict[str, str] = {}  # libraries that were looked for, and why they are left out

    @cached_property
    def nf4(self) -> dict[str, Any]:
        """The other libraries that have NF4."""
        found, absent = others.found(others.NF4)
        self.absent.update(absent)
        return found

    @cached_property
    def losses(self) -> dict[str, Any]:
        """The libraries that have a loss, each with its candidates."""
        found, absent = others.found(others.LOSSES)
        self.absent.update(absent)
        return found

    def turns(self, seconds: float, least: int = LEAST_ROUNDS) -> Iterator[int]:
        """Rounds, as many as there is time for, but at least some."""
        start = time.monotonic()
        for number in range(self.rounds):
            if number >= least and time.monotonic() - start > seconds:
                return
            yield number

    def measure(
        self,
        candidates: Candidates,
        *,
        before: Callable[[str], object] = lambda name: None,
        seconds: float = CASE_SECONDS,
        least: int = LEAST_ROUNDS,
        warm: int = 3,
        whole: bool = False,
    ) -> dict[str, Any]:
        """Microseconds of each candidate, taking turns in changing order, and bytes that it allocates; of
        those that fail, the error's name. ``before`` is called with a candidate's name before its turn.
        """
        failed = {}
        for name, run in candidates.items():
            before(name)
            error = self.failure(run, warm)
            if error:
                failed[name] = error
        running = {name: run for name, run in candidates.items() if name not in failed}
        found: dict[str, list[float]] = {name: [] for name in running}
        for _ in self.turns(seconds, least):
            order = list(running)
            self.dice.shuffle(order)
            for name in order:
                before(name)
                found[name].append(self.one(running[name]))
        peaks = {}
        for name, run in running.items():
            before(name)
            peaks[name] = self.peak(run, whole=whole)
        times = {name: spread(values) for name, values in found.items()}
        return {"times": times, "peak_bytes": peaks, "failed": failed}

    def failure(self, run: Callable[[], object], warm: int) -> str | None:
        """Warms a candidate up: compiles, chooses algorithms, fills the allocator. The name of the error that
        this ends in, if it does. An error of the device itself is raised: nothing runs on it after that.
        """
        try:
            for _ in range(warm):
                run()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return None
        except Exception as error:
            if isinstance(error, DEVICE_ERRORS):
                raise
            print(f"fails: {error!r:.200}", flush=True)
            name = type(error).__name__
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return name

    def one(self, run: Callable[[], object]) -> float:
        """Microseconds that the device spends on one call."""
        if self.device == "cpu":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self.flush.zero_()
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) * 1e3

    def peak(self, run: Callable[[], object], *, whole: bool = False) -> int | None:
        """Bytes that a call allocates at most, beyond what is there unless ``whole``; None on a CPU."""
        if self.device == "cpu":
            run()
            return None
        torch.cuda.synchronize()
        before = 0 if whole else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the 10th and 90th percentile, in microseconds, of how many rounds."""
    low, high = (values[0],) * 2 if len(values) < 2 else quantiles(values, n=10, method="inclusive")[::8]
    return {"median_us": median(values), "p10_us": low, "p90_us": high, "rounds": len(values)}


# -- parts -------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> dict[str, float]:
    """What the card reaches at best: bytes a second of a copy (read and written), FLOP/s of a bf16
    product.
    """
    size, side = (1 << 30, 8192) if bench.device == "cuda" else (1 << 16, 64)
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    found = bench.measure({"copy": lambda: target.copy_(source), "product": lambda: left @ right})["times"]
    return {
        "copy_bytes_per_s": 2 * size / found["copy"]["median_us"] * 1e6,
        "product_flop_per_s": 2 * side**3 / found["product"]["median_us"] * 1e6,
    }


def weights(bench: Bench, nested: bool = True) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    """Every shape: what it is, packed codes, state."""
    for model, matrices in bench.shapes.items():
        for name, shape in matrices.items():
            source = torch.randn(shape, dtype=torch.bfloat16, device=bench.device)
            packed, state = bnb_functional.quantize_4bit(source, compress_statistics=nested, quant_type="nf4")
            yield {"model": model, "matrix": name, "shape": shape, "nested": nested}, packed, state


def dequantize(bench: Bench) -> Iterator[dict[str, Any]]:
    """The whole weight to bf16; ``bytes`` is what has to be moved."""
    for nested in (True, False):
        for case, packed, state in weights(bench, nested):
            weight = weight_of(packed, state)
            whole = (0, weight.rows), (0, weight.columns)
            out = torch.empty(case["shape"], dtype=torch.bfloat16, device=bench.device)
            candidates: Candidates = {
                "bitsandbytes": lambda: bnb_functional.dequantize_4bit(packed, state),  # noqa: B023
                "memplan": lambda: nf4_dequantize(packed, state),  # noqa: B023
                "table": lambda: dequantize_into(out, weight, *whole),  # noqa: B023
                "comparisons": lambda: dequantize_into(out, weight, *whole, select=True),  # noqa: B023
                **others.equivalents(bench.nf4, "dequantize", packed, state),
            }
            theirs = bnb_functional.dequantize_4bit(packed, state)
            count = weight.rows * weight.columns
            scales = 1 / 64 + 4 / (64 * 256) if nested else 4 / 64
            yield {
                "case": case,
                "bytes": round(count * (0.5 + scales + 2)),
                "equal": bool(torch.equal(theirs, nf4_dequantize(packed, state))),
                **bench.measure(candidates),
            }


def quantize(bench: Bench) -> Iterator[dict[str, Any]]:
    """bf16 to packed codes and fp32 scales."""
    for case, packed, state in weights(bench, nested=False):
        source = nf4_dequantize(packed, state)
        candidates: Candidates = {
            "bitsandbytes": lambda: bnb_functional.quantize_4bit(source, quant_type="nf4"),  # noqa: B023
            "memplan": lambda: nf4_quantize(source),  # noqa: B023
        }
        theirs, ours = (run()[0] for run in candidates.values())  # type: ignore[index]
        candidates |= others.equivalents(bench.nf4, "quantize", source)
        yield {
            "case": case,
            "bytes": round(source.numel() * (2 + 0.5 + 4 / 64)),
            "equal": bool(torch.equal(theirs, ours)),
            **bench.measure(candidates),
        }


@contextmanager
def strips_of(size: int) -> Iterator[None]:
    """The kernels cut weights into strips of at most ``size`` bytes."""
    before, strips.STRIP_BYTES = strips.STRIP_BYTES, size
    try:
        yield
    finally:
        strips.STRIP_BYTES = before


def cut(size: int, run: Callable[[], object]) -> Callable[[], object]:
    """A call with strips of that size."""

    def called() -> object:
        with strips_of(size):
            return run()

    return called


def cuts(sizes: tuple[int, ...], shape: tuple[int, int]) -> dict[str, tuple[int, tuple[int, int]]]:
    """By a candidate's name the size that it cuts by, and the bytes of a strip of this weight, forward and
    backward; of sizes that cut it alike only the first.
    """
    found: dict[tuple[int, int], int] = {}
    for size in sizes:
        with strips_of(size):
            found.setdefault(scratch_bytes(shape, 2), size)
    return {f"strips {size / 2**20:g} MiB": (size, held) for held, size in found.items()}


def linear(bench: Bench) -> Iterator[dict[str, Any]]:
    """x @ W.T and the gradient of x: which method is fastest at which shape. ``dense`` is the product by a
    weight that is 16-bit already.
    """
    for case, packed, state in weights(bench):
        dense = nf4_dequantize(packed, state)
        outputs, inputs = case["shape"]
        sizes = cuts(bench.strips, case["shape"])
        theirs = others.equivalents(bench.nf4, "linear", packed, state)
        for rows in bench.rows:
            x = torch.randn(rows, inputs, dtype=torch.bfloat16, device=bench.device, requires_grad=True)
            grad = torch.randn(rows, outputs, dtype=torch.bfloat16, device=bench.device)
            ours = partial(nf4_linear, x, packed, state)
            runs: Candidates = {
                "bitsandbytes": partial(bnb.matmul_4bit, x, packed, quant_state=state),
                **{name: cut(size, ours) for name, (size, _) in sizes.items()},
                "fused": partial(ours, method="fused"),
                **{name: partial(run, x) for name, run in theirs.items()},
                "dense": partial(nn.functional.linear, x, dense),
            }
            forward = bench.measure(runs)
            gradients: Candidates = {
                name: partial(torch.autograd.grad, runs[name](), x, grad, retain_graph=True)
                for name in forward["times"]
            }
            gradients |= {name: cut(sizes[name][0], run) for name, run in gradients.items() if name in sizes}
            backward = bench.measure(gradients)
            for number, (direction, found) in enumerate((("forward", forward), ("backward", backward))):
                yield {
                    "case": {**case, "rows": rows, "direction": direction},
                    "flop": 2 * rows * outputs * inputs,
                    "strip_bytes": {name: held[number] for name, (_, held) in sizes.items()},
                    **found,
                }


def loss(bench: Bench) -> Iterator[dict[str, Any]]:
    """Linear + cross entropy with a frozen head: the loss and the gradient of the hidden states, which takes
    two products. ``products N`` are those two alone, N rows at a time: what no loss in chunks of N rows can
    beat. ``distance`` is a gradient's from the stock one, relative to its norm.
    """
    for model, (vocabulary, hidden) in bench.heads.items():
        weight = torch.empty(vocabulary, hidden, dtype=torch.bfloat16, device=bench.device).normal_(0, 0.02)
        for tokens in bench.tokens:
            x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=bench.device, requires_grad=True)
            targets = torch.randint(vocabulary, (tokens,), device=bench.device)
            losses: dict[str, Callable[[], Any]] = {
                name: partial(gradient, compute, x, weight, targets)
                for candidates in bench.losses.values()
                for name, compute in candidates.items()
            }
            alone: Candidates = {
                f"products {rows}": partial(products, x.detach(), weight, rows) for rows in bench.chunks
            }
            alone["products all"] = partial(products, x.detach(), weight, tokens)
            found = bench.measure({**losses, **alone})
            stock = gradient(bench.losses["transformers"]["stock"], x, weight, targets).float()
            distances = {
                name: float((run().float() - stock).norm() / stock.norm())
                for name, run in losses.items()
                if name in found["times"]
            }
            rows = chunk_size(tokens, hidden, vocabulary)
            yield {
                "case": {
                    "model": model,
                    "tokens": tokens,
                    "hidden": hidden,
                    "vocabulary": vocabulary,
                    "liger_rows": rows,
                },
                "flop": 4 * tokens * hidden * vocabulary,
                "distance": distances,
                **found,
            }


def gradient(compute: Any, x: Any, weight: Any, targets: Any) -> Any:
    """Of the hidden states x [tokens, H]; the weight [V, H] has none."""
    return torch.autograd.grad(compute(x, weight, targets), x)[0]


def products(x: Any, weight: Any, rows: int) -> Any:
    """Logits of some rows at a time, and the product by which a gradient of theirs becomes that of x."""
    out = torch.empty_like(x)
    logits = x.new_empty((rows, weight.shape[0]))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        torch.mm(part, weight.t(), out=logits[: len(part)])
        torch.mm(logits[: len(part)], weight, out=out[start : start + rows])
    return out


def lora(bench: Bench) -> Iterator[dict[str, Any]]:
    """Forward and backward of PEFT's layer, stock, patched and as others run it, with a residual stream in
    bf16 and in fp32.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for case, packed, state in weights(bench):
        outputs, inputs = case["shape"]
        for rows in bench.rows:
            for dtype in (torch.bfloat16, torch.float32):
                for dropout in (0.0, 0.05):
                    model = nn.Module()
                    model.proj = layer_of(packed, state, outputs, inputs)
                    model.is_loaded_in_4bit = True
                    config = LoraConfig(
                        r=RANK, lora_dropout=dropout, target_modules=["proj"], init_lora_weights=False
                    )
                    inject_adapter_in_model(config, model)
                    model.to(bench.device).train()
                    x = torch.randn(rows, inputs, dtype=dtype, device=bench.device, requires_grad=True)
                    grad = torch.randn(rows, outputs, dtype=dtype, device=bench.device)

                    def step(layer: Any, x: Any = x, grad: Any = grad) -> None:
                        layer(x).backward(grad)

                    theirs = others.equivalents(bench.nf4, "lora", model.proj)
                    layers = {"stock": model.proj, "memplan": model.proj, **theirs}
                    yield {
                        "case": {**case, "rows": rows, "dtype": str(dtype), "dropout": dropout, "rank": RANK},
                        "flop": 4 * rows * outputs * inputs,
                        **bench.measure(
                            {name: partial(step, layer) for name, layer in layers.items()},
                            before=partial(put, model),
                            least=LEAST_STEPS,
                        ),
                    }


def layer_of(packed: Any, state: Any, outputs: int, inputs: int) -> Any:
    """bitsandbytes' layer around a weight that is packed already."""
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
    )
    layer.quant_state = state
    return layer


def put(model: Any, name: str) -> None:
    """The kernels into a model for memplan's turn, and out of it for the others'."""
    (kernels.apply if name == "memplan" else kernels.remove)(model)


def steps(model_name: str, bench: Bench) -> Iterator[dict[str, Any]]:
    """Whole QLoRA steps, stock and with the kernels: benchmarks/qlora_step.py. Peaks are all that is
    allocated, as a plan's, but for what else this program holds.
    """
    qlora_step = beside("qlora_step")
    for options in qlora_step.RECIPES[model_name]:
        held = 0 if bench.device == "cpu" else torch.cuda.memory_allocated()
        case, model, step = qlora_step.case(model_name, options, bench.device)
        found = bench.measure(
            {"stock": step, "memplan": step},
            before=partial(put, model),
            seconds=STEP_SECONDS,
            least=LEAST_STEPS,
            warm=2,
            whole=True,
        )
        del model, step
        qlora_step.forget()  # before the next: two 70Bs don't fit
        peaks = {name: None if peak is None else peak - held for name, peak in found["peak_bytes"].items()}
        yield {"case": case, **found, "peak_bytes": peaks}


# the most important first, and what takes seconds before what takes minutes
PARTS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "nf4_dequantize": dequantize,
    "step_8b": partial(steps, "llama-3.1-8b"),
    "loss": loss,
    "nf4_quantize": quantize,
    "nf4_linear": linear,
    "step_70b": partial(steps, "llama-3.3-70b"),
    "nf4_lora_linear": lora,
}
# of the whole time, where there is not enough for all: what a part must leave to those after it
SHARES = {
    "nf4_dequantize": 0.1, "step_8b": 0.3, "loss": 0.4, "nf4_quantize": 0.45, "nf4_linear": 0.68,
    "step_70b": 0.9,
}  # fmt: skip


# -- the run -----------------------------------------------------------------------------------------------


def device_record(device: str) -> dict[str, Any]:
    """Which card, and what drives it."""
    if device == "cpu":
        return {"name": "a CPU: a rehearsal, nothing is measured"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def installed(name: str) -> str:
    """A library's version; memplan itself may run from a checkout."""
    try:
        return version(name)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(name), "__version__", "not installed"))


def run(
    parts: list[str],
    bench: Bench,
    *,
    seconds: float = 1e9,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """One run's record, given to ``keep`` after every case. A part begins no case after its share of
    ``seconds``, where all parts run.
    """
    start = time.monotonic()
    record: dict[str, Any] = {
        "about": "Program output: benchmarks/kernels.py. Measured on the device that is named.",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_record(bench.device),
        "versions": {name: installed(name) for name in LIBRARIES},
        "rounds": bench.rounds,
        "ceilings": ceilings(bench),
        "absent": bench.absent,
        "cut_short": [],
        "failed": {},
        "results": [],
    }
    for part in parts:
        share = SHARES.get(part, 1.0) if parts == list(PARTS) else 1.0
        cases = PARTS[part](bench)
        try:
            while time.monotonic() - start < share * seconds:
                result = next(cases, None)
                if result is None:
                    break
                record["results"].append({"part": part, **result})
                print(part, line(result), flush=True)
                if keep is not None:
                    keep(record)
            else:
                record["cut_short"].append(part)
                print(f"{part}: no time for more", flush=True)
        except Exception as error:
            if isinstance(error, DEVICE_ERRORS):
                raise
            traceback.print_exc()
            record["failed"][part] = type(error).__name__
        cases.close()  # type: ignore[attr-defined]
    if keep is not None:
        keep(record)
    return record


def line(result: dict[str, Any]) -> str:
    """A result in a line."""
    case = " ".join(str(value) for value in result["case"].values())
    times = ", ".join(f"{name} {found['median_us']:.0f}" for name, found in result["times"].items())
    failed = "".join(f", {name}: {error}" for name, error in result["failed"].items())
    return f"{case}: {times} µs{failed}" + ("" if result.get("equal", True) else "  NOT EQUAL")


def told(record: dict[str, Any]) -> str | None:
    """A sentence on the parts that failed, if any did."""
    return f"failed: {', '.join(record['failed'])}" if record["failed"] else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Times memplan's kernels.")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="what to time (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=480.0, help="begin no case after them (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=30, help="turns of each candidate (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the result (default: %(default)s)"
    )
    parser.add_argument("--rehearse", action="store_true", help="small sizes on a CPU; nothing is kept")
    arguments = parser.parse_args()
    parts = arguments.part or list(PARTS)
    if arguments.rehearse:
        print("Rehearsal on a CPU, in small sizes: these times are no measurements, and nothing is kept.")
        record = run(parts, Bench("cpu", 2))
        print(f"{len(json.dumps(record))} bytes of results forgotten")
        sys.exit(told(record))
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here to measure; --rehearse goes through it all on a CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path: list[Path] = []

    def keep(record: dict[str, Any]) -> None:
        name = f"{record['device']['name']}-{record['started']}".lower().replace(" ", "-").replace(":", "")
        path[:] = [arguments.out / f"{name}.json".replace("+", "-")]
        beside = path[0].with_suffix(".part")
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        beside.replace(path[0])

    record = run(parts, Bench("cuda", arguments.rounds), seconds=arguments.seconds, keep=keep)
    print(f"wrote {path[0]}")
    sys.exit(told(record))


if __name__ == "__main__":
    main()
