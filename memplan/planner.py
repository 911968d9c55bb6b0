"""Spec + recipe -> Plan: the public heart of memplan."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from memplan.card import FLASH_CAPABILITY, Card
from memplan.errors import MemplanError
from memplan.fit import Fit, judge
from memplan.gpu import Gpu
from memplan.recipe import Mode, Recipe
from memplan.spec import ModelSpec
from memplan.tape import Category, Peak, Point, Tape, replay, static_bytes, timeline

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelInfo(_Record):
    """Which model the plan is for. ``note`` says what needs saying: how a name was resolved, what about the
    model surprises."""

    name: str
    hub_id: str | None
    architecture: str
    note: str | None = None


class ParameterCounts(_Record):
    """Parameters (tied weights counted once), adapters included in both counts."""

    total: int
    trainable: int


class StaticBytes(_Record):
    """Bytes that are there before a steady-state step begins."""

    weights: int
    quantization_state: int
    adapters: int
    optimizer_state: int


class CategoryBytes(_Record):
    """Bytes by category; adds up to the peak."""

    weights: int
    quantization_state: int
    adapters: int
    gradients: int
    optimizer_state: int
    activations: int
    logits_and_loss: int
    temporaries: int


class PeakInfo(_Record):
    """The peak of allocated bytes: how much, when, in which operation, and whose bytes."""

    allocated_bytes: int
    phase: Literal["forward", "backward", "optimizer"]
    operation: str
    module: str
    layer: int | None
    by_category: CategoryBytes


class Summary(_Record):
    """The four categories that people know. Quantisation state counts as weights, gradients as
    optimizer state, logits and temporaries as activations. Adds up to the peak."""

    weights: int
    lora_parameters: int
    optimizer_state: int
    activations: int


class Plan(_Record):
    """The answer. All byte fields are bytes of device memory."""

    schema_version: int = SCHEMA_VERSION
    memplan_version: str
    provenance: Literal["predicted", "traced", "measured"] = "predicted"
    model: ModelInfo
    parameters: ParameterCounts
    recipe: Recipe
    static_bytes: StaticBytes
    peak: PeakInfo
    summary: Summary
    fits: tuple[Fit, ...] = Field(default=())
    # the versions of the libraries that ran, unless predicted
    libraries: dict[str, str] = Field(default_factory=dict)

    _tape: Tape | None = PrivateAttr(default=None)

    def timeline(self) -> Iterator[Point]:
        """Live bytes by category after every event of the step (see :class:`memplan.tape.Point`)."""
        if self._tape is None:
            raise MemplanError("a plan read from JSON has no tape, so no timeline: call plan() again")
        return timeline(self._tape)


def plan(
    model: str | Path | ModelSpec,
    recipe: Recipe | None = None,
    *,
    gpus: Iterable[str] | None = None,
) -> Plan:
    """Predict the memory of one steady-state training step.

    ``model`` is an alias (``llama-70b``), a Hub id, a path to a config.json or its folder, or a spec.
    ``gpus`` are names of cards to judge (default: a representative set).
    Raises MemplanError (UnknownName, SpecError, RecipeError, UnsupportedArchitecture).
    """
    from memplan.models import parameters
    from memplan.resolve import resolve

    judged(gpus)  # names that are wrong are said to be before anything is played
    found = resolve(model)
    spec = found.spec
    resolved = parameters.resolve_recipe(spec, recipe or Recipe())
    tape = _write(spec, resolved)
    base, adapters, trainable = parameters.count(spec, resolved)
    return plan_from_tape(
        tape,
        ModelInfo(
            name=spec.name,
            hub_id=spec.hub_id,
            architecture=spec.architecture,
            note=_join(found.note, _experts(spec, resolved), _too_long(spec, resolved)),
        ),
        ParameterCounts(total=base + adapters, trainable=trainable),
        resolved,
        gpus,
        rewrite=partial(_write, spec, resolved),
    )


def _experts(spec: ModelSpec, recipe: Recipe) -> str | None:
    """What surprises about 4-bit models with experts."""
    if not spec.num_experts or recipe.mode is not Mode.QLORA:
        return None
    dtype = "float32, as PEFT's preparation makes them" if recipe.kbit_prep else recipe.dtype.value
    return (
        f"bitsandbytes quantises linear layers only, and transformers 5 has experts in none: they are {dtype}"
    )


def _too_long(spec: ModelSpec, recipe: Recipe) -> str | None:
    longest = spec.max_position_embeddings
    if longest is None or recipe.seq_len <= longest:
        return None
    return f"seq_len {recipe.seq_len} is beyond the {longest} positions that the model was made for"


def _join(*sentences: str | None) -> str | None:
    return "; ".join(sentence for sentence in sentences if sentence) or None


def _write(spec: ModelSpec, recipe: Recipe, card: Card | None = None) -> Tape:
    from memplan.models.step import write_tape

    with _one_at_a_time, _without_cycle_collector():
        return write_tape(spec, recipe, card=card)


def judged(gpus: Iterable[str] | None) -> list[Gpu]:
    """The cards of these names, or the representative set."""
    from memplan.gpu import DEFAULT_GPUS, find_gpu

    if isinstance(gpus, str):
        gpus = [gpus]
    return [find_gpu(name) for name in (DEFAULT_GPUS if gpus is None else gpus)]


def plan_from_tape(
    tape: Tape,
    model: ModelInfo,
    parameters: ParameterCounts,
    recipe: Recipe,
    gpus: Iterable[str] | None,
    libraries: dict[str, str] | None = None,
    rewrite: Callable[[Card], Tape] | None = None,
) -> Plan:
    """What a tape says, whoever wrote it for the reference card. ``recipe`` is resolved; ``rewrite`` writes
    the tape again for a card on which other kernels run."""
    from memplan import __version__

    peak = replay(tape)
    static = static_bytes(tape)
    result = Plan(
        memplan_version=__version__,
        provenance=tape.provenance,
        model=model,
        parameters=parameters,
        recipe=recipe,
        static_bytes=StaticBytes(
            weights=static[Category.WEIGHTS],
            quantization_state=static[Category.QUANTIZATION_STATE],
            adapters=static[Category.ADAPTERS],
            optimizer_state=static[Category.OPTIMIZER_STATE],
        ),
        peak=_peak_info(peak),
        summary=_summary(peak.by_category),
        fits=tuple(_fits(tape, peak, static, gpus, rewrite)),
        libraries=libraries or {},
    )
    result._tape = tape
    return result


def _fits(
    tape: Tape,
    peak: Peak,
    static: dict[Category, int],
    gpus: Iterable[str] | None,
    rewrite: Callable[[Card], Tape] | None,
) -> Iterator[Fit]:
    """A verdict for each card. Before Ampere there is no FlashAttention: PyTorch then takes kernels that need
    more, so the step is written again; flash-attn itself, and a trace made for Ampere, can't be judged."""
    package = "_flash_attn_forward" in tape.operations
    flash = package or "_scaled_dot_product_flash_attention" in tape.operations
    for card in judged(gpus):
        if not flash or card.capability is None or card.capability >= FLASH_CAPABILITY:
            yield judge(card, peak.allocated_bytes, sum(static.values()))
        elif rewrite is not None and not package:
            older = Card(card.capability)
            theirs = rewrite(older)
            resting = sum(static_bytes(theirs).values())
            yield judge(card, replay(theirs).allocated_bytes, resting, written_for=older)
        elif gpus is not None:
            remedy = "use attn 'sdpa'" if package else "plan without a trace, or trace with attn 'eager'"
            raise MemplanError(f"this step runs FlashAttention, which the {card.name} can't: {remedy}")


