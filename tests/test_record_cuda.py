"""The CUDA recorder, as far as a machine without CUDA can tell: its marks leave a step as it is, and an
allocator's history becomes the tape that a dispatch mode writes of the same step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
    torch = pytest.importorskip("torch")
    for package in ("transformers", "peft", "bitsandbytes", "accelerate"):
        pytest.importorskip(package)
    from test_trace import LLAMA, allocations, large, real_step, recipe

from memplan.asked.recipe import Recipe
from memplan.cuda.card import Card
from memplan.tape import Category, Part, Phase, Tape, replay
from memplan.tape.categories import categorise
from memplan.trace.layers import Segments
from memplan.trace.recorder import Recorder
from memplan.verify import record_cuda
from memplan.verify.job import Job
from memplan.verify.measurement import Model, Run
from memplan.verify.record_cuda import Block, Cuda, Marks, tape_of

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' warnings are theirs

CPU = torch.device("cpu")
CASES = [
    {"mode": "full"},
    {"mode": "lora", "gradient_checkpointing": True, "use_reentrant": True},
    {"mode": "lora", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: threads that wait for one another cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Beside(Recorder):
    """A recorder, and marks that count its events as if they were the allocator's."""

    def __init__(self) -> None:
        super().__init__(Tape(provenance="traced"))
        self.marks = Marks(CPU, Card())
        self.marks.count = lambda: len(self.tape.events)  # type: ignore[method-assign]
        self.on_module = Segments(self)


class Both:
    """What a step tells, told to two."""

    def __init__(self, *those: Any) -> None:
        self.those = those

    def begin(self, phase: Phase, name: str, layer: int | None = None, part: Part = Part.STEP) -> None:
        for one in self.those:
            one.begin(phase, name)

    def gradients(self, parameters: Any) -> None:
        for one in self.those:
            one.gradients(parameters)


