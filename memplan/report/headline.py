"""The answer in a sentence or two, before all else: does it fit, on what, by how much, and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from memplan.report.wording import short_card
from memplan.units import gib

if TYPE_CHECKING:
    from memplan.asked.gpus import Gpu
    from memplan.device.fit import Fit, Verdict
    from memplan.planning.plan import Plan
    from memplan.planning.records import Advice

FEW = 3  # cards, each of which gets a line


class Line(NamedTuple):
    """A sentence, and the verdict that it tells if it tells one."""

    text: str
    verdict: Verdict | None = None


def verdicts(fits: Sequence[Fit], each: int = 1) -> list[Line]:
    """What is said of the cards that were asked about; of many, in one sentence. ``each``: how many of a card
    share the step."""
    if len(fits) <= FEW:
        return [Line(_verdict(fit, each), fit.verdict) for fit in fits]
    told = _together([(fit.gpu, fit.verdict, fit.total_bytes) for fit in fits])
    if each > 1:
        told = told._replace(text=f"On each of {each} GPUs: {told.text[0].lower()}{told.text[1:]}")
    return [told]


def of_modes(plans: Sequence[Plan], cards: Sequence[Sequence[tuple[Gpu, Verdict]]]) -> list[Line]:
    """A line for each mode of a model; ``cards``: each plan's, with verdicts."""
    lines = []
    for plan, glances in zip(plans, cards, strict=True):
        told = [(gpu.name, verdict, gpu.visible_bytes) for gpu, verdict in glances]
        mode = f"{plan.recipe.mode.value:5}"
        if len(told) == 1:
            ((name, verdict, size),) = told
            sizes = f"{gib(plan.peak.allocated_bytes)} at the peak, {gib(size)} usable"
            card = _each(name, plan.recipe.gpus, "the ")
            lines.append(Line(f"{mode} {verdict} on {card} ({sizes})", verdict))
        elif told:
            line = _together(told)
            lines.append(line._replace(text=f"{mode} {line.text[0].lower()}{line.text[1:]}"))
    return lines


def at_a_glance(plan: Plan, glances: Iterable[tuple[Gpu, Verdict]]) -> list[Line]:
    """The same where nobody named a card, without the allocator's simulation."""
    cards = [(gpu.name, verdict, gpu.visible_bytes) for gpu, verdict in glances]
    peak = gib(plan.peak.allocated_bytes)
    each = "" if plan.recipe.gpus == 1 else f" on each of {plan.recipe.gpus} GPUs"
    if each and any(verdict != "does not fit" for _, verdict, _ in cards):  # as what is reserved has it
        each = f" and {gib(plan.allocator.reserved_bytes)} reserved{each}"
    if not cards:
        return [Line(f"{peak} GiB at the peak{each}")]
    told = _together(cards)
    return [Line(f"{peak} GiB at the peak{each}: {told.text[0].lower()}{told.text[1:]}", told.verdict)]


def remedies(plan: Plan) -> list[Line]:
    """What to change for each card on which it does not fit."""
    found = [
        (advice.gpu, line)
        for advice in plan.advice
        if (line := _remedy(advice, plan.read is not None)) is not None
    ]
    if len(plan.fits) == 1:
        return [line for _, line in found]
    return [
        line._replace(text=f"{short_card(gpu)}: {line.text[0].lower()}{line.text[1:]}") for gpu, line in found
    ]


def _remedy(advice: Advice, of_a_file: bool) -> Line | None:
    for change in advice.changes[:1]:
        if change.verdict != "does not fit" and change.needed_bytes is not None:
            how = "fits" if change.verdict == "fits" else "gets through, just,"
            said = change.config if of_a_file else change.command
            return Line(
                f"It {how} with {said} ({gib(change.needed_bytes)} GiB): {change.title}",
                change.verdict,
            )
    if advice.combination is not None:
        together = advice.combination
        how = "fits" if together.verdict == "fits" else "gets through, just,"
        changes = together.config or together.command
        return Line(f"It {how} with {changes} ({gib(together.needed_bytes)} GiB)", together.verdict)
    if advice.cards:
        return Line(f"No change makes it fit; a larger card does: {short_card(advice.cards[0])}")
    return Line("No change makes it fit, and no larger card that is listed") if advice.changes else None


def largest(plan: Plan, what: str, value: int) -> Line:
    """What --maximize found."""
    (fit,) = plan.fits
    recipe = plan.recipe
    kept = f"batch size {recipe.batch_size}" if what == "seq_len" else f"{recipe.seq_len:,} tokens each"
    found = f"{value:,} tokens a sequence" if what == "seq_len" else f"{value:,} sequences at once"
    return Line(f"Up to {found} fit {_each(fit.gpu, recipe.gpus, 'the ')} ({kept})", "fits")