def predicted_tape(model: str | Path | ModelSpec, recipe: Recipe | None = None) -> Tape:
    """The tape of :func:`plan` with every layer played, for comparing it with others."""
    from memplan.models import parameters
    from memplan.models.step import write_tape
    from memplan.resolve import resolve

    spec = resolve(model).spec
    with _one_at_a_time, _without_cycle_collector():
        return write_tape(spec, parameters.resolve_recipe(spec, recipe or Recipe()), folded=False)


# The shadow records into one place, as eager PyTorch does on one stream.
_one_at_a_time = Lock()


@contextmanager
def _without_cycle_collector() -> Iterator[None]:
    """The shadow makes thousands of objects and no cycles: looking for some costs a tenth of a plan."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _peak_info(peak: Peak) -> PeakInfo:
    return PeakInfo(
        allocated_bytes=peak.allocated_bytes,
        phase=peak.phase.value,
        operation=peak.operation,
        module=peak.module,
        layer=peak.layer,
        by_category=CategoryBytes(**{category.value: size for category, size in peak.by_category.items()}),
    )


def _summary(size: dict[Category, int]) -> Summary:
    return Summary(
        weights=size[Category.WEIGHTS] + size[Category.QUANTIZATION_STATE],
        lora_parameters=size[Category.ADAPTERS],
        optimizer_state=size[Category.OPTIMIZER_STATE] + size[Category.GRADIENTS],
        activations=size[Category.ACTIVATIONS] + size[Category.LOGITS_AND_LOSS] + size[Category.TEMPORARIES],
    )
