"""A measurement held against the plan: bytes, per cent, and the tensors that one has and the other has not.

The prediction is made anew, with the memplan that compares, for the card that was measured. No torch.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from memplan.device.fit import context_of
from memplan.tape import Category, Peak, Tape, replay
from memplan.tape.diff import Diff, Held, diff
from memplan.verify.job import predicted_tape, simulated
from memplan.verify.measurement import Measurement, OutOfMemory


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Record):
    """One number, predicted and measured, in bytes. None: not to be had."""

    predicted: int | None
    measured: int | None

    @property
    def error(self) -> int | None:
        """Predicted less measured; positive where the plan says too much."""
        if self.predicted is None or self.measured is None:
            return None
        return self.predicted - self.measured

    @property
    def percent(self) -> float | None:
        """The error as a share of what was measured."""
        if self.error is None or not self.measured:
            return None
        return 100 * self.error / self.measured


class Where(_Record):
    """Where a tape's peak is."""

    phase: str
    layer: int | None
    module: str
    operation: str


class OfRank(_Record):
    """The same of one of several processes that trained together, each against the plan of its rank."""

    rank: int
    outcome: str
    why: str | None
    allocated: Figure
    tensors: Figure
    reserved: Figure


class Comparison(_Record):
    """One run, of several processes that of the first or of the one that failed; ``ranks`` has all of them.

    ``allocated`` is the peak of allocated bytes, as the allocator counts it; ``tensors`` the same from the
    recorded events, without what the allocator rounds blocks up to beyond 512 bytes; ``on_card`` is
    everything that the process takes of the card. ``fits_predicted`` and ``fits_measured`` are about the room
    that there was; None where nothing can be said."""

    title: str
    label: str
    outcome: str
    why: str | None
    event: OutOfMemory | None
    step: int | None
    allocated: Figure
    tensors: Figure
    reserved: Figure
    on_card: Figure
    categories: dict[Category, Figure]
    predicted_peak: Where
    measured_peak: Where | None
    room: int
    fits_predicted: bool | None
    fits_measured: bool | None
    diff: Diff | None
    remarks: tuple[str, ...]
    ranks: tuple[OfRank, ...] = ()

    @property
    def reason(self) -> str | None:
        """The largest kind of tensor that only one side holds at its peak, in words."""
        if self.diff is None:
            return None
        sides = [("only planned", self.diff.peak_only_a), ("only measured", self.diff.peak_only_b)]
        found = [(held, name) for name, helds in sides for held in helds]
        if not found:
            return None
        held, name = max(found, key=lambda pair: pair[0].nbytes)
        return f"{name}: {_described(held)}"


def _described(held: Held) -> str:
    module = f" in {held.module}" if held.module else ""
    return f"{held.count} × {held.size:,} {held.operation}{module}"


