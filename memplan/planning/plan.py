"""Spec + recipe -> Plan: the public heart of memplan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, computed_field, model_validator

from memplan.asked.gpus import Gpu, find_gpu
from memplan.asked.recipe import Kernels, Mode, Recipe
from memplan.asked.spec import ModelSpec
from memplan.device.fit import Fit, Run, Verdict
from memplan.errors import MemplanError, printable
from memplan.planning.predicted import write
from memplan.planning.records import (
    Advice,
    AllocatorInfo,
    CategoryBytes,
    Evaluation,
    HowMany,
    ModelInfo,
    ParameterCounts,
    PeakInfo,
    Played,
    Ranks,
    ReadFrom,
    Record,
    Slipped,
    StaticBytes,
    Summary,
)
from memplan.planning.study import Loading, Prediction, Study, ask, read_from
from memplan.tape import Category, Peak, Point, Tape, replay, timeline

SCHEMA_VERSION = 1


class Told(Record):
    """What a plan says beside its fields, where that needs no finding out: it was read, or is told."""

    allocator: AllocatorInfo | None = None
    fits: tuple[Fit, ...] | None = None
    advice: tuple[Advice, ...] = ()
    evaluation: Evaluation | None = None
    slip: Slipped | None = None
    played: Played | None = None
    ranks: tuple[Ranks, ...] | None = None
    how_many: tuple[HowMany, ...] = ()


class Plan(Record):
    """The answer. All byte fields are bytes of device memory.

    ``allocator``, ``fits`` and ``evaluation`` are found out by the plan's study when they are asked for: the
    allocator's simulation takes longer than all the rest. A plan that was read from JSON has them as they
    were found then.
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
    read: ReadFrom | None = None  # where a trainer's file was asked about

    _study: Study | None = PrivateAttr(default=None)
    _told: Told = PrivateAttr(default_factory=Told)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def allocator(self) -> AllocatorInfo:
        """The run on the simulated allocator."""
        return self._told.allocator or self.study.allocator

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fits(self) -> tuple[Fit, ...]:
        """A verdict for each card asked about."""
        return self.study.fits if self._told.fits is None else self._told.fits

    @computed_field  # type: ignore[prop-decorator]
    @property
    def advice(self) -> tuple[Advice, ...]:
        """What to change, for each card that it was asked for (:meth:`telling`)."""
        return self._told.advice

    @computed_field  # type: ignore[prop-decorator]
    @property
    def evaluation(self) -> Evaluation | None:
        """What the Trainer's default evaluation takes; null where the step was not predicted."""
        if self._told.evaluation is not None or self._study is None:
            return self._told.evaluation
        return self._study.evaluation

    @computed_field  # type: ignore[prop-decorator]
    @property
    def slip(self) -> Slipped | None:
        """What the trainer's users leave out, and its price; null where it was said, or costs nothing."""
        if self._told.slip is not None or self._study is None:
            return self._told.slip
        return self._study.slip

    @computed_field  # type: ignore[prop-decorator]
    @property
    def played(self) -> Played | None:
        """Which steps were played, where their sequences differ in length; else null."""
        if self._told.played is not None or self._study is None:
            return self._told.played
        return self._study.played

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ranks(self) -> tuple[Ranks, ...]:
        """The GPUs that share the step, those that are alike as one; empty where there is one. All other
        figures are those of the rank that takes the most."""
        if self._told.ranks is not None or self._study is None:
            return self._told.ranks or ()
        return self._study.ranks

    @property
    def host_bytes(self) -> int:
        """Bytes that each process keeps on the host, offloaded; pinned memory as PyTorch rounds it up."""
        if self._study is not None:
            return self._study.host_bytes
        return max((one.host_bytes for one in self.ranks), default=0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def how_many(self) -> tuple[HowMany, ...]:
        """The fewest GPUs by each strategy, where that was asked for."""
        return self._told.how_many

    def telling(self, **told: Any) -> Plan:
        """The same plan with answers (:class:`Told`) in the place of those that its study would find."""
        result = self.model_copy()
        result._told = self._told.model_copy(update=told)
        return result

    @property
    def study(self) -> Study:
        """What more can be found out about the same step. Raises MemplanError of a plan read from JSON."""
        if self._study is None:
            raise MemplanError("a plan read from JSON has no tape to be played or drawn: call plan() again")
        return self._study

    def run(self) -> Run:
        """The whole run, to be played on the allocator (:class:`memplan.device.fit.Run`)."""
        return self.study.run()

    def timeline(self) -> Iterator[Point]:
        """Live bytes by category after every event of the step (see :class:`memplan.tape.Point`)."""
        return timeline(self.study.tape)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from memplan.planning.notebook import html

        return html(self)

    @property
    def accumulated_bytes(self) -> int | None:
        """Bytes of tensors at the peak of a step that accumulates gradients, where this one does not; None
        where nobody can say or it makes no difference worth a look."""
        if self._study is None or 100 * self.parameters.trainable < self.peak.tensor_bytes:
            return None
        return self._study.accumulated_bytes

    def glances(self) -> Iterator[tuple[Gpu, Verdict]]:
        """The verdict for each card, without the allocator's simulation where it can be told without."""
        if self._study is None:
            return ((find_gpu(fit.gpu), fit.verdict) for fit in self.fits)
        return self._study.glances()

    @model_validator(mode="wrap")
    @classmethod
    def _keep_what_was_found(cls, data: Any, handler: Any) -> Plan:
        """Read a plan's JSON: what was simulated then is there, not to be simulated again."""
        told = {}
        if isinstance(data, dict):
            told = {name: data[name] for name in Told.model_fields if name in data}
            data = {name: value for name, value in data.items() if name not in told}
        found = Told.model_validate(told)
        result: Plan = handler(data)
        if told:
            result._told = found
        return result


def plan(
    model: str | Path | ModelSpec,
    recipe: Recipe | None = None,
    *,
    gpus: Iterable[str] | None = None,
    config: str | Path | None = None,
    lengths: str | Iterable[int] | None = None,
) -> Plan:
    """Predict the memory of one steady-state training step.

    ``model`` is an alias (``llama-70b``), a Hub id, a path to a config.json or its folder, a spec, or the
    file of a trainer (docs/files.md), which ``config`` may be, too; what ``recipe`` was given overrides it.
    ``gpus`` are names of cards to judge (default: a representative set). ``lengths``: tokens of sequences
    that differ, in the order in which they are trained on, or what ``--lengths`` takes: then the steps that
    these make are played one after the other, and ``recipe.seq_len``, if it was given, is where they are cut.
    Raises MemplanError (UnknownName, SpecError, RecipeError, UnsupportedArchitecture).
    """
    from memplan.asked.lengths import lengths_of

    found = None if lengths is None else lengths_of(lengths)
    return plan_of(Prediction(ask(model, recipe, gpus, config, found)))


def plan_of(study: Prediction) -> Plan:
    """The plan of what is asked."""
    from memplan.predict import parameters

    asked = study.asked
    spec, recipe = asked.spec, asked.recipe
    base, adapters, trainable = parameters.count(spec, recipe)
    notes = (
        asked.note,
        _unmatched(spec, recipe),
        _experts(spec, recipe),
        _unpacked(spec, recipe),
        _linear_attention(spec),
        _unseen(spec, recipe),
        _too_long(spec, recipe),
        _saved(spec, recipe, study.peak),
    )
    answer = plan_from_study(
        study,
        ModelInfo(
            name=spec.name,
            hub_id=spec.hub_id,
            architecture=spec.architecture,
            note="; ".join(note for note in notes if note) or None,
        ),
        ParameterCounts(total=base + adapters, trainable=trainable),
    )
    return answer.model_copy(update={"read": read_from(asked.read, asked.given)})


def _unpacked(spec: ModelSpec, recipe: Recipe) -> str | None:
    """What loading makes of MXFP4, and of experts that come one by one. In 4 bits none of its threads run."""
    from memplan import families, strategies

    strategy = strategies.of(recipe)
    onto_card = recipe.device_map or (strategy is not None and strategy.part is not None)
    merged = any(spec.sparse_layers) and families.find(spec.model_type).apart is not None
    told = []
    if spec.mxfp4:
        told.append(f"its experts come in MXFP4, and loading makes {recipe.dtype.value} of them")
    if (spec.mxfp4 or merged) and onto_card and recipe.mode is not Mode.QLORA:
        told.append(
            "reserved is that of HF_DEACTIVATE_ASYNC_LOAD=1, for else threads bring its experts in no fixed "
            "order, which may reserve more"
        )
    return "; ".join(told) or None


def _linear_attention(spec: ModelSpec) -> str | None:
    """Whose code runs it: transformers takes these packages' kernels where they are installed."""
    if "linear_attention" not in spec.layer_types:
        return None
    return (
        "its linear attention is played without flash-linear-attention and causal-conv1d, which take less "
        "where they are installed"
    )


def _unseen(spec: ModelSpec, recipe: Recipe) -> str | None:
    """That a batch of text passes a tower by."""
    if spec.vision is None or recipe.images:
        return None
    return "its vision tower lies on the card, but the batch is text alone: --images 1 plans one with images"


def _unmatched(spec: ModelSpec, recipe: Recipe) -> str | None:
    """Which targets are nothing in this model."""
    from memplan.predict import parameters

    names = parameters.unmatched(spec, recipe)
    if not names:
        return None
    match = "matches" if len(names) == 1 else "match"
    told = f"{', '.join(names)} in target_modules {match} nothing in this model, and PEFT passes that over"
    return printable(told)


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


def _saved(spec: ModelSpec, recipe: Recipe, ours: Peak) -> str | None:
    """What memplan's kernels save of the peak; where they save nothing, what makes it."""
    if recipe.kernels is Kernels.STOCK:
        return None
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


def plan_from_study(
    study: Study, model: ModelInfo, parameters: ParameterCounts, libraries: dict[str, str] | None = None
) -> Plan:
    """What a study says."""
    from memplan import __version__

    resting = study.resting
    result = Plan(
        memplan_version=__version__,
        provenance=study.tape.provenance,
        model=model,
        parameters=parameters,
        recipe=study.recipe,
        static_bytes=StaticBytes(
            weights=resting[Category.WEIGHTS],
            quantization_state=resting[Category.QUANTIZATION_STATE],
            adapters=resting[Category.ADAPTERS],
            optimizer_state=resting[Category.OPTIMIZER_STATE],
            communication=resting[Category.COMMUNICATION],
        ),
        peak=_peak_info(study.peak),
        summary=_summary(study.peak.by_category),
        libraries=libraries or {},
    )
    result._study = result.peak._study = study
    return result


def plan_from_tape(
    tape: Tape,
    model: ModelInfo,
    parameters: ParameterCounts,
    recipe: Recipe,
    gpus: Iterable[Gpu],
    *,
    named: bool = True,
    libraries: dict[str, str] | None = None,
    loading: Loading | None = None,
) -> Plan:
    """What an unfolded tape says, whoever wrote it for the reference card. ``recipe`` is resolved; ``named``:
    somebody asked about these cards, so one that can't be judged is refused; ``loading``: how what rests came
    onto a card of so many bytes, as it lies on the tape if nobody says."""
    study = Study(tape, recipe, gpus, named=named, loading=loading)
    return plan_from_study(study, model, parameters, libraries)


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
        activations=sum(
            size[kind]
            for kind in (
                Category.ACTIVATIONS,
                Category.LOGITS_AND_LOSS,
                Category.TEMPORARIES,
                Category.COMMUNICATION,
            )
        ),
    )
