"""What answers are made of: frozen records of bytes and words, as JSON has them."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, PrivateAttr, computed_field, model_validator

from memplan.device.fit import Fit, Verdict
from memplan.errors import MemplanError


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelInfo(Record):
    """Which model the plan is for. ``note`` says what needs saying: how a name was resolved, what about the
    model surprises."""

    name: str
    hub_id: str | None
    architecture: str
    note: str | None = None


class ReadFrom(Record):
    """The file of a trainer that was asked about: the keys that moved the recipe, with their values; those
    that move no memory; and what the run does beside that no figure counts."""

    file: str
    kind: str
    understood: dict[str, Any]
    ignored: tuple[str, ...]
    left_out: tuple[str, ...]


class ParameterCounts(Record):
    """Parameters (tied weights counted once), adapters included in both counts."""

    total: int
    trainable: int


class StaticBytes(Record):
    """Bytes that are there before a steady-state step begins."""

    weights: int
    quantization_state: int
    adapters: int
    optimizer_state: int
    communication: int = 0


class CategoryBytes(Record):
    """Bytes by category; adds up to the peak."""

    weights: int
    quantization_state: int
    adapters: int
    gradients: int
    optimizer_state: int
    activations: int
    logits_and_loss: int
    temporaries: int
    communication: int = 0  # parameters that were gathered, what gradients are summed in


class PeakInfo(Record):
    """The highest point of a step: how much, when, in which operation, and whose bytes.

    ``tensor_bytes``: the live tensors, each rounded to 512 bytes, which ``by_category`` adds up to.
    """

    tensor_bytes: int
    phase: Literal["forward", "backward", "optimizer"]
    operation: str
    module: str
    layer: int | None
    by_category: CategoryBytes

    _study: _Counting | None = PrivateAttr(default=None)
    _counted: int | None = PrivateAttr(default=None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def allocated_bytes(self) -> int:
        """``torch.cuda.max_memory_allocated``: the allocator counts whole blocks, and one whose rest is 1 MiB
        or less is not split. Simulated when it is asked for."""
        if self._counted is not None:
            return self._counted
        if self._study is None:
            raise MemplanError(
                "the peak of a plan that was read from JSON is not simulated: call plan() again"
            )
        return self._study.allocator.allocated_bytes

    @model_validator(mode="wrap")
    @classmethod
    def _keep_the_count(cls, data: Any, handler: Any) -> PeakInfo:
        """Read from JSON: what was simulated then is there."""
        counted = None
        if isinstance(data, dict):
            data = dict(data)
            counted = data.pop("allocated_bytes", None)
        result: PeakInfo = handler(data)
        if counted is not None:
            result._counted = int(counted)
        return result


class _Counting(Protocol):
    """Who plays the step on the allocator when somebody asks."""

    @property
    def allocator(self) -> AllocatorInfo:
        """What came of it."""


class Summary(Record):
    """The four categories that people know. Quantisation state counts as weights, gradients as
    optimizer state, logits, temporaries and communication as activations. Adds up to the peak."""

    weights: int
    lora_parameters: int
    optimizer_state: int
    activations: int


class AllocatorInfo(Record):
    """What the caching allocator makes of the run, simulated where nothing limits it. ``allocated_bytes``:
    ``max_memory_allocated`` of a step, in whole blocks; ``reserved_bytes``: ``max_memory_reserved`` of the
    run; ``fragmentation_bytes``: their difference. ``settings``: ``PYTORCH_ALLOC_CONF``. ``loading``: by whom
    is told how the model came onto the card; null where nobody does, and the run begins with what rests."""

    settings: str
    allocated_bytes: int
    reserved_bytes: int
    fragmentation_bytes: int
    loading: Literal["predicted"] | None = None


class Ranks(Record):
    """GPUs that share a step and are alike. ``rank``: of the first of them; ``count``: how many there are;
    ``peak_allocated_bytes``: ``max_memory_allocated`` of a step, as the plan's ``peak`` has it;
    ``reserved_bytes``: of the whole run; ``host_bytes``: of what it keeps on the host, offloaded;
    ``host_pinned_bytes``: of these, pinned, as PyTorch rounds them up."""

    rank: int
    count: int
    peak_allocated_bytes: int
    reserved_bytes: int
    host_bytes: int = 0
    host_pinned_bytes: int = 0


class HowMany(Record):
    """The fewest GPUs that a run fits on when they share its steps so, None where no number is enough, and
    bytes that each of them needs then. ``tight_gpus``: the fewest on which it is tight, where those are fewer
    than it fits on. ``note``: why there is none."""

    parallel: str
    gpus: int | None = None
    tight_gpus: int | None = None
    needed_bytes: int | None = None
    note: str | None = None


class Evaluation(BaseModel):
    """An evaluation in the middle of training, of sequences as long as those that are trained on, with only
    the loss asked for (no ``compute_metrics``). Bytes.

    ``tensor_bytes``: the peak of live tensors with the Trainer's default batch, ``batch_size``, made in
    ``operation`` of ``module``; ``with_one_bytes``: the same with ``per_device_eval_batch_size=1``. ``fits``:
    verdicts of the run with the default evaluation in it, for each card that they were asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int
    tensor_bytes: int
    operation: str
    module: str
    with_one_bytes: int
    fits: tuple[Fit, ...] = ()


class Played(Record):
    """Steps whose sequences differ in length, as they were played: ``source``, how many, the tokens of the
    shortest and of the longest sequence, and of the longest forward pass, padding counted; ``alone_bytes``:
    what would be reserved if all were as the longest."""

    source: str
    steps: int
    shortest: int
    longest: int
    tokens: int
    alone_bytes: int


class Slipped(BaseModel):
    """What people who use this trainer leave out, ``told`` in a clause, and what it costs: bytes of tensors
    at the peak, more than the plan's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    told: str
    more_bytes: int


class Change(BaseModel):
    """One change. Bytes: ``tensor_bytes`` at the peak after it, ``saves_bytes`` less than before;
    ``needed_bytes`` with the allocator simulated, None where the peak alone is too large. ``cost`` in words;
    ``command``: memplan's option; ``config``: the same in the file that was asked about, else in PEFT, TRL or
    the Trainer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    cost: str
    command: str
    config: str
    tensor_bytes: int
    saves_bytes: int
    needed_bytes: int | None
    verdict: Verdict


class Combination(BaseModel):
    """Several changes that together make a run fit; none of them can be left out. ``command``: memplan's
    options; ``config``: the same in the file that was asked about, if one was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    titles: tuple[str, ...]
    command: str
    config: str | None = None
    needed_bytes: int
    verdict: Verdict


class Advice(BaseModel):
    """For one card. Of a run that does not fit: ``changes``, those that make it fit first, then those that
    leave it tight, the cheapest of each first; ``combination`` where no single one does; ``cards`` on which
    it fits as it is. Of one that fits: ``room``, what else there is room for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    changes: tuple[Change, ...] = ()
    combination: Combination | None = None
    cards: tuple[str, ...] = ()
    room: tuple[str, ...] = ()
