"""Runs inside the program that is dry-run: watches PyTorch's allocator, counts optimizer steps, and ends the
program when enough have been seen. It stands alone, for the program's environment need not have memplan.

What it saw goes, as JSON, to a file of the folder that MEMPLAN_WATCH names, which memplan/emulate/answer.py
reads.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
import threading
import time
import traceback
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import Any

import memplan_history

_HISTORY = 50_000_000  # entries of the allocator's history; a 70B's step has 60,000
# What tells of the allocator's peaks and what puts them back, of a card or of any accelerator.
_PEAKS = (
    ("_cuda_memoryStats", "_cuda_resetPeakMemoryStats"),
    ("_accelerator_getDeviceStats", "_accelerator_resetPeakStats"),
)
_HEADS = ("lm_head", "embed_out", "score")  # what modules that end a model are called
_GIB = 1 << 30
_BETWEEN = ("evaluation", "saving", "between steps")  # phases after a step's end, which they are told with


class Watch:
    """One process of the program. A run is cut into stretches: *loading*, up to the first forward pass of
    training; each *step*, up to the end of the optimizer's; between them *evaluation* and *saving*; and what
    comes *afterwards*. Bytes; times in microseconds, of the clock of the allocator's history."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.out, self.owner = os.path.join(told["folder"], f"{os.getpid()}.json"), os.getpid()
        self.asked: int = told["steps"]
        self.wanted: set[str] = set(told["wanted"])  # stretches that have to be seen
        self.snapshot, self.tape = told["snapshot"], told["tape"]
        self.torch: Any = None
        self.stretches: list[dict[str, Any]] = []
        self.now = "loading"  # or "between": after a step, with nothing told yet of what comes
        self.card = 0  # that decides
        self.highest: dict[str, int] = {}  # of this stretch, before the program put the peaks back itself
        self.own: dict[tuple[str, Any], Any] = {}  # the program's own peaks, which a stretch's end puts back
        self.began = 0  # when training did
        self.ran_out: dict[str, Any] | None = None
        self.ran_out_at = 0
        self.error: str | None = None
        self.beyond: str | None = None  # what it asked for that can't be emulated
        self.host = {"tensor_bytes": 0, "pinned_bytes": 0}
        self.names: dict[int, str] = {}  # of modules, by id
        self.trained: list[weakref.ref[Any]] = []
        self.optimizers: dict[int, int] = {}  # those that were made, and their steps
        self.made: list[weakref.ref[Any]] = []
        self.of: dict[int, set[int]] = {}  # the parameters that they were made for
        self.lead, self.depth = 0, 0
        self.stack: list[str] = []
        self.again: list[str] = []  # modules of a recomputation in backward's thread, and what it broke into
        self.interrupted = ("", "")
        self.head = False  # whether the forward has come to what ends the model
        self.marks: list[tuple[int, str, str]] = []  # from when on which phase and module
        self.gradients: set[int] = set()  # where they lay when the optimizer began
        self.over = False

    # -- what it hooks into ----------------------------------------------------------------------------------

    def imported(self, torch: Any) -> None:
        """PyTorch is there: from here on it is watched, and the allocator once the card is used."""
        self.torch = torch
        if not torch.backends.cuda.is_built():
            return
        _check_allocator()
        from torch.nn.modules import module
        from torch.optim import optimizer

        make = optimizer.Optimizer.__init__

        def making(made: Any, *args: Any, **kwargs: Any) -> None:
            make(made, *args, **kwargs)
            of = {id(one) for group in made.param_groups for one in group["params"]}
            idle = [one for one, steps in self.optimizers.items() if not steps and one != id(made)]
            for other in idle:
                if self.of.get(other) == of:  # another one takes its place, which it never took
                    del self.optimizers[other]
            self.optimizers.setdefault(id(made), 0)
            self.made.append(weakref.ref(made))
            self.of[id(made)] = of

        optimizer.Optimizer.__init__ = making
        optimizer.register_optimizer_step_pre_hook(self._updating)
        optimizer.register_optimizer_step_post_hook(self._updated)
        module.register_module_forward_pre_hook(self._entered)
        module.register_module_forward_hook(self._left, always_call=True)
        self._before(module.Module, "state_dict", self._saving)
        self._before(torch, "save", self._saving)
        self._tell, self._put_back = torch._C._cuda_memoryStats, torch._C._cuda_resetPeakMemoryStats
        for tell, put_back in _PEAKS:
            self._keep_peaks(torch._C, tell, put_back)
        torch.cuda._lazy_call(self._first_use)
        atexit.register(self._ended)
        excepthook = sys.excepthook

        def failed(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            self.error = kind.__name__
            self.beyond = _beyond(str(error))
            excepthook(kind, error, trace)

        sys.excepthook = failed

    def _keep_peaks(self, owner: Any, tell: str, put_back: str) -> None:
        """Peaks are put back at the end of a stretch; the program is told of its own nevertheless."""
        telling, putting = getattr(owner, tell, None), getattr(owner, put_back, None)
        if telling is None or putting is None:
            return

        def told(device: Any, *args: Any) -> Any:
            return _with_peaks(telling(device, *args), self.own.get((tell, device)))

        def put(device: Any, *args: Any) -> Any:
            if self.torch.cuda.is_initialized():
                self.highest = self._stats()
            for one, _ in _PEAKS:
                self.own.pop((one, device), None)
            return putting(device, *args)

        setattr(owner, tell, told)
        setattr(owner, put_back, put)

    def _start_anew(self) -> None:
        """Peaks, for another stretch."""
        self.highest = {}
        if not self.torch.cuda.is_initialized():
            return
        for card in range(self.torch.cuda.device_count()):
            for tell, _ in _PEAKS:
                if hasattr(self.torch._C, tell):
                    self.own[tell, card] = getattr(self.torch._C, tell)(card)
            self._put_back(card)

    @staticmethod
    def _before(owner: Any, name: str, tell: Callable[[], None]) -> None:
        """Be told before a function runs."""
        function = getattr(owner, name, None)
        if function is None:
            return

        @wraps(function)
        def told(*args: Any, **kwargs: Any) -> Any:
            tell()
            return function(*args, **kwargs)

        setattr(owner, name, told)

    def _first_use(self) -> None:
        memory = self.torch.cuda.memory
        memory._record_memory_history("all", context="alloc", stacks="python", max_entries=_HISTORY)
        memory._record_memory_history = lambda *_, **__: None  # it is being recorded
        self.torch._C._cuda_attach_out_of_memory_observer(self._out_of_memory)

    # -- where the program is --------------------------------------------------------------------------------

    def _mark(self, phase: str, module: str = "") -> None:
        self.marks.append((time.time_ns() // 1000, phase, module))

    def _entered(self, module: Any, _inputs: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and not self.stack:
            if not self.again:  # in backward's thread
                self.interrupted = self.marks[-1][1:] if self.marks else ("backward", "")
            self.again.append(self.names.get(id(module), ""))
            self._mark("recomputation", self.again[-1])
            return
        if not self.stack:
            self._begins(module)
        self.stack.append(self.names.get(id(module), type(module).__name__))
        self.head = self.head or self.stack[-1].endswith(_HEADS)
        self._mark(self._phase(), self.stack[-1])

    def _begins(self, module: Any) -> None:
        """A forward pass of a whole model."""
        self.head = False
        gradients = self.torch.is_grad_enabled()
        if module.training and gradients and any(one.requires_grad for one in module.parameters()):
            self.began = self.began or time.time_ns() // 1000
            self._turn("step")
        elif not gradients and not module.training and self.now != "step" and not _generating():
            if self.now == "loading" or id(module) in self.names:
                self._turn("evaluation")
        if id(module) not in self.names:
            self.names.update({id(part): name for name, part in module.named_modules()})
            self.trained.append(weakref.ref(module))

    def _phase(self) -> str:
        if self.torch.is_grad_enabled():
            return "forward past the head" if self.head else "forward"
        return "evaluation" if self.now == "evaluation" else "forward without gradients"

    def _left(self, module: Any, _inputs: Any, result: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and not self.stack:
            self._follow(self.names.get(id(module), ""), result)
            if self.again:
                self.again.pop()
            self._mark(*(("recomputation", self.again[-1]) if self.again else self.interrupted))
        elif self.stack:
            name = self.stack.pop()
            self._follow(name, result)
            after = "backward" if self.torch.is_grad_enabled() else "between steps"
            self._mark(self._phase() if self.stack else after, self.stack[-1] if self.stack else "")

    def _follow(self, name: str, result: Any) -> None:
        """Tell when the backward of what a module made begins."""
        made = next((one for one in _tensors(result) if one.grad_fn is not None), None)
        if made is not None:
            made.grad_fn.register_prehook(lambda _gradients: self._mark("backward", name))

    def _updating(self, optimizer: Any, *_: Any) -> None:
        self.depth += 1
        self._mark("update")
        if self.tape and self.depth == 1:
            lists = (group["params"] for group in optimizer.param_groups)
            grads = (one.grad for params in lists for one in params if one.grad is not None)
            self.gradients = {memplan_history.address(one) for one in grads if one.is_cuda}

    def _updated(self, optimizer: Any, *_: Any) -> None:
        """An optimizer has stepped."""
        self.depth = max(self.depth - 1, 0)
        if not self.depth:  # of one that wraps another the outer one counts
            self.stepped(optimizer)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What steps here is part of something larger, which is told of with ``stepped``, or of no step."""
        self.depth += 1
        self._mark("loading" if self.now == "loading" else "update")
        try:
            yield
        finally:
            self.depth -= 1

    def stepped(self, optimizer: Any) -> None:
        """A step is over; of several optimizers, rows are those of the one that stepped first, and the
        program ends when each has made as many as were asked for, or one ten times as many."""
        if os.getpid() != self.owner or not self.torch.cuda.is_initialized():
            return
        self.optimizers[id(optimizer)] = self.optimizers.get(id(optimizer), 0) + 1
        self.lead = self.lead or id(optimizer)
        self._mark("between steps")
        if self.lead == id(optimizer):
            self._count_host()
            self.now = "step"
            self._turn("between")
        elif self.now == "between":  # another one's, which belongs to the step
            self._add_to_step()
        self._end_if_seen()
        if self._enough():
            self._ask()

    def _enough(self) -> bool:
        """Whether there were as many steps as were asked for."""
        done = self.optimizers.values()
        return min(done, default=0) >= self.asked or max(done, default=0) >= 10 * self.asked

    def _missing(self) -> set[str]:
        """Stretches that have to be seen yet."""
        return self.wanted - {one["kind"] for one in self.stretches}

    def _steps(self) -> list[dict[str, Any]]:
        return [one for one in self.stretches if one["kind"] == "step"]

    def _saving(self) -> None:
        if self.now in ("between", "evaluation") and not self.stack and os.getpid() == self.owner:
            self._turn("saving")
            self._mark("saving")

    def _turn(self, to: str) -> None:
        """Go over to another stretch; what lies between two of them belongs to the second."""
        if to == self.now:
            return
        if self.now != "between":
            self._close()
        self.now = to
        self._end_if_seen()

    def _add_to_step(self) -> None:
        found, step = self._stats(), self._steps()[-1]
        for name in ("allocated_bytes", "reserved_bytes", "retries"):
            step[name] = max(step[name], found[name])
        step |= {"resting_bytes": found["resting_bytes"], "ended": time.time_ns() // 1000}
        self._start_anew()

    def _close(self) -> None:
        found = self._stats()
        self.stretches.append({"kind": self.now, **found, "ended": time.time_ns() // 1000})
        self._start_anew()
        what = f"step {len(self._steps())} of {self.asked}" if self.now == "step" else self.now
        sizes = " and ".join(
            f"{found[f'{name}_bytes'] / _GIB:.2f} GiB {name}" for name in ("allocated", "reserved")
        )
        if found["reserved_bytes"]:
            rank = os.environ.get("RANK", "0")
            what = f"rank {rank}, {what}" if rank != "0" else what
            clear = "\r\x1b[K" if sys.__stderr__ and sys.__stderr__.isatty() else ""  # a progress bar
            print(f"{clear}memplan: {what}: {sizes}", file=sys.__stderr__, flush=True)

    def _ask(self) -> None:
        """Have transformers' Trainer evaluate and save after this step, if it is to do so at all."""
        module = sys.modules.get("transformers.trainer_callback")
        flow = getattr(module, "DefaultFlowCallback", None)
        if flow is None or hasattr(flow, "of_memplan"):
            return
        on_step_end = flow.on_step_end
        setattr(flow, "of_memplan", True)  # noqa: B010  # a class of somebody else's

        def asking(callback: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control = on_step_end(callback, args, state, control, **kwargs) or control
            missing = self._missing()
            for wanted, strategy, what in (
                ("evaluation", args.eval_strategy, "should_evaluate"),
                ("saving", args.save_strategy, "should_save"),
            ):
                if wanted in missing and strategy != "no":
                    setattr(control, what, True)
            return control

        flow.on_step_end = asking

    # -- what it saw -----------------------------------------------------------------------------------------

    def _stats(self) -> dict[str, int]:
        """Of the card that has reserved the most, in this stretch."""
        high = self.highest
        if not self.torch.cuda.is_initialized():
            return dict.fromkeys(("allocated_bytes", "reserved_bytes", "resting_bytes", "retries"), 0)
        cards = range(self.torch.cuda.device_count())
        of_all = {card: self._tell(card) for card in cards}
        if self.ran_out is None:
            self.card = max(of_all, key=lambda card: of_all[card]["reserved_bytes"]["all"]["peak"])
        stats = of_all[self.card]
        allocated, reserved = (stats[name]["all"] for name in ("allocated_bytes", "reserved_bytes"))
        return {
            "allocated_bytes": max(allocated["peak"], high.get("allocated_bytes", 0)),
            "reserved_bytes": max(reserved["peak"], high.get("reserved_bytes", 0)),
            "resting_bytes": allocated["current"],
            "retries": stats["num_alloc_retries"],
        }

    def _count_host(self) -> None:
        """Tensors that rest on the host after a step."""
        tensor, places = self.torch.Tensor, {}
        for one in gc.get_objects():
            if not issubclass(type(one), tensor):
                continue
            with suppress(Exception):  # one that has no memory of its own
                if one.device.type == "cpu":
                    storage = one.untyped_storage()
                    places[storage.data_ptr()] = storage.nbytes()
        there: dict[str, int] = getattr(self.torch.cuda, "host_memory_stats", dict)()
        self.host = {
            "tensor_bytes": max(self.host["tensor_bytes"], sum(places.values())),
            "pinned_bytes": there.get("allocated_bytes.peak", 0),
        }

    def _out_of_memory(self, device: int, asked: int, total: int, free: int) -> None:
        """The allocator calls this before it raises."""
        self.ran_out_at = time.time_ns() // 1000
        here = memplan_history.line(_frames(sys._getframe()))
        if not here["own"]:  # in backward's thread: the line that waits for it
            main = sys._current_frames()[threading.main_thread().ident or 0]
            here["own"] = memplan_history.line(_frames(main))["own"]
        stats = self._tell(device)
        self.card = device
        self.ran_out = {
            "asked_bytes": asked,
            "free_bytes": free,
            "allocated_bytes": stats["allocated_bytes"]["all"]["current"],
            "reserved_bytes": stats["reserved_bytes"]["all"]["current"],
            "step": self._step_at(self.ran_out_at) if self.now != "loading" else 0,
            "phase": _plain(self.marks[-1][1]) if self.now != "loading" and self.marks else "loading",
            "module": self.marks[-1][2] if self.marks else "",
            **here,
        }

    def _step_at(self, time_us: int) -> int:
        """The number of a step that has not ended then."""
        return 1 + len([step for step in self._steps() if step["ended"] < time_us])

    def _when(self, time_us: int) -> tuple[str, str]:
        at = bisect_right(self.marks, time_us, key=lambda mark: mark[0])
        return self.marks[at - 1][1:] if at else ("loading", "")

    def _ended(self) -> None:
        if os.getpid() == self.owner and not self.over:
            if self.torch.cuda.is_initialized():
                if self.now == "between" or (self.now == "step" and self.error is None):
                    self.now = "afterwards"
                if self.now != "step":  # which it did not finish
                    self._close()
            self._write()

    def _end_if_seen(self) -> None:
        """End the program if enough was seen."""
        if not self._enough() or self._missing():
            return
        self._write()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _write(self) -> None:
        self.over = True
        torch = self.torch
        used = torch.cuda.is_initialized()
        found: dict[str, Any] = {
            "used": used,
            "stretches": self.stretches,
            "ran_out": self.ran_out,
            "error": self.error,
            "beyond": self.beyond,
            "versions": _versions(),
            "rank": int(os.environ.get("RANK") or 0),
            "world": int(os.environ.get("WORLD_SIZE") or 1),
            "device": torch.cuda.get_device_name() if used else None,
            "peak": self._peak() if used else None,
            "host": self.host,
        }
        if used and self.snapshot:
            torch.cuda.memory._dump_snapshot(f"{self.out}.pickle")
        if used and self.tape:
            with open(f"{self.out}.step", "w", encoding="utf-8") as file:
                json.dump(self._last_step(), file)
        with open(f"{self.out}.part", "w", encoding="utf-8") as file:
            json.dump(found, file)
        os.replace(f"{self.out}.part", self.out)

    def _peak(self) -> dict[str, Any] | None:
        found = memplan_history.peak(
            memplan_history.of_card(self.torch, self.card),
            self.began,
            self.ran_out_at if self._unfinished() else None,
            lambda time_us: (_plain(self._when(time_us)[0]), self._when(time_us)[1]),
        )
        if found is not None:
            at = found.pop("time_us")
            found["step"] = self._step_at(at) - (found["phase"] in _BETWEEN)
            if not self.began or at < self.began:
                found |= {"phase": "loading", "module": ""}
        return found

    def _unfinished(self) -> bool:
        """Whether it ran out, and no step came after."""
        return self.ran_out is not None and max(self.ran_out["step"], 1) > len(self._steps())

    def _last_step(self) -> dict[str, Any]:
        """Each allocation of the last step, from its first forward pass on; of the one in which it ran out,
        up to there."""
        ends = [at for at, one in enumerate(self.stretches) if one["kind"] == "step"]
        if self._unfinished():
            last, ended = self.stretches[-1]["ended"] if self.stretches else 0, self.ran_out_at
        elif ends:
            last, ended = (self.stretches[at]["ended"] if at >= 0 else 0 for at in (ends[-1] - 1, ends[-1]))
        else:
            return {}
        forward = (at for at, phase, _ in self.marks if at > last and phase.startswith("forward"))
        models = [model for model in (ref() for ref in self.trained) if model is not None]
        optimizers = [one for one in (ref() for ref in self.made) if one is not None]
        return memplan_history.step(
            memplan_history.of_card(self.torch, self.card),
            next(forward, last),
            ended,
            self._when,
            memplan_history.known(models, optimizers),
            self.gradients,
        )


def _check_allocator() -> None:
    """Raise SystemExit for an allocator that is not watched."""
    settings = f"{os.environ.get('PYTORCH_ALLOC_CONF', '')},{os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '')}"
    for what, on in (
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")),
        ("backend:cudaMallocAsync", "cudaMallocAsync" in settings),
    ):
        if on:
            raise SystemExit(f"memplan: a dry run watches PyTorch's own caching allocator: leave out {what}")


def _beyond(words: str) -> str | None:
    """What a message of PyTorch's says was asked for that a card which computes nothing has not."""
    for sign, name in (
        ("cusolver", "cuSOLVER"),
        ("cusparse", "cuSPARSE"),
        ("cufft", "cuFFT"),
        ("CUDAGraph", "CUDA graphs"),
        ("captures_underway", "CUDA graphs"),
    ):
        if sign.lower() in words.lower():
            return name
    return None


def _with_peaks(told: Any, before: Any) -> Any:
    """The allocator's statistics, with those peaks that were higher before."""
    if before is None:
        return told
    if isinstance(told, dict):
        return {
            key: max(value, before.get(key, 0)) if key == "peak" else _with_peaks(value, before.get(key))
            for key, value in told.items()
        }
    return told


def _frames(innermost: Any) -> list[tuple[str, int, str]]:
    """The stack of a frame, the innermost first."""
    stack = reversed(traceback.extract_stack(innermost))
    return [(one.filename, one.lineno or 0, one.name) for one in stack if not one.filename.startswith("<")]


def _generating() -> bool:
    """Whether a program's `generate` runs a model, which is no evaluation."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate":
            return True
        frame = frame.f_back
    return False


def _plain(phase: str) -> str:
    return phase.removesuffix(" past the head")


def _tensors(value: Any) -> list[Any]:
    """The tensors of a module's result."""
    if hasattr(value, "grad_fn"):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [one for part in value for one in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in (
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "trl",
        "deepspeed",
        "axolotl",
        "llamafactory",
        "unsloth",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def start(torch: Any) -> None:
    """Watch this process, and work out its whole numbers."""
    import memplan_cudnn
    import memplan_deepspeed
    import memplan_integers
    import memplan_ranks
    from memplan_imports import when_imported

    memplan_ranks.prepare(torch)
    told = json.loads(os.environ["MEMPLAN_WATCH"])
    if torch.backends.cuda.is_built():  # how many cards it sees is decided when it asks
        memplan_cudnn.start(torch)
        torch.distributions.Distribution.set_default_validate_args(False)  # no scale is above zero
        memplan_integers.start(torch, skewed=told["routing"] == "skewed")
    watch = Watch(told)
    watch.imported(torch)
    when_imported("deepspeed.runtime.engine", partial(memplan_deepspeed.prepare, watch))
