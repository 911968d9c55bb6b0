"""A plan on the terminal: what was asked, where the peak's bytes are, when it happens, what it fits on."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.text import Text

from memplan.errors import UnknownName
from memplan.report.console import QUIET, Cell, bar, heading, note, paragraph, speaks_unicode, table, warning
from memplan.report.evaluation import evaluating, lengths, slipped
from memplan.report.headline import Line, accumulating, at_a_glance, verdicts
from memplan.report.read import show_differences, show_ignored, show_read
from memplan.report.screen import DETAIL, Part, blank, show
from memplan.report.wording import asked_and_default, short_card
from memplan.units import count, gib, ratio, share

if TYPE_CHECKING:
    from rich.console import Console

    from memplan.asked.gpus import Gpu
    from memplan.device.fit import Fit, Verdict
    from memplan.planning.plan import Plan
    from memplan.planning.records import ModelInfo, PeakInfo

# What each category is called, and its colour.
CATEGORIES = {
    "weights": ("weights", "blue"),
    "quantization_state": ("quantisation state", "cyan"),
    "adapters": ("adapters", "green"),
    "gradients": ("gradients", "yellow"),
    "optimizer_state": ("optimizer state", "magenta"),
    "activations": ("activations", "red"),
    "logits_and_loss": ("logits and loss", "bright_red"),
    "temporaries": ("temporaries", "bright_black"),
    "communication": ("communication", "bright_blue"),
}
SUMMARY = {
    "weights": "weights",
    "lora_parameters": "LoRA parameters",
    "optimizer_state": "optimizer state",
    "activations": "activations",
}
RESTS = "rests of blocks"
OTHERS = "others"
FOOTNOTE = (
    "Quantisation state counts as weights, gradients as optimizer state, "
    "logits, temporaries, communication and rests of blocks as activations."
)
TIGHT = "Tight: it gets through, but only just, or only by giving cached memory back in between."
LEFT = (
    "Left is what the peak and what a process takes beside it leave; what the allocator loses comes out "
    "of it."
)
VERDICT_STYLES = {"fits": "bold green", "tight": "bold yellow", "does not fit": "red"}

_LABEL_WIDTH = 18  # of the longest category, so that the tables of a report line up
_BAR_MARGIN = 2 + _LABEL_WIDTH + 2 + len("1,000.00 GiB") + 2 + len("100.0 %") + 2


def show_plan(
    plan: Plan,
    console: Console,
    given: Collection[str] = (),
    *,
    simulated: bool = True,
    verbose: bool = False,
) -> None:
    """Print a plan. ``given`` are the recipe's fields that were asked for; the rest are shown as defaults.
    ``simulated=False`` leaves out what only the allocator's simulation says, where a verdict can do without.
    ``verbose``: more than a first screen.
    """
    fits = plan.fits if simulated else ()
    glances = [] if simulated else list(plan.glances())
    lines = verdicts(fits, plan.recipe.gpus) if fits else at_a_glance(plan, glances)

    def cards(console: Console) -> None:
        if fits:
            console.print()
            reserved = gib(plan.allocator.reserved_bytes)
            heading(console, "Cards", f"{reserved} GiB reserved ({plan.provenance}, allocator simulated)")
            show_fits(plan, console)
        elif glances:
            console.print()
            _show_glances(plan, glances, console)

    parts = [
        Part(lambda console: show_headline(lines, console)),
        Part(blank),
        Part(lambda console: show_model(plan.model, console)),
        Part(lambda console: show_note(plan.model, console)),
        Part(lambda console: show_read(plan, console, whole=verbose)),
        Part(lambda console: show_ignored(plan, console, whole=verbose), 4, "keys that were ignored"),
        Part(lambda console: _show_parameters(plan, console), 6),
        Part(lambda console: show_recipe(plan, given, console)),
        Part(blank),
        Part(lambda console: _show_peak(plan, console, whole=verbose)),
        Part(lambda console: show_host(plan, console)),
        Part(lambda console: _show_summary(plan, console), DETAIL, "the four categories"),
        Part(cards, DETAIL, "each card"),
        Part(
            lambda console: _show_lacking(plan, console, named=bool(fits)),
            1 if fits else 4,
            "what cards lack",
        ),
        Part(lambda console: warn(accumulating(plan, fits), console), 4, "accumulation"),
        Part(lambda console: _show_next(plan, console, fits), 3),
        Part(lambda console: blank(console) if fits else None, DETAIL),
        Part(lambda console: show_differences(plan, console)),
        Part(lambda console: warn(slipped(plan), console), 2, "the usual slip"),
        Part(lambda console: warn(lengths(plan), console)),
        Part(lambda console: warn(evaluating(plan), console), 5, "evaluation"),
    ]
    show(parts, console, verbose=verbose)


def show_headline(lines: Iterable[Line], console: Console) -> None:
    """Print the answer."""
    for line in lines:
        note(console, line.text, "bold" if line.verdict is None else VERDICT_STYLES[line.verdict])


def _show_next(plan: Plan, console: Console, fits: Collection[Fit]) -> None:
    if not fits:
        several = plan.recipe.gpus
        cards, name = ("One kind of card", f"{several}xNAME") if several > 1 else ("One card", "NAME")
        note(console, f"{cards}, and what to change there: `memplan fit {plan.model.name} --gpu {name}`")
    elif any(fit.verdict == "does not fit" for fit in fits):
        note(console, "What would make it fit: `memplan fit`, asked the same")


def show_host(plan: Plan, console: Console) -> None:
    """Print what is offloaded."""
    each, count = plan.host_bytes, plan.recipe.gpus_per_node
    node = "" if count == plan.recipe.gpus else " of a node"
    if each:
        note(
            console,
            f"On the host: {gib(each)} GiB for each process, {gib(each * count)} GiB for {count}{node}; "
            "pinned memory is rounded up to powers of two",
        )


def warn(sentence: str | None, console: Console) -> None:
    """Print a warning if there is one."""
    if sentence is not None:
        warning(console, sentence)


def show_recipe(plan: Plan, given: Collection[str], console: Console, fields: Collection[str] = ()) -> None:
    """Print what was asked, and what was left to the defaults: of these, ``fields`` if they are named."""
    asked, default = asked_and_default(plan.recipe, given, fields)
    paragraph(console, asked, "asked   ")
    paragraph(console, default, "defaults", QUIET)


def _show_parameters(plan: Plan, console: Console) -> None:
    total, trainable = plan.parameters.total, plan.parameters.trainable
    console.print(
        f"{count(total)} parameters, {count(trainable)} of them trainable ({ratio(trainable, total)})"
    )


def _show_glances(plan: Plan, glances: Iterable[tuple[Gpu, Verdict]], console: Console) -> None:
    """Print each card, what the peak leaves of it, and the verdict."""
    from memplan.cuda.card import Card
    from memplan.device.fit import context_bytes, usable_bytes

    heading(console, "Cards")
    rows = [[Text(cell, QUIET) for cell in ("GiB", "usable", "left", "")]]
    for gpu, verdict in glances:
        usable = usable_bytes(gpu)
        left = usable - plan.peak.allocated_bytes - context_bytes(gpu, Card())
        rows.append(
            [
                Text(short_card(gpu.name)),
                Text(gib(usable)),
                Text(gib(left)),
                Text(verdict, VERDICT_STYLES[verdict]),
            ]
        )
    table(console, rows, "<>><", _LABEL_WIDTH)
    note(console, LEFT)


def lacking(plan: Plan, *, named: bool) -> list[str]:
    """What the cards lack, and what was taken for them; of cards that nobody named, if it fits them."""
    from memplan.planning.cards import remark

    found = []
    with suppress(UnknownName):  # a plan read from JSON may be of a card that only its machine knew
        for gpu, verdict in plan.glances():
            said = remark(gpu, plan.recipe, named=named) if named or verdict != "does not fit" else None
            if said:
                found.append(f"{short_card(gpu.name)}: {said}")
    return found


def _show_lacking(plan: Plan, console: Console, *, named: bool) -> None:
    for line in lacking(plan, named=named):
        note(console, line)


def show_model(model: ModelInfo, console: Console) -> None:
    """Print which model it is about."""
    hub_id = f"  {model.hub_id}" if model.hub_id and model.hub_id != model.name else ""
    console.print(Text.assemble((model.name, "bold"), hub_id, (f"  {model.architecture}", QUIET)))


def show_note(model: ModelInfo, console: Console) -> None:
    """Print how its name was understood, and what surprises."""
    if model.note:
        note(console, model.note)


def needed(plan: Plan) -> str:
    """What the bytes are that a card is said to need: a tape of real code begins when all is loaded."""
    loaded = plan.allocator.loading
    told = (
        ""
        if loaded in (None, plan.provenance)
        else f" ({loaded}, of the parameters that were {plan.provenance})"
    )
    steps = f"loading{told}, the first step and a later one" if loaded else "the first step and a later one"
    text = (
        f"Needed is what PyTorch's allocator reserves over {steps}, simulated, and what a process takes "
        "beside it (assumed)."
    )
    return (
        text if loaded else f"{text} How the model is loaded is not {plan.provenance}, and may reserve more."
    )


def show_fits(plan: Plan, console: Console) -> None:
    """Print the cards and what the plan leaves of each, in GiB."""
    fits = plan.fits
    rows = [[Text(cell, QUIET) for cell in ("GiB", "usable", "needed", "headroom", "")]]
    for fit in fits:
        sizes = (Text(gib(size)) for size in (fit.total_bytes, fit.needed_bytes, fit.headroom_bytes))
        rows.append([Text(short_card(fit.gpu)), *sizes, Text(fit.verdict, VERDICT_STYLES[fit.verdict])])
    table(console, rows, "<>>><", _LABEL_WIDTH)
    for fit in fits:
        if fit.note and fit.headroom_bytes != fit.total_bytes - fit.needed_bytes:
            note(console, f"{short_card(fit.gpu)}: {fit.note}")  # of a share of the card, which needs saying
    note(console, needed(plan))
    if any(fit.verdict == "tight" for fit in fits):
        note(console, TIGHT)


def moment(peak: PeakInfo) -> str:
    """When the peak happens: phase, layer, operation and module."""
    layer = "" if peak.layer is None else f" of layer {peak.layer}"
    module = peak.module.partition(f".{peak.layer}.")[2] or peak.module  # the layer is said already
    module = f" in {module}" if module else ""
    return f"{peak.phase}{layer}, at {peak.operation}{module}"


def _show_peak(plan: Plan, console: Console, *, whole: bool) -> None:
    """Print when the peak is and whose bytes are there; unless ``whole``, the small categories in one."""
    peak = plan.peak
    heading(console, "Peak", f"{gib(peak.allocated_bytes)} GiB allocated ({plan.provenance})")
    console.print(Text(f"  in {moment(peak)}"))
    if plan.libraries:
        versions = [f"{name} {version}" for name, version in plan.libraries.items()]
        paragraph(console, versions, f"  {plan.provenance} with", QUIET)
    if plan.allocator.loading not in (None, plan.provenance):
        console.print(Text(f"  loading {plan.allocator.loading}, which moves what is reserved only", QUIET))
    total, rest, width = peak.allocated_bytes, rests(plan), max(console.width - _BAR_MARGIN, 8)
    rows: list[list[Cell]] = []
    for field, (label, colour) in CATEGORIES.items():
        part = getattr(peak.by_category, field)
        if not whole and 100 * part < total:
            rest += part
        elif part:
            drawn = bar(part, total, width, unicode=speaks_unicode(console))
            rows.append([label, f"{gib(part)} GiB", share(part, total), Text(drawn, colour)])
    if rest:
        rows.append([RESTS if whole else OTHERS, f"{gib(rest)} GiB", share(rest, total), ""])
    table(console, rows, "<>><", _LABEL_WIDTH)


def rests(plan: Plan) -> int:
    """Bytes of blocks at the peak that no tensor has."""
    return max(plan.peak.allocated_bytes - plan.peak.tensor_bytes, 0)


def known(plan: Plan) -> dict[str, int]:
    """The four categories that people know, which add up to what is allocated."""
    parts = {field: getattr(plan.summary, field) for field in SUMMARY}
    return {**parts, "activations": parts["activations"] + rests(plan)}


def _show_summary(plan: Plan, console: Console) -> None:
    console.print()
    heading(console, "The same in the four categories that people know")
    whole = plan.peak.allocated_bytes
    rows = [[SUMMARY[field], f"{gib(size)} GiB", share(size, whole)] for field, size in known(plan).items()]
    table(console, rows, "<>>", _LABEL_WIDTH)
    note(console, FOOTNOTE)