def compare(measured: Measurement) -> Comparison:
    """Hold a measurement against the plan. On a GPU the plan is played on the simulated allocator, from the
    making of the model on, as the verifier does it.

    Raises MemplanError if the model or the recipe has no plan, or the recorded tape is damaged.
    """
    plan = predicted_tape(measured)
    remarks = list(measured.remarks)
    if measured.device.kind == "cpu":
        from memplan.verify.workspaces import without_workspaces

        plan = without_workspaces(plan)
        remarks.append("a CPU has no cuBLAS, so the plan is compared without its workspaces")
        if measured.recipe.gpus > 1:
            remarks.append(
                "the ranks are processes that talk over gloo: what is compared is their tensors, not what "
                "NCCL takes beside them, nor what streams keep from being used again"
            )
    predicted = replay(plan)
    tape = measured.read_tape()
    steady = measured.steady
    seen = replay(tape) if tape is not None else None
    if steady is not None and steady.alloc_retries:
        remarks.append(
            f"the allocator had to free its cache and retry {steady.alloc_retries} times: what was measured "
            "is what the card left room for, not what the run would take"
        )
    if not measured.run.cudnn_attention:
        remarks.append("cuDNN's attention was switched off, and the plan is of what PyTorch takes then")
    played = None
    if measured.device.kind == "cuda":
        limit = measured.run.cap_bytes
        played = simulated(measured.model, measured.recipe, plan, capacity=room_of(measured), limit=limit)
    reserved = Figure(
        predicted=None if played is None else played.in_step,
        measured=steady.reserved_bytes if steady else None,
    )
    blocks = predicted.allocated_bytes if played is None else played.allocated
    return Comparison(
        title=measured.title,
        label=measured.label,
        outcome=measured.outcome.kind,
        why=measured.outcome.why,
        event=measured.outcome.event,
        step=steady.number if steady else None,
        allocated=Figure(predicted=blocks, measured=steady.allocated_bytes if steady else None),
        tensors=Figure(
            predicted=predicted.allocated_bytes, measured=seen.allocated_bytes if seen is not None else None
        ),
        reserved=reserved,
        on_card=_on_card(measured, reserved),
        categories={
            category: Figure(
                predicted=predicted.by_category[category],
                measured=seen.by_category[category] if seen is not None else None,
            )
            for category in Category
        },
        predicted_peak=_where(predicted),
        measured_peak=_where(seen) if seen is not None else None,
        room=room_of(measured),
        # on a host nothing was near its limit, so nothing is shown
        fits_predicted=None if played is None else played.ran_out is None,
        fits_measured=_fitted(measured),
        diff=_diff(plan, tape),
        remarks=tuple(remarks),
        ranks=tuple(_of_rank(one) for one in measured.by_rank()),
    )


def _of_rank(measured: Measurement) -> OfRank:
    found = compare(measured.model_copy(update={"ranks": ()}))
    return OfRank(rank=measured.rank, **{name: getattr(found, name) for name in _EACH})


_EACH = ("outcome", "why", "allocated", "tensors", "reserved")


def room_of(measured: Measurement) -> int:
    """Bytes that the allocator could have: the card less what a CUDA context takes, or its cap, if less."""
    card = max(measured.device.total_bytes - context_of(measured.device.name), 0)
    return card if measured.run.cap_bytes is None else min(measured.run.cap_bytes, card)


def _on_card(measured: Measurement, reserved: Figure) -> Figure:
    """All that the process takes: the driver's figure for it, or that of the card less what was there."""
    steady = measured.steady
    seen = None
    if steady is not None:
        seen = steady.process_bytes
        if seen is None and steady.driver_bytes is not None:
            seen = max(steady.driver_bytes - (measured.baseline_driver_bytes or 0), 0)
    planned = None if reserved.predicted is None else reserved.predicted + context_of(measured.device.name)
    return Figure(predicted=planned, measured=seen)


def _fitted(measured: Measurement) -> bool | None:
    if measured.device.kind == "cpu":
        return None
    return {"trained": True, "out of memory": False}.get(measured.outcome.kind)


def _where(peak: Peak) -> Where:
    return Where(phase=peak.phase.value, layer=peak.layer, module=peak.module, operation=peak.operation)


def _diff(plan: Tape, tape: Tape | None) -> Diff | None:
    return diff(plan, tape) if tape is not None else None


def as_json(measured: Measurement, comparison: Comparison) -> dict[str, Any]:
    """Both as one document, without the tape and the model's configuration."""
    left_out: Any = {"tape": True, "model": {"config"}, "ranks": {"__all__": {"tape"}}}
    run = measured.model_dump(mode="json", exclude=left_out)
    found = comparison.model_dump(mode="json")
    for name in ("allocated", "tensors", "reserved", "on_card"):
        figure: Figure = getattr(comparison, name)
        found[name] |= {"error": figure.error, "percent": figure.percent}
    return {"measurement": run, "comparison": found | {"reason": comparison.reason}}
