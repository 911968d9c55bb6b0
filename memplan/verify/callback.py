"""``MemoryCallback``: a plan beside any run of the Hugging Face Trainer, and of TRL's SFTTrainer.

Before the run it warns if the plan says that the run will not fit; after step 2, the first in which the
optimizer's state is there from the start, it prints what was predicted and what was measured::

    trainer = Trainer(model, args, train_dataset=data, callbacks=[MemoryCallback()])

On CUDA it resets the peak counters at the beginning of step 2, once. Without CUDA it counts that step's
storages as ``memplan verify --device cpu`` does, and those that the Trainer's loop names.
"""

from __future__ import annotations

import functools
import gc
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from memplan import losses
from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.errors import MemplanError
from memplan.importers.trainer import recipe_of, spec_of
from memplan.tape import Tape, replay
from memplan.units import gib
from memplan.verify.compare import Figure

MEASURED_STEP = 2


class MemoryWarning(UserWarning):
    """A run is predicted not to fit."""


class MemoryCallback(TrainerCallback):
    """Prediction and measurement of a Trainer's step.

    ``seq_len``: tokens in a row; unless given, the trainer's ``max_length`` or the length of the first
    example. ``recipe`` overrules what is read off the trainer. ``tell`` is given each line (default: print).
    After step 2, :attr:`figure` has both numbers, in bytes.

    Of several processes each holds itself against the plan of its own rank; the main one tells, or all of
    them with ``every_rank``.
    """

    def __init__(
        self,
        *,
        seq_len: int | None = None,
        recipe: Recipe | None = None,
        tell: Callable[[str], None] | None = None,
        every_rank: bool = False,
    ) -> None:
        self.seq_len = seq_len
        self.recipe = recipe
        self.figure: Figure | None = None
        self.tape: Tape | None = None  # of step 2, without CUDA
        self.reserved: int | None = None  # peak of reserved bytes, with CUDA
        self.every_rank = every_rank
        self.rank: int | None = None  # of several processes
        self._told = tell or functools.partial(print, flush=True)
        self._spec: ModelSpec | None = None
        self._measuring: ExitStack | None = None
        self._recorder: Any = None
        self._shape: tuple[int, int] | None = None
        self.on_cuda = False  # whether the Trainer trains on a card, not only whether there is one

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Plan the run; warn if it can't fit."""
        self._close()
        model = kwargs["model"]
        self.on_cuda = torch.cuda.is_available() and not getattr(args, "use_cpu", False)
        self.rank = args.process_index if getattr(args, "world_size", 1) > 1 else None
        try:
            self._spec = spec_of(model)
            if self.recipe is None:
                length = self.seq_len or _length(args, kwargs.get("train_dataloader"))
                self.recipe = recipe_of(args, model, length)
            planned = self._planned(self.recipe)
        except MemplanError as error:
            self._spec = None
            self._tell(f"memplan: no plan for this run: {error}")
            return
        line = f"memplan: step {MEASURED_STEP} is predicted to allocate {gib(planned)} GiB at its peak"
        if self.on_cuda:
            free, _ = torch.cuda.mem_get_info()
            room = free + torch.cuda.memory_reserved()
            line += f", and {gib(room)} GiB are free"
            if planned > room:
                whose = "" if self.rank is None else f"rank {self.rank}: "
                warnings.warn(
                    f"{whose}this run will not fit: it is predicted to allocate {gib(planned)} GiB, and "
                    f"{gib(room)} GiB are free; `memplan plan` says what would",
                    MemoryWarning,
                    stacklevel=2,
                )
        self._tell(line)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start measuring at the step's beginning."""
        if self._spec is None or state.global_step != MEASURED_STEP - 1:
            return
        model = kwargs["model"]
        self._measuring = ExitStack()
        hook = model.register_forward_pre_hook(self._see_batch, with_kwargs=True)
        self._measuring.callback(hook.remove)
        if self.on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._record(self._measuring, model, kwargs.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop measuring and print both numbers."""
        if self._measuring is None or self._spec is None or self.recipe is None:
            return
        if self.on_cuda:
            torch.cuda.synchronize()
            self._close()
            measured = torch.cuda.max_memory_allocated()
            self.reserved = torch.cuda.max_memory_reserved()
            reserved = f"; reserved {gib(self.reserved)} GiB"
            label = "measured"
        else:
            recorder = self._recorder
            self._close()
            self.tape = recorder.tape
            measured = replay(recorder.tape).allocated_bytes
            reserved, label = "", "measured, CPU storages"
        recipe = self._as_run(self.recipe)
        figure = self.figure = Figure(predicted=self._planned(recipe, blocks=self.on_cuda), measured=measured)
        percent = "" if figure.percent is None else f" ({figure.percent:+.3f} %)"
        self._tell(
            f"memplan: step {MEASURED_STEP}: predicted {figure.predicted:,} bytes, {label} "
            f"{figure.measured:,}, error {figure.error:+,}{percent}{reserved}"
        )
        if losses.find(recipe.loss).sft and not self.on_cuda:
            self._tell("memplan: without CUDA, TRL computes its loss by other code, which is not planned")
        if recipe is not self.recipe:
            self._tell(f"memplan: the batch was {recipe.batch_size} × {recipe.seq_len} tokens")

    def _tell(self, line: str) -> None:
        if not self.rank:
            self._told(line)
        elif self.every_rank:
            self._told(f"{line} (rank {self.rank})")

    def _planned(self, recipe: Recipe, blocks: bool = False) -> int:
        """The peak: of tensors, or of the allocator's blocks, which ``max_memory_allocated`` counts."""
        from memplan.device.playback import simulate
        from memplan.predict.parameters import resolve_recipe
        from memplan.predict.step import write_long_tape, write_tape
        from memplan.verify.workspaces import without_workspaces

        assert self._spec is not None
        cuda = self.on_cuda
        card = Card(tuple(torch.cuda.get_device_capability())) if cuda else Card()
        resolved = resolve_recipe(self._spec, recipe)
        if blocks:
            tape = write_long_tape(self._spec, resolved, card=card, looped=True, rank=self.rank)
            return simulate(tape).allocated
        tape = write_tape(self._spec, resolved, card=card, looped=True, rank=self.rank)
        return replay(tape if cuda else without_workspaces(tape)).allocated_bytes

    def _as_run(self, recipe: Recipe) -> Recipe:
        """The recipe with the batch that there was."""
        if self._shape in (None, (recipe.batch_size, recipe.seq_len)):
            return recipe
        batch, length = self._shape or (0, 0)
        return recipe.model_copy(update={"batch_size": batch, "seq_len": length})

    def _see_batch(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is not None:
            self._shape = (int(ids.shape[0]), int(ids.shape[1]))
        if self._recorder is not None:
            from memplan.tape import Category
            from memplan.trace.existing import tensors_in

            for tensor in tensors_in(kwargs):
                self._recorder.born(tensor, "batch", Category.ACTIVATIONS)

    def _record(self, stack: ExitStack, model: Any, optimizer: Any) -> None:
        """Count the host's storages until the stack is closed."""
        from memplan.tape import Phase
        from memplan.trace import standins
        from memplan.trace.recording import phases
        from memplan.verify.host import recorded

        gc.collect()
        card = Card()
        stack.enter_context(standins.in_force(card, data=True))
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self._recorder = recorder = stack.enter_context(recorded(card, model, inner, ()))
        _note_loop(recorder)
        stack.enter_context(phases(recorder, [model]))
        recorder.begin(Phase.FORWARD, "forward")

    def _close(self) -> None:
        stack, self._measuring = self._measuring, None
        if stack is not None:
            stack.close()
        self._recorder = None


def _note_loop(recorder: Any) -> None:
    """Note what the Trainer's loop names when a step begins: numbers, and batches."""
    from memplan.parts.loop import MODULE
    from memplan.tape import Category, Part, Phase
    from memplan.trace.existing import tensors_in

    frame: FrameType | None = sys._getframe()
    while frame is not None and "batch_samples" not in frame.f_code.co_varnames:
        frame = frame.f_back
    if frame is None:
        return
    names = frame.f_locals
    own = vars(names["self"]) if "self" in names else {}
    numbers = {name: value for name, value in {**own, **names}.items() if isinstance(value, torch.Tensor)}
    recorder.begin(Phase.SETUP, "loop", part=Part.RESTING)
    recorder.tape.module = MODULE
    for name, number in numbers.items():
        recorder.born(number, name, Category.TEMPORARIES)
    recorder.begin(Phase.SETUP, "batch", part=Part.RESTING)
    recorder.tape.module = ""
    for tensor in tensors_in(names["batch_samples"]):
        recorder.born(tensor, "batch", Category.ACTIVATIONS)
    wrapped = own.get("model_wrapped")
    recorder.reducing = isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    del wrapped
    if isinstance(names, dict):  # before Python 3.13 a copy that the frame keeps, tensors and all
        names.clear()


def _length(args: Any, loader: Any) -> int:
    """Tokens in a row: what the trainer cuts to, else the first example's."""
    length = getattr(args, "max_length", None)
    if length:
        return int(length)
    try:
        return len(loader.dataset[0]["input_ids"])
    except (AttributeError, TypeError, KeyError, IndexError):
        raise MemplanError("how many tokens a row has can't be seen: MemoryCallback(seq_len=...)") from None