def history(tape: Tape, start: int) -> list[dict[str, Any]]:
    """A tape's events as the allocator would tell them, with noise that it has between them."""
    result: list[dict[str, Any]] = [{"action": "snapshot", "size": 0}]
    for event in tape.events[start:]:
        index = event if event >= 0 else ~event
        action = "alloc" if event >= 0 else "free_requested"
        frames = [{"name": "forward", "filename": "/x/modeling_llama.py", "line": index}]
        result.append({"action": action, "addr": 4096 * index, "size": tape.sizes[index], "frames": frames})
        if event < 0:
            result.append({"action": "free_completed", "addr": 4096 * index, "size": tape.sizes[index]})
    return result


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_history_with_marks_is_the_tape(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = recipe(attn="eager", dtype="float32", seq_len=32, **options)
    step, tensors = real_step(LLAMA, resolved)
    model, *there = tensors
    recorder = Beside()
    marks = recorder.marks
    # gradients' addresses are the tape's indices here
    addresses: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(
        Marks,
        "gradients",
        lambda self, parameters: addresses.append(
            (self.position(), [4096 * i for p in parameters if (i := recorder.index_of(p.grad)) is not None])
        ),
    )
    recorder.begin(Phase.SETUP, "before", part=Part.RESTING)
    for tensor in there:
        if isinstance(tensor, torch.Tensor):
            recorder.born(tensor, "before", Category.WEIGHTS)
    setup = len(recorder.tape.events)
    before = [Block(4096 * i, recorder.tape.sizes[i], recorder.tape.sizes[i]) for i in range(setup)]
    names = {block.address: ("", "before", Category.WEIGHTS) for block in before}
    with recorder, recorder.follow(model), marks.follow(model):
        marks.start()
        step(Both(recorder, marks))
    marks.gradient_addresses = addresses
    events = history(recorder.tape, setup)
    tape, remark = tape_of(before, names, events, marks)
    recorder.finish()
    categorise(recorder)
    truth = recorder.tape
    assert remark is None
    assert tape.provenance == "measured"
    assert tape.deltas == truth.deltas
    mine, theirs = replay(tape), replay(truth)
    assert (mine.allocated_bytes, mine.phase) == (theirs.allocated_bytes, theirs.phase)
    assert mine.by_category[Category.GRADIENTS] == theirs.by_category[Category.GRADIENTS]
    for phase in Phase:
        assert _events(tape, phase) == _events(truth, phase)
    # forward layer by layer; backward begins at a module's last operation, which views may follow
    assert _layers(tape, Phase.FORWARD) == _layers(truth, Phase.FORWARD)
    assert [layer for layer, _ in _layers(tape, Phase.BACKWARD) if layer is not None] == (
        [1, 0] * resolved.gradient_accumulation_steps
    )


def _events(tape: Tape, phase: Phase) -> list[int]:
    return [d for s in tape.segments if s.phase is phase for d in tape.deltas[s.start : s.stop]]


def _layers(tape: Tape, phase: Phase) -> list[tuple[int | None, int]]:
    """Layers in order with the bytes that each leaves or takes away; empty stretches left out."""
    found: list[tuple[int | None, int]] = []
    for s in tape.segments:
        if s.phase is phase and s.stop > s.start:
            net = sum(tape.deltas[s.start : s.stop])
            if found and found[-1][0] == s.layer:
                net += found.pop()[1]
            found.append((s.layer, net))
    return found


@pytest.mark.parametrize("options", CASES, ids=str)
def test_marks_change_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # what PyTorch's allocator does in a step without a bystander, and with one
    resolved = recipe(attn="eager", dtype="float32", seq_len=32, **options)
    step, (model, *_) = real_step(LLAMA, resolved)
    alone = allocations(step)
    monkeypatch.setattr(Marks, "count", lambda self: 0)
    marks = Marks(CPU, Card())

    def watched() -> None:
        with marks.follow(model):
            step(marks)

    assert large(allocations(watched)) == large(alone)
    assert {mark.module for mark in marks.marks if mark.phase is Phase.BACKWARD} > {"lm_head", "model.norm"}


def test_events_that_are_missing_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Marks, "count", lambda self: 3)
    marks = Marks(CPU, Card())
    events = [{"action": "alloc", "addr": 1, "size": 100, "frames": []}]
    tape, remark = tape_of([Block(7, 1024, 1000)], {}, events, marks)
    assert remark is not None
    assert "1 events and 3 were counted" in remark
    assert tape.operations == ["unattributed", "backward"]
    assert tape.sizes == [1024, 512]


def test_cublas_workspaces_are_known_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Marks, "count", lambda self: 0)
    hopper = Marks(CPU, Card((9, 0)))
    tape, _ = tape_of([Block(0, 33_554_432, 33_554_432)], {}, [], hopper)
    assert tape.operations == ["cublas_workspace"]


def test_blocks_are_found_without_addresses_of_their_own() -> None:
    segments = [
        {"device": 0, "address": 1000, "blocks": [{"state": "inactive", "size": 512}]},
        {
            "device": 0,
            "address": 4096,
            "blocks": [
                {"state": "active_allocated", "size": 512, "requested_size": 8},
                {"state": "active_awaiting_free", "size": 512, "requested_size": 8},
                {"state": "active_allocated", "size": 2048, "requested_size": 1600},
            ],
        },
        {"device": 1, "address": 9000, "blocks": [{"state": "active_allocated", "size": 512}]},
    ]
    found = record_cuda._blocks({"segments": segments}, torch.device("cuda", 0))
    assert found == [Block(4096, 512, 8), Block(5120, 2048, 1600)]


# -- torch.cuda, played ------------------------------------------------------------------------------------


