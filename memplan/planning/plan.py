"""Spec + recipe -> Plan: the public heart of memplan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, computed_field, model_validator

from memplan.asked.gpus import Gpu
from memplan.asked.recipe import DTypeName, Kernels, Mode, Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import FLASH_CAPABILITY, Card
from memplan.device.fit import Fit, Run, Verdict, glance, judge, recast_bytes
from memplan.errors import MemplanError
from memplan.planning.predicted import write
from memplan.planning.records import (
    Advice,
    AllocatorInfo,
    CategoryBytes,
    Evaluation,
    ModelInfo,
    ParameterCounts,
    PeakInfo,
    Record,
    StaticBytes,
    Summary,
)
from memplan.planning.study import Study
from memplan.tape import Category, Peak, Point, Tape, replay, static_bytes, timeline

SCHEMA_VERSION = 1


class Plan(Record):
    """The answer. All byte fields are bytes of device memory.

    ``allocator``, ``fits`` and ``evaluation`` are found out when they are asked for: the allocator's
    simulation takes longer than all the rest.
    """

    schema_version: int = SCHEMA_VERSION
    memplan_version: str
    provenance: Literal["predicted", "traced", "measured"] = "predicted"
    model: ModelInfo
    parameters: ParameterCounts
    recipe: Recipe
    static_bytes: StaticBytes
    peak: PeakInfo
    summary: Summary
    # the versions of the libraries that ran, unless predicted
    libraries: dict[str, str] = Field(default_factory=dict)

    _tape: Tape | None = PrivateAttr(default=None)
    _runs: _Runs | None = PrivateAttr(default=None)
    _allocator: AllocatorInfo | None = PrivateAttr(default=None)
    _fits: tuple[Fit, ...] | None = PrivateAttr(default=None)
    _advice: tuple[Advice, ...] = PrivateAttr(default=())
    _evaluation: Evaluation | None = PrivateAttr(default=None)
    _study: Study | None = PrivateAttr(default=None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def allocator(self) -> AllocatorInfo:
        """The run on the simulated allocator."""
        if self._allocator is None:
            run = self._simulated().run().free
            self._allocator = AllocatorInfo(
                settings=self.recipe.alloc_conf,
                allocated_bytes=run.allocated,
                reserved_bytes=run.reserved,
                fragmentation_bytes=run.fragmentation,
            )
        return self._allocator

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fits(self) -> tuple[Fit, ...]:
        """A verdict for each card asked about."""
        if self._fits is None:
            runs = self._simulated()
            self._fits = tuple(_with_kernels(judge(gpu, runs.run(card)), card) for gpu, card in runs.cards)
        return self._fits

    @computed_field  # type: ignore[prop-decorator]
    @property
    def advice(self) -> tuple[Advice, ...]:
        """What to change, for each card that it was asked for (:meth:`advised`)."""
        return self._advice

    @computed_field  # type: ignore[prop-decorator]
    @property
    def evaluation(self) -> Evaluation | None:
        """What the Trainer's default evaluation takes; null where the step was not predicted."""
        if self._evaluation is None and self._study is not None:
            from memplan.planning.evaluation import evaluation

            self._evaluation = evaluation(self._study.spec, self.recipe)
        return self._evaluation

    def evaluated(self) -> Plan:
        """The same plan with verdicts of the run with an evaluation in it, for the cards on which that is
        higher than a step: where other kernels run than on the reference card, both are others too."""
        found = self.evaluation
        if found is None or self._study is None:
            return self
        from memplan.planning.evaluation import with_evaluation

        runs, spec = self._simulated(), self._study.spec
        longer = _Runs(lambda card: with_evaluation(runs.run(card), spec, self.recipe), runs.cards)
        higher = found.tensor_bytes > self.peak.tensor_bytes
        cards = [
            (gpu, card)
            for gpu, card in runs.cards
            if (higher if card is None else longer.run(card).free.reserved > runs.run(card).free.reserved)
        ]
        if not cards:
            return self
        # where a step does not fit, an evaluation after it is not played to its end
        possible = {fit.gpu for fit in self.fits if fit.verdict != "does not fit"}
        fits = tuple(judge(gpu, longer.run(card), explain=gpu.name in possible) for gpu, card in cards)
        result = self.model_copy()
        result._evaluation = found.model_copy(update={"fits": fits})
        return result

    def advised(self, advice: Iterable[Advice]) -> Plan:
        """The same plan with advice."""
        result = self.model_copy()
        result._advice = tuple(advice)
        return result

    @property
    def study(self) -> Study | None:
        """What has been found out beside, for further questions about the same model."""
        return self._study

    def run(self) -> Run:
        """The whole run, to be played on the allocator (:class:`memplan.device.fit.Run`)."""
        return self._simulated().run()

    def timeline(self) -> Iterator[Point]:
        """Live bytes by category after every event of the step (see :class:`memplan.tape.Point`)."""
        if self._tape is None:
            raise MemplanError("a plan read from JSON has no tape, so no timeline: call plan() again")
        return timeline(self._tape)

    def glances(self) -> Iterator[tuple[Gpu, Verdict]]:
        """The verdict for each card, without the allocator's simulation where it can be told without."""
        if self._runs is None:  # read from JSON
            from memplan.asked.gpus import find_gpu

            yield from ((find_gpu(fit.gpu), fit.verdict) for fit in self.fits)
            return
        resting = sum(self.static_bytes.model_dump().values())
        loaded = resting - self.static_bytes.optimizer_state
        recast = recast_bytes(self._tape) if self.recipe.kbit_prep and self._tape is not None else 0
        for gpu, card in self._runs.cards:
            # of a card that runs other kernels only what rests is known; settings may take more than a glance
            # allows for
            told = glance(gpu, self.peak.tensor_bytes if card is None else resting, loaded, recast)
            if told == "fits" and (card is not None or self.recipe.alloc_conf):
                told = None
            yield gpu, told or judge(gpu, self._runs.run(card)).verdict

    def _simulated(self) -> _Runs:
        if self._runs is None:
            raise MemplanError("a plan read from JSON can't be simulated: call plan() again")
        return self._runs

    @model_validator(mode="wrap")
    @classmethod
    def _keep_what_was_found(cls, data: Any, handler: Any) -> Plan:
        """Read a plan's JSON: what was simulated then is there, not to be simulated again."""
        found = {}
        if isinstance(data, dict):
            data = dict(data)
            found = {name: data.pop(name) for name in _FOUND if name in data}
        result: Plan = handler(data)
        if "allocator" in found:
            result._allocator = AllocatorInfo.model_validate(found["allocator"])
        if "fits" in found:
            result._fits = tuple(Fit.model_validate(fit) for fit in found["fits"])
        if "advice" in found:
            result._advice = tuple(Advice.model_validate(one) for one in found["advice"])
        if found.get("evaluation") is not None:
            result._evaluation = Evaluation.model_validate(found["evaluation"])
        return result


