"""What to know of a run beside its steps: evaluations, and steps of other lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.report.wording import short_card
from memplan.units import gib

if TYPE_CHECKING:
    from memplan.planning.plan import Plan


def slipped(plan: Plan) -> str | None:
    """What the usual slip with this trainer costs; else None."""
    if plan.slip is None or plan.slip.more_bytes <= 0:
        return None
    told = plan.slip.told
    return f"{told[0].upper()}{told[1:]}: {plan.slip.more_bytes / 2**30:.1f} GiB more."


def evaluating(plan: Plan) -> str | None:
    """The warning where the Trainer's default evaluation takes more than a training step; else None."""
    found = plan.evaluation
    if found is None:
        return None
    whose, smaller = "the Trainer's default batch", "per_device_eval_batch_size=1"
    if plan.read is not None:
        key = "eval_batch_size" if plan.read.kind == "axolotl" else "per_device_eval_batch_size"
        whose, smaller = "its batch", f"{key}: 1"
    if found.tensor_bytes <= plan.peak.tensor_bytes:
        if not found.fits:
            return None
        return (
            f"Evaluating with {whose} of {found.batch_size} takes more than a training "
            f"step there ({_cards(plan)}): set {smaller}."
        )
    sentence = (
        f"Evaluating with {whose} of {found.batch_size} takes at "
        f"least {gib(found.tensor_bytes)} GiB, more than a training step"
    )
    if found.fits:
        sentence += f" ({_cards(plan)})"
    if found.with_one_bytes < found.tensor_bytes:
        sentence += f": set {smaller} ({gib(found.with_one_bytes)} GiB)"
    return sentence + "."


def _cards(plan: Plan) -> str:
    assert plan.evaluation is not None
    return "; ".join(
        f"{short_card(fit.gpu)}: {gib(fit.reserved_bytes)} reserved, {fit.verdict}"
        for fit in plan.evaluation.fits
    )


def lengths(plan: Plan) -> str | None:
    """What sequences of different lengths make of the reserved bytes, where they were played; else None."""
    found = plan.played
    if found is None:
        return None
    more = plan.allocator.reserved_bytes - found.alone_bytes
    apart = f"{gib(abs(more))} GiB {'more' if more > 0 else 'less'} than" if more else "as much as"
    return (
        f"Lengths ({found.source}): {found.steps} steps of {found.shortest:,} to {found.longest:,} tokens a "
        f"sequence reserve {gib(plan.allocator.reserved_bytes)} GiB, {apart} if all were as the longest step."
    )


# Emulated (A100 80 GB, torch 2.13): batch 4, lengths uniform up to 1024, 40 steps, LoRA; docs/fit.md.
_VARYING = (
    "Steps are taken to be of one length. Where lengths vary, the allocator keeps blocks of each and may "
    "reserve 2.5 times as much (seen in emulated runs), which --lengths plays; "
    "PYTORCH_ALLOC_CONF=expandable_segments:True keeps it within 1.1 times."
)


def varying(plan: Plan) -> str | None:
    """What lengths that vary from step to step do, unless the recipe has the setting against it or they were
    played."""
    from memplan.asked.alloc_conf import parse_settings

    if plan.played is not None or parse_settings(plan.recipe.alloc_conf).expandable_segments:
        return None
    return _VARYING