class FakeCuda:
    """As much of ``torch.cuda`` as the backend calls, over the host's memory."""

    def __init__(self) -> None:
        self.fraction = 1.0
        self.recording: list[Any] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        patch = monkeypatch.setattr
        patch(torch.cuda, "current_device", lambda: 0)
        patch(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch(torch.cuda, "synchronize", lambda device=None: None)
        patch(torch.cuda, "empty_cache", lambda: None)
        patch(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
        patch(torch.cuda, "mem_get_info", lambda device=None: (60, 100))
        patch(torch._C, "_cuda_attach_out_of_memory_observer", lambda observer: None, raising=False)
        properties = type("Properties", (), {"total_memory": 1000})()
        patch(torch.cuda, "get_device_properties", lambda device: properties)
        patch(torch.cuda, "set_per_process_memory_fraction", self._cap)
        stats = {
            "allocated_bytes.all.peak": 30,
            "allocated_bytes.all.current": 20,
            "requested_bytes.all.peak": 29,
            "reserved_bytes.all.peak": 40,
            "reserved_bytes.all.current": 40,
            "num_alloc_retries": 1,
            "num_ooms": 0,
        }
        patch(torch.cuda, "memory_stats", lambda device=None: stats)
        patch(
            torch.cuda,
            "memory_stats_as_nested_dict",
            lambda device=None: {"allocation": {"all": {"allocated": 0, "freed": 0}}},
        )
        snapshot = {"segments": [], "device_traces": [[]]}
        patch(torch.cuda.memory, "_snapshot", lambda device=None: snapshot)
        patch(torch.cuda.memory, "_record_memory_history", self._record)

    def _cap(self, fraction: float, device: Any) -> None:
        self.fraction = fraction

    def _record(self, enabled: Any = "all", **options: Any) -> None:
        self.recording.append(enabled)


def job(**run: Any) -> Job:
    return Job(
        device="cuda",
        model=Model(name="tiny", config=LLAMA),
        recipe=recipe(mode="full"),
        run=Run(**run),
        predicted_bytes=0,
    )


def test_the_cap_and_the_kernels_are_in_force_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with Cuda(job(cap_bytes=250, cap_name="x", cudnn_attention=False)).environment():
        assert fake.fraction == 0.25
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() is before


def test_counters_and_history_of_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)
    seen: list[str] = []

    def train_step(*args: Any) -> Any:
        *_, marks, device = args
        marks.begin(Phase.FORWARD, "embedding")
        marks.begin(Phase.BACKWARD, "head")
        seen.append(device)
        return torch.tensor(2.0)

    monkeypatch.setattr(record_cuda, "train_step", train_step)
    backend = Cuda(job())
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    options: Recipe = recipe(mode="full")
    _, first = backend.step(1, model, optimizer, {}, options, False)
    assert fake.recording == []
    assert backend.tape is None
    loss, last = backend.step(2, model, optimizer, {}, options, True)
    assert (seen, float(loss)) == (["cuda", "cuda"], 2.0)
    assert fake.recording == ["all", None]
    assert backend.tape is not None
    assert last.model_copy(update={"number": 1}) == first
    assert (last.allocated_bytes, last.reserved_bytes, last.driver_bytes) == (30, 40, 40)
    assert last.alloc_retries == 1


def test_out_of_memory_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)

    def train_step(*args: Any) -> Any:
        *_, marks, _device = args
        marks.begin(Phase.FORWARD, "embedding")
        marks._arrive("model.layers.3.mlp.down_proj")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has ...")

    monkeypatch.setattr(record_cuda, "train_step", train_step)
    backend = Cuda(job())
    model = torch.nn.Linear(2, 2)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        backend.step(1, model, torch.optim.SGD(model.parameters()), {}, recipe(mode="full"), False)
    event = backend.out_of_memory(caught.value)
    assert (event.step, event.phase, event.module) == (1, "forward", "model.layers.3.mlp.down_proj")
    assert event.requested_bytes == 3 << 29
    assert (event.allocated_bytes, event.reserved_bytes) == (20, 40)