_FOUND = ("allocator", "fits", "advice", "evaluation")  # what a plan's JSON has beside its fields


@dataclass
class _Runs:
    """The runs that a plan's verdicts are about: one, or more where older cards run other kernels."""

    write: Callable[[Card | None], Run]
    cards: Sequence[tuple[Gpu, Card | None]]
    known: dict[Card | None, Run] = field(default_factory=dict)

    def run(self, card: Card | None = None) -> Run:
        """The run as that card has it; None for the reference card."""
        if card not in self.known:
            self.known[card] = self.write(card)
        return self.known[card]


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
    from memplan.importers.resolve import resolve
    from memplan.predict import parameters

    gpus = able(recipe or Recipe(), gpus)  # names that are wrong are said to be before anything is played
    found = resolve(model)
    spec = found.spec
    resolved = parameters.resolve_recipe(spec, recipe or Recipe())
    tape, study = write(spec, resolved), Study(spec)
    base, adapters, trainable = parameters.count(spec, resolved)
    result = plan_from_tape(
        tape,
        ModelInfo(
            name=spec.name,
            hub_id=spec.hub_id,
            architecture=spec.architecture,
            note=_join(
                found.note,
                _experts(spec, resolved),
                _too_long(spec, resolved),
                _saved(spec, resolved, tape),
            ),
        ),
        ParameterCounts(total=base + adapters, trainable=trainable),
        resolved,
        gpus,
        write=lambda card: study.run(resolved, card),
    )
    result._study = study
    return result


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


def _saved(spec: ModelSpec, recipe: Recipe, tape: Tape) -> str | None:
    """What memplan's kernels save of the peak; where they save nothing, what makes it."""
    if recipe.kernels is Kernels.STOCK:
        return None
    ours = replay(tape)
    stock = replay(write(spec, recipe.model_copy(update={"kernels": Kernels.STOCK}))).allocated_bytes
    size = f"{stock / 2**30:.2f} GiB"
    if ours.allocated_bytes == stock:
        return (
            f"memplan's kernels save nothing of this peak, {size} with stock kernels too: it is made in "
            f"{ours.operation}, which they leave as it is"
        )
    apart = abs(stock - ours.allocated_bytes) / 2**30
    verb = "save" if ours.allocated_bytes < stock else "need"
    more = "" if ours.allocated_bytes < stock else " more"
    return f"memplan's kernels {verb} {apart:.2f} GiB{more}: with stock kernels the peak is {size}"


