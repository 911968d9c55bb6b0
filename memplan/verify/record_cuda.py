"""Training on a CUDA card, measured by its caching allocator; the last step becomes a tape.

Nothing intercepts operators: a dispatch mode would change what autograd allocates. The allocator's own event
history says what was allocated and freed, in order, with the Python frames of each allocation. Which part of
the step an event belongs to follows from *marks*: module hooks, and hooks before the backward of each
module's last operation, note how many allocations and frees there have been. The allocator is called in
program order, from one thread at a time, so the n-th event of its history is the n-th that was counted.

Written for torch 2.8 to 2.13 (torch/cuda/memory.py; c10/cuda/CUDACachingAllocator.cpp: a free counts when it
is requested, and the history has the bytes that were requested).
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import nn

from memplan.asked.recipe import Recipe
from memplan.cuda.card import Card
from memplan.tape import Category, Part, Phase, Tape
from memplan.tape.categories import Lived, Moment, categorise
from memplan.tape.modules import plain_name
from memplan.trace import existing
from memplan.trace.follower import Follower
from memplan.trace.layers import Segments
from memplan.trace.step import train_step
from memplan.verify import driver
from memplan.verify.job import Job
from memplan.verify.measurement import OutOfMemory, Step

_ASKED = re.compile(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class Cuda:
    """Steps on the current CUDA device."""

    def __init__(self, job: Job) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.card = Card(tuple(torch.cuda.get_device_capability(self.device)))
        self.tape: Tape | None = None
        self.remarks: list[str] = []
        self._job = job
        self.number = 0  # of the step that runs; 0 while the model is made
        self._marks: Marks | None = None
        self._ran_out: OutOfMemory | None = None

    @contextmanager
    def environment(self) -> Iterator[None]:
        """The cap on what the allocator may reserve, and the choice of attention kernels."""
        cap = self._job.run.cap_bytes
        if cap is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), self.device)
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(cudnn and self._job.run.cudnn_attention)
        # torch/csrc/cuda/Module.cpp; without it what is known is what is left when the error arrives here
        attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
        if attach is not None:
            attach(self._see_out_of_memory)
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(cudnn)

    def uncounted(self) -> Any:
        """Can't be told apart here."""
        return nullcontext()

    def step(
        self,
        number: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: dict[str, torch.Tensor],
        recipe: Recipe,
        last: bool,
    ) -> tuple[torch.Tensor, Step]:
        """Train one step; its loss and what it took. The last one's events are kept."""
        self.number = number
        self._marks = marks = Marks(self.device, self.card)
        gc.collect()  # what was left in cycles, if anything, goes now and not at some moment of the step
        torch.cuda.synchronize(self.device)
        if number == 1:
            torch.cuda.empty_cache()  # what making the model left cached is no part of the training
        there = _names(model, optimizer, batch) if last else {}
        before = _blocks(torch.cuda.memory._snapshot(), self.device) if last else []
        torch.cuda.reset_peak_memory_stats(self.device)
        if last:
            torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python")
        marks.start()
        try:
            with marks.follow(model):
                loss = train_step(model, optimizer, batch, recipe, marks, "cuda")
            torch.cuda.synchronize(self.device)
            if last:
                history = torch.cuda.memory._snapshot()["device_traces"][self.device.index]
                self.tape, remark = tape_of(before, there, history, marks)
                if remark:
                    self.remarks.append(remark)
        finally:
            if last:
                torch.cuda.memory._record_memory_history(enabled=None)
        return loss, self._counters(number)

    def _counters(self, number: int) -> Step:
        stats = torch.cuda.memory_stats(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return Step(
            number=number,
            allocated_bytes=stats["allocated_bytes.all.peak"],
            resting_bytes=stats["allocated_bytes.all.current"],
            requested_bytes=stats.get("requested_bytes.all.peak"),
            reserved_bytes=stats["reserved_bytes.all.peak"],
            driver_bytes=total - free,
            process_bytes=driver.process_bytes(self.device.index),
            alloc_retries=stats["num_alloc_retries"],
            ooms=stats["num_ooms"],
        )

    def out_of_memory(self, error: BaseException) -> OutOfMemory:
        """Where the step was when an allocation failed."""
        message = " ".join(str(error).split())
        if self._ran_out is not None and isinstance(error, torch.OutOfMemoryError):
            return self._ran_out.model_copy(update={"message": message[:600]})
        asked = _ASKED.search(message)
        event = self._event(int(float(asked[1]) * _UNITS[asked[2]]) if asked else None)
        marks = self._marks
        # on its way here it left the modules that it came from
        module = marks.failed_in(error) if marks is not None else ""
        return event.model_copy(update={"module": module or event.module, "message": message[:600]})

    def _see_out_of_memory(self, _device: int, asked: int, _room: int, _free: int) -> None:
        """The allocator calls this before it raises, while all that the step holds is still there."""
        with suppress(Exception):  # an error here would take the place of its own
            self._ran_out = self._event(asked)

    def _event(self, asked: int | None) -> OutOfMemory:
        stats = torch.cuda.memory_stats(self.device)
        marks = self._marks
        phase = "training" if self.number else Phase.SETUP.value
        return OutOfMemory(
            step=self.number,
            phase=marks.phase.value if marks is not None else phase,
            module=marks.tape.module if marks is not None else "",
            requested_bytes=asked,
            allocated_bytes=stats.get("allocated_bytes.all.current", 0),
            reserved_bytes=stats.get("reserved_bytes.all.current", 0),
        )


# -- marks -------------------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """From the event ``position`` on (allocations and frees since the start), the step is here."""

    position: int
    phase: Phase
    segment: str
    layer: int | None
    part: Part
    module: str
    moment: Moment


class Marks(Follower):
    """Follows a step as a bystander: it sees modules and phases and no operators."""

    def __init__(self, device: torch.device, card: Card) -> None:
        super().__init__(Tape(provenance="measured"), card)
        self._on = device
        self._start = 0
        self.marks: list[Mark] = []
        self.gradient_addresses: list[tuple[int, list[int]]] = []
        self.on_module = Segments(self)

    def count(self) -> int:
        """Allocations and frees so far, of the whole process."""
        stats = torch.cuda.memory_stats_as_nested_dict(self._on)["allocation"]["all"]
        return int(stats["allocated"]) + int(stats["freed"])

    def start(self) -> None:
        """Events count from here."""
        self._start = self.count()

    def failed_in(self, error: BaseException) -> str:
        """The innermost module that an error came from, "" if that was none."""
        return self._failure[1] if self._failure[0] is error else ""

    def position(self) -> int:
        """Events since the start."""
        return self.count() - self._start

    def begin(self, phase: Phase, name: str, layer: int | None = None, part: Part = Part.STEP) -> None:
        """As the recorder's, and marked."""
        super().begin(phase, name, layer, part)
        self._note_mark()

    def gradients(self, parameters: Any) -> None:
        """Where gradients are now: what lies there is one, until it is freed."""
        addresses = [p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None]
        self.gradient_addresses.append((self.position(), addresses))

    def _mark(self, module: str) -> None:
        # Reentrant recomputation calls a layer's forward, not the layer: between two of its modules no module
        # runs. It has not left the layer.
        if module or self.phase is not Phase.BACKWARD:
            self._arrive(module)

    def _arrive(self, module: str) -> None:
        if module != self.tape.module:
            super()._arrive(module)
            self._note_mark()

    def _note_mark(self) -> None:
        if not self.tape.segments:
            return
        here = self.tape.segments[-1]
        module = self.tape.module
        recomputing = self.phase is Phase.BACKWARD and bool(self._modules)
        after_head = self._past_head
        if self.phase is Phase.BACKWARD:
            after_head = not recomputing and here.name == "head" and not module.endswith("norm")
        moment = Moment(self.phase, recomputing, after_head)
        self.marks.append(Mark(self.position(), self.phase, here.name, here.layer, here.part, module, moment))

    @contextmanager
    def follow(self, model: nn.Module, head: str = "lm_head", decoder: str | None = None) -> Iterator[None]:
        """As the recorder's. In backward a module is arrived at when the operation that made its output is
        about to run backward."""
        names = {module: plain_name(name) for name, module in model.named_modules()}

        def leave(module: nn.Module, _args: Any, out: Any) -> None:
            name = names.get(module)
            made = next((t for t in existing.tensors_in(out) if t.grad_fn is not None), None)
            if name is None or made is None:
                return

            def about_to_run(_gradients: Any) -> None:
                if self.phase is Phase.BACKWARD and not self._modules:
                    self._arrive(name)

            made.grad_fn.register_prehook(about_to_run)

        handle = nn.modules.module.register_module_forward_hook(leave)
        try:
            with super().follow(model, head, decoder):
                yield
        finally:
            handle.remove()


# -- from events to a tape ---------------------------------------------------------------------------------


class Block(NamedTuple):
    """Memory that was allocated before the step."""

    address: int
    size: int
    requested: int


def _blocks(snapshot: dict[str, Any], device: torch.device) -> list[Block]:
    """Blocks in use. Addresses are added up, for not all versions of torch give them."""
    found = []
    for segment in snapshot["segments"]:
        if segment.get("device", device.index) != device.index:
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                size = block["size"]
                found.append(Block(address, size, block.get("requested_size") or size))
            address += block["size"]
    return found


Known = dict[int, tuple[str, str, Category]]  # address: module, name, category


class _Collector:
    """Takes what :mod:`memplan.trace.existing` notes, and keeps where it lies."""

    def __init__(self) -> None:
        self.tape = Tape()
        self.standins: dict[Any, Any] = {}
        self.card = Card()
        self.found: Known = {}

    def begin(self, phase: Phase, name: str, layer: int | None = None, part: Part = Part.STEP) -> None:
        """Of no interest."""

    def born(self, tensor: torch.Tensor, operation: str, category: Category = Category.TEMPORARIES) -> None:
        """Only what is on a card."""
        if tensor.device.type == "cuda":
            address = tensor.untyped_storage().data_ptr()
            self.found.setdefault(address, (self.tape.module, operation, category))

    def reserve(self, nbytes: int, operation: str, category: Category, *, workspace: bool = False) -> None:
        """It has no tensor that could be asked where it lies."""


def _names(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Known:
    collector = _Collector()
    existing.note_module(collector, model)
    existing.note_optimizer(collector, optimizer)
    existing.note_batch(collector, batch)
    collector.tape.module = ""
    for table in _maps():
        collector.born(table, "name2qmap", Category.QUANTIZATION_STATE)
    found = collector.found
    return found


def _maps() -> list[torch.Tensor]:
    """The code tables that bitsandbytes keeps for everybody (functional.py ``name2qmap``)."""
    import bitsandbytes

    tables = getattr(bitsandbytes.functional, "name2qmap", {})
    return [table for table in tables.values() if isinstance(table, torch.Tensor)]


def tape_of(
    before: list[Block], there: Known, history: list[dict[str, Any]], marks: Marks
) -> tuple[Tape, str | None]:
    """The step's tape from what was there, the allocator's history and the marks; and a remark if the history
    does not have as many events as were counted."""
    tape = Tape(provenance="measured")
    recorder = Lived(tape)
    live: dict[int, int] = {}
    tape.begin(Phase.SETUP, "before", part=Part.RESTING)
    for block in before:
        module, name, category = there.get(block.address, ("", "", Category.TEMPORARIES))
        workspace = not name and block.requested == marks.card.cublas_workspace
        name = name or ("cublas_workspace" if workspace else "unattributed")
        tape.module = module
        live[block.address] = tape.alloc(block.requested, name, category, workspace=workspace)
        recorder.births.append(Moment(Phase.SETUP, False, False))
    events = [event for event in history if event["action"] in ("alloc", "free_requested")]
    pending = list(marks.marks)
    gradients = list(marks.gradient_addresses)
    here = Mark(0, Phase.FORWARD, "embedding", None, Part.STEP, "", Moment(Phase.FORWARD, False, False))
    opened: tuple[Any, ...] | None = None
    # marks at the very end belong to the step, too: one round more than there are events
    for position in range(len(events) + 1):
        while gradients and gradients[0][0] <= position:
            for address in gradients.pop(0)[1]:
                if address in live:
                    tape.categories[live[address]] = Category.GRADIENTS
        while pending and pending[0].position <= position:
            here = pending.pop(0)
        if position == len(events):
            break
        if opened != here[1:5]:
            opened = here[1:5]
            tape.begin(here.phase, here.segment, here.layer, here.part)
        event = events[position]
        if event["action"] == "alloc":
            tape.module = here.module
            live[event["addr"]] = tape.alloc(event["size"], _operation(event), Category.TEMPORARIES)
            recorder.births.append(here.moment)
        elif event["addr"] in live:
            index = live.pop(event["addr"])
            recorder.deaths[index] = here.moment
            tape.free(index)
    tape.finish()
    categorise(recorder)
    counted = marks.position()
    remark = None
    if counted != len(events):
        remark = f"the history has {len(events)} events and {counted} were counted: phases may be shifted"
    return tape, remark


def _operation(event: dict[str, Any]) -> str:
    """The Python function that made an allocation. Autograd's own thread has none."""
    frames = event.get("frames") or []
    if not frames:
        return "backward"
    frame = frames[0]
    return f"{frame['name']} ({PurePath(frame['filename']).name}:{frame['line']})"
