"""What holds of every answer."""

from __future__ import annotations

import itertools
import json
from typing import Any, NoReturn

from memplan.asked.gpus import find_gpu
from memplan.device.fit import Run, context_bytes, judge
from memplan.planning.plan import Plan
from memplan.tape import Tape, replay, static_bytes, timeline

from .harness import Fault

FITS = "fits"
SHARES = (0.5, 0.9, 0.97, 0.99, 1.0, 1.015, 1.03, 1.5)  # of what a run reserves


def holds(fact: bool, otherwise: str, detail: object = "") -> None:
    """Raise a fault unless something is so."""
    if not fact:
        raise Fault(otherwise, str(detail))


def sound_plan(plan: Plan, *, cards: bool = False) -> None:
    """Bytes add up, verdicts agree; with ``cards``, what fits on a card fits on every larger one."""
    tensors, parts = plan.peak.tensor_bytes, plan.peak.by_category.model_dump()
    holds(tensors > 0 and min(parts.values()) >= 0, "bytes that are not positive", parts)
    holds(sum(parts.values()) == tensors, "categories don't add up to the peak", parts)
    summary = sum(plan.summary.model_dump().values())
    holds(summary == tensors, "the summary doesn't add up to the peak", f"{summary} {tensors}")
    resting = sum(plan.static_bytes.model_dump().values())
    holds(0 < resting <= tensors, "more rests on the card than is there at the peak", f"{resting} {tensors}")
    allocated, reserved = plan.peak.allocated_bytes, plan.allocator.reserved_bytes
    holds(
        tensors <= allocated <= reserved, "tensors, blocks and segments", f"{tensors} {allocated} {reserved}"
    )
    holds(allocated == plan.allocator.allocated_bytes, "two peaks of allocated bytes", plan.allocator)
    counts = plan.parameters
    holds(0 < counts.trainable <= counts.total, "trainable parameters beyond all", counts)
    for fit in plan.fits:
        holds(fit.reserved_bytes + fit.context_bytes == fit.needed_bytes, "needed bytes don't add up", fit)
    told = [verdict for _, verdict in plan.glances()]
    holds(told == [fit.verdict for fit in plan.fits], "a glance and the verdict disagree", plan.fits)
    text = plan.model_dump_json()
    holds(Plan.model_validate_json(text).model_dump_json() == text, "JSON doesn't read back equal", text)
    json.loads(text, parse_constant=_no_json)
    if cards:
        _monotone(plan.run())


def _monotone(run: Run) -> None:
    card = find_gpu("a100-80")
    if len(run.tape.events) > 50_000:  # eight simulations are more than one question
        return
    if run.settings.limit(1 << 40) is not None:  # a share of the card: other sizes are the edge
        return
    whole = run.free.reserved
    seen = []
    for share in SHARES:
        visible = (int(whole * share) + context_bytes(card, run.card, run.ranks) >> 20) + 1
        sized = card.model_copy(update={"name": "a card of a test", "torch_visible_mib": visible})
        seen.append(judge(sized, run).verdict)
    # A card that is too small may be just small enough for the allocator to give memory back in time: there
    # "tight" and "does not fit" come and go, as they do in PyTorch.
    fits = [verdict == FITS for verdict in seen]
    holds(fits == sorted(fits), "a larger card gets a worse verdict", dict(zip(SHARES, seen, strict=True)))
    holds(fits[-1] and not fits[0], "half of what is reserved fits, or half as much again does not", seen)


def sound_tape(tape: Tape, events: int = 20_000) -> None:
    """Replay and timeline of a tape agree; of a long one, as far as ``events`` go."""
    peak = replay(tape)
    holds(peak.allocated_bytes >= 0, "a peak below nothing", peak.allocated_bytes)
    holds(sum(peak.by_category.values()) == peak.allocated_bytes, "categories don't add up to the peak", peak)
    holds(min(peak.by_category.values()) >= 0, "bytes that are not positive", peak.by_category)
    holds(min(static_bytes(tape).values()) >= 0, "bytes that are not positive", static_bytes(tape))
    points = [point.allocated_bytes for point in itertools.islice(timeline(tape), events)]
    highest = max(points, default=0)
    holds(highest <= peak.allocated_bytes, "the timeline goes above the peak", f"{highest} {peak}")
    if len(points) < events:
        holds(highest == peak.allocated_bytes, "the timeline does not reach the peak", f"{highest} {peak}")


def strict_json(text: str) -> Any:
    """The value of JSON as its standard has it."""
    try:
        return json.loads(text, parse_constant=_no_json)
    except ValueError as error:
        raise Fault("no valid JSON", f"{error}: {text[:100]}") from None


def _no_json(name: str) -> NoReturn:
    raise Fault("JSON with a number that is none", name)