def _join(*sentences: str | None) -> str | None:
    return "; ".join(sentence for sentence in sentences if sentence) or None


def judged(gpus: Iterable[str] | None) -> list[Gpu]:
    """The cards of these names, or the representative set."""
    from memplan.asked.gpus import DEFAULT_GPUS, find_gpu

    if isinstance(gpus, str):
        gpus = [gpus]
    return [find_gpu(name) for name in (DEFAULT_GPUS if gpus is None else gpus)]


def able(recipe: Recipe, gpus: Iterable[str] | None) -> Iterable[str] | None:
    """The names of the cards to judge; without those of the representative set on which memplan's kernels, if
    the recipe has them, don't run. Raises MemplanError if one of those was asked for."""
    from memplan.cuda.card import KERNELS_CAPABILITY

    cards = judged(gpus)
    if recipe.kernels.value == "stock":
        return gpus
    names = []
    for card in cards:
        if card.capability is not None and card.capability >= KERNELS_CAPABILITY:
            names.append(card.name)
        elif gpus is not None:
            raise MemplanError(
                f"memplan's kernels run on NVIDIA GPUs from Ampere on, which the {card.name} is not: "
                "use stock kernels"
            )
    return names


def plan_from_tape(
    tape: Tape,
    model: ModelInfo,
    parameters: ParameterCounts,
    recipe: Recipe,
    gpus: Iterable[str] | None,
    libraries: dict[str, str] | None = None,
    write: Callable[[Card | None], Run] | None = None,
) -> Plan:
    """What a tape says, whoever wrote it for the reference card. ``recipe`` is resolved; ``write`` writes the
    run for the allocator, also as a card has it on which other kernels run (without it: the unfolded tape is
    the run, loaded as it lies there)."""
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
        libraries=libraries or {},
    )
    result._tape = tape
    cards = list(_cards(tape, recipe, gpus, rewritable=write is not None))
    runs = result._runs = _Runs(write or (lambda _card: _as_it_lies(tape, recipe)), cards)
    result.peak._count = lambda: runs.run().free.allocated
    return result


def _as_it_lies(tape: Tape, recipe: Recipe) -> Run:
    from memplan.asked.alloc_conf import parse_settings

    return Run(tape, lambda _capacity: None, parse_settings(recipe.alloc_conf))


def _cards(
    tape: Tape, recipe: Recipe, gpus: Iterable[str] | None, *, rewritable: bool
) -> Iterator[tuple[Gpu, Card | None]]:
    """The cards to judge, each with what the run has to be written for. Before Ampere other kernels run:
    there is no FlashAttention, and no efficient one in bfloat16. So the step is written again; flash-attn
    itself, and a trace made for Ampere, can't be judged."""
    fused = {name for name in _FUSED if name in tape.operations}
    if recipe.dtype is DTypeName.FLOAT16 or (recipe.dtype is DTypeName.FLOAT32 and not recipe.autocast):
        fused.discard("_scaled_dot_product_efficient_attention")
    package = "_flash_attn_forward" in fused
    for gpu in judged(gpus):
        if gpu.capability is None or gpu.capability >= FLASH_CAPABILITY:
            yield gpu, None
        elif rewritable and not package:
            yield gpu, Card(gpu.capability)
        elif not fused:
            yield gpu, None
        elif gpus is not None:
            kind = "FlashAttention" if fused & set(_FUSED[:2]) else "efficient attention in bfloat16"
            remedy = "use attn 'sdpa'" if package else "plan without a trace, or trace with attn 'eager'"
            raise MemplanError(f"this step runs {kind}, which the {gpu.name} can't: {remedy}")


# Attention's fused kernels, as tapes name them.
_FUSED = (
    "_flash_attn_forward",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
)


def _with_kernels(fit: Fit, card: Card | None) -> Fit:
    """Says so where the verdict is about another run than the plan's own figures."""
    if card is None:
        return fit
    note = "has no FlashAttention, so its step takes another amount than the plan's, which is an A100's"
    return fit.model_copy(update={"note": "; ".join(filter(None, (fit.note, note)))})


def _peak_info(peak: Peak) -> PeakInfo:
    return PeakInfo(
        tensor_bytes=peak.allocated_bytes,
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