def test_out_of_memory_is_seen_before_the_step_is_unwound(monkeypatch: pytest.MonkeyPatch) -> None:
    # the allocator tells an observer; by the time the error arrives, modules were left and tensors freed
    fake = FakeCuda()
    fake.install(monkeypatch)
    observers: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    stats = dict(torch.cuda.memory_stats())
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device=None: stats)

    class Full(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            stats["allocated_bytes.all.current"] = 7777
            for observer in observers:
                observer(0, 2 << 20, 1000, 10)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    model = torch.nn.Sequential(torch.nn.Identity(), Full())

    def train_step(*args: Any) -> Any:
        model(torch.ones(1))

    monkeypatch.setattr(record_cuda, "train_step", train_step)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])

    def event(backend: Cuda) -> Any:
        with backend.environment(), pytest.raises(torch.OutOfMemoryError) as caught:
            backend.step(2, model, optimizer, {}, recipe(mode="full"), False)
        stats["allocated_bytes.all.current"] = 5
        return backend.out_of_memory(caught.value)

    seen = event(Cuda(job()))
    assert (seen.step, seen.module, seen.requested_bytes, seen.allocated_bytes) == (2, "1", 2 << 20, 7777)
    assert "Tried to allocate" in seen.message
    # a torch that has no observers: the module is known from the error's way
    observers.clear()
    monkeypatch.delattr(torch._C, "_cuda_attach_out_of_memory_observer")
    late = event(Cuda(job()))
    assert (late.module, late.requested_bytes, late.allocated_bytes) == ("1", 2 << 20, 5)


def test_the_trainer_says_which_step_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from memplan.verify.trainer import Counting

    fake = FakeCuda()
    fake.install(monkeypatch)
    backend = Cuda(job())
    error = torch.OutOfMemoryError("CUDA out of memory.")
    assert (backend.out_of_memory(error).step, backend.out_of_memory(error).phase) == (0, "setup")
    Counting(backend).on_step_begin(None, SimpleNamespace(global_step=1), None)
    assert (backend.out_of_memory(error).step, backend.out_of_memory(error).phase) == (2, "training")


def test_the_cache_is_emptied_once_and_after_what_was_in_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)
    order: list[str] = []
    monkeypatch.setattr(record_cuda.gc, "collect", lambda: order.append("collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: order.append("reset"))
    monkeypatch.setattr(record_cuda, "train_step", lambda *_: torch.tensor(1.0))
    backend = Cuda(job())
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    for number in (1, 2):
        backend.step(number, model, optimizer, {}, recipe(mode="full"), False)
    assert order == ["collect", "empty", "reset", "collect", "reset"]


@pytest.mark.parametrize(
    "options", [{"mode": "lora"}, {"mode": "qlora", "optimizer": "adamw_torch"}], ids=str
)
def test_the_whole_loop_runs_over_the_backend(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch.cuda is played, tensors are the host's: what is called in which order, not what it measures
    from memplan.verify.train import train

    fake = FakeCuda()
    fake.install(monkeypatch)
    what = job(steps=3, cap_bytes=500, cap_name="x").model_copy(
        update={"recipe": recipe(attn="eager", dtype="float32", seq_len=16, **options)}
    )
    backend = Cuda(what)
    backend.device = torch.device("cpu", 0)
    said: list[str] = []
    trained = train(what, backend, lambda kind, value: said.append(kind))
    assert [step.number for step in trained.steps] == [1, 2, 3]
    assert trained.evidence.real, trained.evidence.doubts
    assert fake.fraction == 0.5
    assert fake.recording == ["all", None]
    assert trained.tape is not None
    assert said.count("step") == 3
    marks = backend._marks
    assert marks is not None
    forward = [m.layer for m in marks.marks if m.phase is Phase.FORWARD and m.layer is not None]
    assert sorted(set(forward)) == [0, 1]
    assert {m.phase for m in marks.marks} == {Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER}
    assert len(marks.gradient_addresses) == 1
    assert len(marks.gradient_addresses[0][1]) == trained.evidence.trained_tensors
