"""The tracer: its recorder agrees with PyTorch's own allocator, and its tapes with published facts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
    torch = pytest.importorskip("torch")
    for package in ("transformers", "peft", "bitsandbytes", "accelerate"):
        pytest.importorskip(package)
    from memplan.trace import trace

from memplan.asked.recipe import Recipe
from memplan.cuda.card import Card
from memplan.errors import TraceError
from memplan.tape import Category, Part, Phase, Tape, replay, static_bytes
from memplan.trace.modules import build
from memplan.trace.optimizers import make_optimizer
from memplan.trace.recorder import Recorder
from memplan.trace.step import make_batch, train_step

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' warnings are theirs

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
GEMMA2 = {**LLAMA, "model_type": "gemma2", "sliding_window": 64, "query_pre_attn_scalar": 32}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def recipe(**options: Any) -> Recipe:
    return Recipe(trainer="peft", **{"mode": "full", "batch_size": 2, "seq_len": 128, **options}).resolved()


@contextmanager
def recording(standins: dict[Any, Any] | None = None) -> Iterator[Recorder]:
    """The recorder alone, told nothing."""
    recorder = Recorder(Tape(provenance="traced"), standins)
    recorder.begin(Phase.SETUP, "setup", part=Part.RESTING)
    with recorder:
        yield recorder
    recorder.finish()


def events(tape: Tape, phase: Phase | None = None) -> list[tuple[int, str]]:
    """Each event's change in live bytes, and the operation whose storage it is."""
    found = []
    for segment in tape.segments:
        if phase in (None, segment.phase):
            for position in range(segment.start, segment.stop):
                event = tape.events[position]
                found.append((tape.deltas[position], tape.operations[event if event >= 0 else ~event]))
    return found


# -- the recorder against PyTorch's allocator ------------------------------------------------------------