def counted(plan: Plan) -> list[Line]:
    """What --how-many found."""
    lines = []
    for found in plan.how_many:
        card = short_card(plan.fits[0].gpu)
        each = "" if found.needed_bytes is None else f" ({gib(found.needed_bytes)} GiB needed on each)"
        if found.gpus == 1:
            lines.append(Line(f"One {card} is enough{each}", "fits"))
            break  # whatever shares a step of one
        if found.gpus is None:
            lines.append(Line(f"{found.parallel}: {found.note}{each}", "does not fit"))
        else:
            tight = "" if found.tight_gpus is None else f"; tight on {found.tight_gpus}"
            lines.append(Line(f"{found.parallel}: {found.gpus} × {card}{each}{tight}", "fits"))
    return lines


def accumulating(plan: Plan, fits: Sequence[Fit] = ()) -> str | None:
    """What accumulating gradients would take, where that is more; else None. ``fits``: verdicts, where they
    are known."""
    more = plan.accumulated_bytes
    if more is None or more < plan.peak.tensor_bytes * 1.02:
        return None
    lost = [
        short_card(fit.gpu)
        for fit in fits
        if fit.verdict != "does not fit" and more > fit.total_bytes - fit.context_bytes
    ]
    then = f", which does not fit the {' or the '.join(lost)}" if lost else ""
    whole = ", not divided," if plan.recipe.parallel == "fsdp2" else ""
    return (
        f"Accumulating gradients (--gradient-accumulation-steps 2 or more) takes {gib(more)} GiB of tensors "
        f"at the peak instead of {gib(plan.peak.tensor_bytes)}, for they stay{whole} through the next "
        f"forward{then}."
    )


def _each(gpu: str, count: int, article: str = "") -> str:
    """The card; of several that share a step, each."""
    card = short_card(gpu)
    if count == 1:
        return f"{article}{card}"
    return f"each of {count} {card}s" if card.endswith(" card") else f"each of {count} {card}"


def _verdict(fit: Fit, each: int) -> str:
    card = _each(fit.gpu, each).replace("each", "Each", 1) if each > 1 else short_card(fit.gpu)
    sizes = f"({gib(fit.needed_bytes)} needed, {gib(fit.total_bytes)} usable)"
    if fit.headroom_bytes != fit.total_bytes - fit.needed_bytes:  # of a share of the card
        allowed = gib(fit.headroom_bytes + fit.reserved_bytes)
        sizes = f"({gib(fit.reserved_bytes)} reserved, PyTorch may reserve {allowed} GiB at most)"
    if fit.gets_through_on:
        others = " or ".join(short_card(name) for name in fit.gets_through_on)
        return (
            f"{card}: depends on which, {gib(-fit.headroom_bytes)} GiB short on the least {sizes}; "
            f"gets through on an {others}"
        )
    if fit.verdict == "does not fit":
        return f"{card}: does not fit, {gib(-fit.headroom_bytes)} GiB short {sizes}"
    if fit.headroom_bytes < 0:  # gets through by giving cached memory back
        return f"{card}: tight, {gib(-fit.headroom_bytes)} GiB less than it would reserve {sizes}"
    return f"{card}: {fit.verdict}, {gib(fit.headroom_bytes)} GiB to spare {sizes}"


def _together(cards: Sequence[tuple[str, Verdict, int]]) -> Line:
    """Of several cards, which it fits; ``cards``: name, verdict, usable bytes."""
    good = sorted((size, short_card(name)) for name, verdict, size in cards if verdict != "does not fit")
    bad = sorted((size, short_card(name)) for name, verdict, size in cards if verdict == "does not fit")
    if not bad:
        return Line(f"Fits all of {len(cards)} cards, down to the {_card(good[0])}", "fits")
    if not good:
        return Line(f"Fits none of {len(cards)} cards, up to the {_card(bad[-1])}", "does not fit")
    if good[0][0] > bad[-1][0]:
        more = " and larger" if len(good) > 1 else ""
        return Line(f"Fits the {_card(good[0])}{more}, not the {_card(bad[-1])}", "fits")
    return Line(f"Fits {len(good)} of {len(cards)} cards: {', '.join(name for _, name in good)}", "fits")


def _card(card: tuple[int, str]) -> str:
    return f"{card[1]} ({gib(card[0])})"