def real_step(config: dict[str, Any], options: Recipe) -> tuple[Callable[..., None], list[Any]]:
    """A step on a CPU with real tensors, its first already taken; and all tensors that it starts with."""
    torch.manual_seed(0)
    model = build(config, options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = make_optimizer(model, options)
    batch = make_batch(options)

    def step(recorder: Any = None) -> None:
        train_step(model, optimizer, batch, options, recorder)

    step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return step, [model, *model.parameters(), *model.buffers(), *batch.values(), *states]


def allocations(step: Callable[..., None]) -> list[int]:
    """What PyTorch's CPU allocator does during a step without any dispatch mode, as its profiler saw it."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    found = []

    def walk(event: Any) -> None:
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
        for child in event.children:
            walk(child)

    for event in profiler.profiler.kineto_results.experimental_event_tree():
        walk(event)
    return [size for _, size in sorted(found)]


def large(deltas: list[int]) -> list[int]:
    """Rounded to 512 bytes, without those of one block (CPU scalars) and without the random state, which
    checkpointing keeps in host memory (5,056 bytes)."""
    rounded = [(abs(d) + 511) // 512 * 512 * (1 if d > 0 else -1) for d in deltas]
    return [delta for delta in rounded if abs(delta) not in (512, 5120)]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LLAMA, {}),
        (LLAMA, {"gradient_accumulation_steps": 2, "optimizer": "adamw_torch"}),
        (LLAMA, {"gradient_checkpointing": True}),
        (LLAMA, {"gradient_checkpointing": True, "use_reentrant": True}),
        (LLAMA, {"mode": "lora", "lora_dropout": 0.1, "use_dora": True}),
        (QWEN2, {"mode": "lora", "gradient_checkpointing": True, "use_reentrant": True}),
        (GEMMA2, {}),
    ],
    ids=lambda value: value.get("model_type", " ".join(value)) if isinstance(value, dict) else None,
)
def test_recorder_sees_what_the_allocator_does(config: dict[str, Any], options: dict[str, Any]) -> None:
    # In fp32 and with eager attention the CPU's kernels need no scratch, so the two must be equal: births
    # and deaths, in order, additions of gradients in place included.
    step, tensors = real_step(config, recipe(attn="eager", dtype="float32", seq_len=64, **options))
    truth = allocations(step)
    model, *tensors = tensors
    with recording() as recorder, recorder.follow(model):
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                recorder.born(tensor, "before")
        step(recorder)
    tape = recorder.tape
    start = next(s.start for s in tape.segments if s.phase is Phase.FORWARD)
    assert large(tape.deltas[start:]) == large(truth)
    assert recorder.inplace_accumulations > 0


@pytest.mark.parametrize("held", [False, True])
def test_engine_adds_into_a_gradient_that_nobody_else_holds(held: bool) -> None:
    # torch/csrc/autograd/input_buffer.cpp, without a mode: what the recorder restores when it is on.
    made: list[tuple[int, Any]] = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            out = grad * 2
            made.append((out.data_ptr(), out if held else None))
            return out

    x = torch.ones(1000, requires_grad=True) * 2
    summed: list[int] = []
    x.register_hook(lambda grad: summed.append(grad.data_ptr()))
    (Spy.apply(x) + Spy.apply(x)).sum().backward()
    assert (summed == [made[0][0]]) is not held


def test_fake_tensors_change_nothing() -> None:
    # The same recorder around real and around fake tensors writes the same tape.
    from torch._subclasses.fake_tensor import FakeTensorMode

    from memplan.trace.modules import fake_modules
    from memplan.trace.optimizers import warm_up

    options = recipe(attn="eager", dtype="bfloat16", gradient_checkpointing=True)
    step, tensors = real_step(LLAMA, options)
    with recording() as real:
        for tensor in tensors[1:]:
            if isinstance(tensor, torch.Tensor):
                real.born(tensor, "before")
        step(real)
    with FakeTensorMode(allow_non_fake_inputs=True), fake_modules():
        model = build(LLAMA, options)
        optimizer = make_optimizer(model, options)
        warm_up(optimizer)
        batch = make_batch(options)
        with recording() as fake:
            states = [value for state in optimizer.state.values() for value in state.values()]
            for tensor in (*model.parameters(), *model.buffers(), *batch.values(), *states):
                fake.born(tensor, "before")
            train_step(model, optimizer, batch, options, fake)
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        assert events(fake.tape, phase) == events(real.tape, phase)


# -- tapes ------------------------------------------------------------------------------------------------

MATRIX = [
    {"mode": "full"},
    {"mode": "full", "dtype": "float32", "autocast": True, "gradient_accumulation_steps": 2},
    {"mode": "full", "optimizer": "adamw_torch", "gradient_checkpointing": True},
    {"mode": "full", "optimizer": "adafactor", "attn": "flash_attention_2"},
    {"mode": "lora", "lora_dropout": 0.05, "modules_to_save": ("lm_head",)},
    {"mode": "lora", "gradient_checkpointing": True, "use_reentrant": True, "optimizer": "adamw_bnb_8bit"},
    {"mode": "qlora"},
    {"mode": "qlora", "kbit_prep": False, "gradient_checkpointing": True, "autocast": True},
    {"mode": "qlora", "use_dora": True, "double_quant": False, "optimizer": "paged_lion_8bit"},
]


@pytest.mark.parametrize("options", MATRIX, ids=lambda options: " ".join(map(str, options.values())))
def test_a_step_leaves_nothing_behind(options: dict[str, Any]) -> None:
    tape = trace(LLAMA, recipe(**options))
    assert sum(tape.deltas) == sum(static_bytes(tape).values())
    born: set[int] = set()
    for event in tape.events:
        if event >= 0:
            assert event not in born
            born.add(event)
        else:
            assert ~event in born
    assert [s.start for s in tape.segments[1:]] == [s.stop for s in tape.segments[:-1]]
    assert tape.segments[-1].stop == len(tape.events)
    assert tape.provenance == "traced"


@pytest.mark.parametrize("config", [QWEN2, GEMMA2, MIXTRAL], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("mode", ["full", "qlora"])
def test_families_trace(config: dict[str, Any], mode: str) -> None:
    tape = trace(config, recipe(mode=mode))
    layers = [s.layer for s in tape.segments if s.phase is Phase.BACKWARD and s.layer is not None]
    assert sorted(set(layers)) == [0, 1]
    assert layers[0] == 1


def test_llama_3_8b_weighs_what_is_published() -> None:
    # 8,030,261,248 parameters in 16 bits, and two rotary buffers of 64 fp32 values
    tape = trace({**LLAMA_8B, "num_hidden_layers": 1}, recipe(mode="lora"))
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336 + 2 * 4096
    outside = 2 * 128256 * 4096 + 4096
    assert 32 * layer + outside == 8_030_261_248
    assert static_bytes(tape)[Category.WEIGHTS] == 2 * (layer + outside) + 2 * 512


def test_nf4_with_double_quantisation() -> None:
    # Half a byte a weight, a byte for 64 weights, four for 256 of those, and for every layer its offset
    # and both codes; the map of 256 values is the card's one copy.
    config = {**LLAMA_8B, "num_hidden_layers": 1}
    tape = trace(config, recipe(mode="qlora", kbit_prep=False))
    linears = [4096 * 4096] * 2 + [4096 * 1024] * 2 + [4096 * 14336] * 3
    state = sum(n // 64 + 4 * n // 64 // 256 + 512 + 512 + 1024 for n in linears) + 1024
    assert static_bytes(tape)[Category.QUANTIZATION_STATE] == state
    outside = 2 * (2 * 128256 * 4096 + 3 * 4096) + 2 * 512
    assert static_bytes(tape)[Category.WEIGHTS] == sum(linears) // 2 + outside


def test_training_rows_dequantise_the_whole_weight() -> None:
    # bitsandbytes 0.50 backends/cuda/ops.py _dequant_linear_fallback
    tape = trace(LLAMA_8B | {"num_hidden_layers": 1}, recipe(mode="qlora", seq_len=1024, dtype="bfloat16"))
    gate = [
        tape.sizes[index]
        for index, module in enumerate(tape.modules)
        if module == "model.layers.0.mlp.gate_proj.base_layer" and tape.operations[index] == "gemm_4bit"
    ]
    scales = 4096 * 14336 // 64 * 4
    assert gate[:4] == [scales, scales, 4096 * 14336 * 2, 2 * 1024 * 14336 * 2]


def test_flash_attention_saves_a_log_sum_exp_a_row() -> None:
    tape = trace(LLAMA, recipe(mode="lora", seq_len=1024))
    operation = "_scaled_dot_product_flash_attention"
    forward = [tape.sizes[i] for i, name in enumerate(tape.operations) if name == operation]
    rows = 2 * 8 * 1024
    assert forward[:4] == [rows * 32 * 2, rows * 4, 512, 512]


@pytest.mark.parametrize("causal", [False, True])
def test_the_math_kernel_is_what_pytorch_composes(causal: bool) -> None:
    # attention.py writes _scaled_dot_product_attention_math out, because it adds its mask out of place while
    # a mode is on: on a CPU the two allocate the same, in the same order, but for what only CUDA's
    # backward of the softmax has.
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from memplan.trace.attention import math_attention
    from memplan.trace.standins import OPERATORS

    q, k, v = (torch.randn(2, heads, 64, 32, requires_grad=True) for heads in (8, 2, 2))

    def composed() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        out.backward(torch.ones_like(out))

    composed()
    q.grad = k.grad = v.grad = None
    truth = allocations(composed)
    q.grad = k.grad = v.grad = None
    only_on_cuda = torch.ops.aten._softmax_backward_data.default
    with recording({key: value for key, value in OPERATORS.items() if key is not only_on_cuda}) as recorder:
        for tensor in (q, k, v):
            recorder.born(tensor, "before")
        start = len(recorder.tape.events)
        recorder.begin(Phase.FORWARD, "forward")
        out = math_attention(q, k, v, None, 0.0, causal, None, True)
        recorder.begin(Phase.BACKWARD, "backward")
        out.backward(torch.ones_like(out))
        del out
    births = [delta for delta in large(recorder.tape.deltas[start:]) if delta > 0]
    assert births == [delta for delta in large(truth) if delta > 0]


def test_fp32_grouped_queries_fall_to_the_math_kernel() -> None:
    # what prepare_model_for_kbit_training brings on a model with grouped queries unless autocast is on
    def operations(**options: Any) -> set[str]:
        return set(trace(LLAMA, recipe(mode="qlora", **options)).operations)

    assert "_safe_softmax" in operations()
    assert "_safe_softmax" not in operations(autocast=True)
    assert "_safe_softmax" not in operations(kbit_prep=False)


def test_small_flash_attention_splits_its_keys() -> None:
    from memplan.cuda.attention import key_splits

    assert key_splits(Card(), 8, 2048, 512, 128) == 1  # 8 heads of 2,048 rows fill an A100
    assert key_splits(Card(), 8, 128, 2048, 128) > 1


def test_hopper_takes_cudnn() -> None:
    tape = trace(LLAMA, recipe(mode="lora"), compute_capability=(9, 0))
    assert "_scaled_dot_product_cudnn_attention" in tape.operations
    assert "_scaled_dot_product_flash_attention" not in tape.operations


def test_checkpointing_keeps_one_residual_a_layer() -> None:
    def saved(**options: Any) -> int:
        tape = trace(LLAMA, recipe(mode="full", seq_len=512, **options))
        return replay(tape).by_category[Category.ACTIVATIONS]

    assert saved(gradient_checkpointing=True) < saved() / 2


def test_paged_states_are_not_on_the_card() -> None:
    paged = static_bytes(trace(LLAMA, recipe(optimizer="paged_adamw_32bit")))
    plain = static_bytes(trace(LLAMA, recipe(optimizer="adamw_torch")))
    assert 0 < paged[Category.OPTIMIZER_STATE] < plain[Category.OPTIMIZER_STATE]


def test_workspaces_grow_with_hopper() -> None:
    def workspaces(capability: tuple[int, int]) -> list[int]:
        tape = trace(LLAMA, recipe(mode="lora"), compute_capability=capability)
        return [tape.sizes[i] for i, name in enumerate(tape.operations) if name == "cublas_workspace"]

    assert workspaces((8, 0)) == [8_519_680] * 2
    assert workspaces((9, 0)) == [33_554_432] * 2
    assert Card((8, 6)).cublas_workspace == 8_519_680


def test_what_cannot_be_traced_says_so() -> None:
    with pytest.raises(TraceError, match="model_type"):
        trace({key: value for key, value in LLAMA.items() if key != "model_type"}, recipe())
