"""What is asked, once, and what follows from it, found when somebody wants to know and then kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from memplan import stacks
from memplan.asked.alloc_conf import parse_settings
from memplan.asked.gpus import Gpu, find_gpu, together
from memplan.asked.lengths import Lengths
from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.device.fit import Fit, Run, Verdict, glance, judge, recast_bytes
from memplan.errors import MemplanError, RecipeError, shown
from memplan.planning import cards, predicted
from memplan.planning.modes import in_its_mode
from memplan.planning.records import AllocatorInfo, Evaluation, Played, Ranks, ReadFrom, Slipped
from memplan.tape import Category, Peak, Tape, replay, static_bytes

if TYPE_CHECKING:
    from memplan.runfiles import Reading

Loading = Callable[["int | None"], "Tape | None"]  # of a card's bytes

DEFAULT_BATCH = 8  # TrainingArguments.per_device_eval_batch_size (transformers 5.23)


@dataclass(frozen=True)
class Asked:
    """A model, a recipe as it was given and as the model has it (resolved), and cards; ``named`` if somebody
    named those. ``note``: how the model's name was understood, where that needs saying; ``read``: the file
    that the recipe is from, if it is from one; ``lengths``: of sequences, where they differ (``seq_len`` is
    then the longest's)."""

    spec: ModelSpec
    given: Recipe
    recipe: Recipe
    gpus: tuple[Gpu, ...]
    named: bool
    note: str | None = None
    read: Reading | None = None
    lengths: Lengths | None = None

    def otherwise(self, given: Recipe) -> Asked:
        """The same of another recipe. Raises RecipeError if it does not suit the model."""
        from memplan.predict.parameters import resolve_recipe

        return replace(self, given=given, recipe=resolve_recipe(self.spec, given))


def ask(
    model: str | Path | ModelSpec,
    recipe: Recipe | None = None,
    gpus: Iterable[str] | None = None,
    config: str | Path | None = None,
    lengths: Lengths | None = None,
) -> Asked:
    """What :func:`memplan.plan` is asked, understood. Raises MemplanError (UnknownName, SpecError,
    RecipeError, UnsupportedArchitecture)."""
    from memplan.importers.resolve import resolve
    from memplan.predict.parameters import resolve_recipe

    named, read = opened(model, config)
    if recipe is not None or gpus is not None:
        recipe = of_cards(recipe or Recipe(), gpus)
    given = (recipe or Recipe()) if read is None else read.recipe(recipe)
    judged = tuple(cards.able(given, gpus))  # names that are wrong are said to be before anything is played
    found = resolve(named)
    given = in_its_mode(found.spec, given)
    if read is not None:
        given = read.suited(given, found.spec, recipe)
    if lengths is not None:
        given = _as_long(given, lengths)
    resolved = resolve_recipe(found.spec, given)
    return Asked(found.spec, given, resolved, judged, gpus is not None, found.note, read, lengths)


def of_cards(given: Recipe, gpus: Iterable[str] | None) -> Recipe:
    """The recipe on as many GPUs as a card's name says, such as 8xh100."""
    said = given.gpus_per_node if "gpus" in given.model_fields_set else None
    count = None if gpus is None else together(gpus, said)
    if count is None:
        return given
    return Recipe(**{**given.model_dump(exclude_unset=True), "gpus": count * (given.nodes or 1)})


def _as_long(given: Recipe, lengths: Lengths) -> Recipe:
    """The recipe with the longest sequence for its ``seq_len``, which is where others are cut if somebody
    said so."""
    if given.images:
        raise RecipeError("images in sequences of different lengths are not planned: leave out --lengths")
    if given.attn == "flash_attention_2":
        raise RecipeError(
            "what FlashAttention takes of sequences of different lengths is not planned: use --attn sdpa, or "
            "`memplan dry-run`"
        )
    cut = given.seq_len if "seq_len" in given.model_fields_set else None
    steps = lengths.steps(given.batch_size, given.gradient_accumulation_steps, cut)
    longest = max(length for step in steps for rows in step for length in rows)
    return Recipe(**{**given.model_dump(exclude_unset=True), "seq_len": longest})


def opened(
    model: str | Path | ModelSpec, config: str | Path | None = None
) -> tuple[str | Path | ModelSpec, Reading | None]:
    """The model, and the file of a trainer that the recipe is from: ``config``, or the model's own name is
    that of one, which names its model. Raises MemplanError."""
    if config is None and (
        isinstance(model, ModelSpec) or not str(model).endswith((".yaml", ".yml", ".json"))
    ):
        return model, None
    from memplan import runfiles

    if config is not None:
        read = runfiles.read(config)
        if read is None:
            raise MemplanError(
                f"{shown(str(config))} is no file that a trainer is configured with{_why(config)}"
            )
        if not isinstance(model, ModelSpec) and runfiles.reads(model):
            other = runfiles.read(model)
            if other is not None:
                both = runfiles.together(other, read)
                assert both.model is not None
                return both.model, both
        asked = {key: value for key, value in read.understood.items() if value != read.model}
        return model, replace(read, understood=asked)
    assert not isinstance(model, ModelSpec)
    read = runfiles.read(model)
    if read is None:
        return model, None
    if read.model is None:
        raise MemplanError(
            f"{read.name} ({runfiles.find(read.kind).title}) names no model: ask `memplan MODEL --config "
            f"{read.path}`"
        )
    return read.model, read


def _why(config: str | Path) -> str:
    """Why there is nothing to be read in a file. Raises SpecError where its content is no JSON."""
    path = Path(config).expanduser()
    if path.is_dir():
        return ": it is a folder"
    if not path.is_file():
        return ": it is no file" if path.exists() else ": there is none of that name"
    from memplan.importers.resolve import resolve_config

    found = resolve_config(str(path)).config
    known = isinstance(found, dict) and {"architectures", "model_type"} & found.keys()
    return f": it {'is the configuration of a model' if known else 'has no key of one'}"


def read_from(read: Reading | None, given: Recipe) -> ReadFrom | None:
    """What a plan of the recipe says of the file."""
    if read is None:
        return None
    overruled = [
        f"{name}: {read.name} says {read.options[name]}, and {getattr(given, name)} is planned, as asked"
        for name in ("gpus", "parallel")
        if read.options.get(name) is not None and getattr(given, name) not in (None, read.options[name])
    ]
    return ReadFrom(
        file=read.name,
        kind=read.kind,
        understood=dict(read.understood),
        ignored=read.ignored,
        left_out=(*read.left_out, *overruled),
    )


class Study:
    """What follows from the tape of a step, whoever wrote it for the reference card: it is replayed, and the
    run that it is a step of is played on the allocator, for one card after the other. ``loading`` writes how
    what rests came onto a card of so many bytes; without it, it lies as on the tape.

    Raises MemplanError for a card that was ``named`` and can't be judged by this tape.
    """

    rewritable = False  # for a card on which other kernels run

    def __init__(
        self,
        tape: Tape,
        recipe: Recipe,
        gpus: Iterable[Gpu],
        *,
        named: bool,
        loading: Loading | None = None,
    ) -> None:
        self.tape, self.recipe = tape, recipe
        self._loading = loading or _not_loaded
        self.cards = list(cards.as_told(tape, recipe, gpus, named=named, rewritable=self.rewritable))

    @cached_property
    def peak(self) -> Peak:
        """The highest point of live tensors."""
        return replay(self.tape)

    @cached_property
    def resting(self) -> dict[Category, int]:
        """Bytes by category that are there before the step."""
        return static_bytes(self.tape)

    def run(self, card: Card | None = None) -> Run:
        """The whole run; ``card`` where other kernels run than on the reference card."""
        return self._as_it_lies

    @cached_property
    def _as_it_lies(self) -> Run:
        return Run(self.tape, self._loading, parse_settings(self.recipe.alloc_conf))

    @cached_property
    def allocator(self) -> AllocatorInfo:
        """The run on the simulated allocator, where nothing limits it."""
        whole = self.run()
        run = whole.free
        return AllocatorInfo(
            settings=self.recipe.alloc_conf,
            allocated_bytes=run.allocated,
            reserved_bytes=run.reserved,
            fragmentation_bytes=run.fragmentation,
            loading=None if whole.loading is _not_loaded else "predicted",
        )

    @cached_property
    def fits(self) -> tuple[Fit, ...]:
        """A verdict for each card."""
        return tuple(
            _remarked(self._of_its_size(judge(gpu, self.run(card)), gpu, card), gpu, card, self.recipe)
            for gpu, card in self.cards
        )

    def _of_its_size(self, fit: Fit, gpu: Gpu, card: Card | None) -> Fit:
        """With the others that a card stands for, where the verdict is another on them."""
        if fit.verdict != "does not fit" or not gpu.larger:
            return fit
        others = (judge(find_gpu(name), self.run(card)) for name in gpu.larger)
        found = tuple(other.gpu for other in others if other.verdict != "does not fit")
        return fit.model_copy(update={"gets_through_on": found})

    def glances(self) -> Iterator[tuple[Gpu, Verdict]]:
        """The verdict for each card, without the allocator's simulation where it can be told without."""
        resting = sum(self.resting.values())
        loaded = resting - self.resting[Category.OPTIMIZER_STATE]
        recast = recast_bytes(self.tape) if self.recipe.kbit_prep else 0
        for gpu, card in self.cards:
            # of a card that runs other kernels only what rests is known; settings may take more than a glance
            # allows for
            told = glance(gpu, self.peak.allocated_bytes if card is None else resting, loaded, recast)
            guessed = card is not None or self.recipe.alloc_conf or self.played is not None
            if told == "fits" and (guessed or self.recipe.parallel is not None):
                told = None
            yield gpu, told or judge(gpu, self.run(card)).verdict

    @property
    def ranks(self) -> tuple[Ranks, ...]:
        """The GPUs that share the step, where several do."""
        return ()

    @property
    def host_bytes(self) -> int:
        """Bytes that each process keeps on the host, offloaded."""
        return self.tape.host[1]

    @property
    def accumulated_bytes(self) -> int | None:
        """Bytes of tensors at the peak of a step that accumulates gradients, if the recipe's does not; None
        where nobody can say."""
        return None

    @property
    def evaluation(self) -> Evaluation | None:
        """What the Trainer's default evaluation takes; None where nobody can say."""
        return None

    @property
    def judged_evaluation(self) -> Evaluation | None:
        """The same with verdicts."""
        return None

    @property
    def slip(self) -> Slipped | None:
        """What people leave out with this trainer; None where nobody can say."""
        return None

    @property
    def played(self) -> Played | None:
        """Which steps were played, where they differ."""
        return None


class Prediction(Study):
    """A study whose tapes memplan's own writer writes: for any card, and for other recipes of the model."""

    rewritable = True

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self._runs: dict[tuple[Recipe, Card | None], Run] = {}
        tape = predicted.write(asked.spec, asked.recipe, lengths=asked.lengths)
        super().__init__(tape, asked.recipe, asked.gpus, named=asked.named)

    def run(self, card: Card | None = None, recipe: Recipe | None = None) -> Run:
        """The whole run, also of another recipe (resolved). Each is written and simulated once: a plan, its
        verdicts and the advice for several cards ask about the same ones."""
        key = recipe or self.recipe, card
        if key not in self._runs:
            self._runs[key] = predicted.run(self.asked.spec, *key, self.asked.lengths)
        return self._runs[key]

    @cached_property
    def played(self) -> Played | None:
        """Which steps were played, where their sequences differ in length."""
        lengths = self.asked.lengths
        if lengths is None:
            return None
        steps = predicted.steps(self.recipe, lengths)
        every = [length for step in steps for rows in step for length in rows]
        longest = predicted.longest(steps, self.recipe)
        alone = predicted.run(self.asked.spec, self.recipe, lengths=lengths.only(longest))
        return Played(
            source=lengths.told,
            steps=len(steps),
            shortest=min(every),
            longest=max(every),
            tokens=predicted.tokens(longest, self.recipe),
            alone_bytes=alone.free.reserved,
        )

    @cached_property
    def ranks(self) -> tuple[Ranks, ...]:
        """The same: no rank has more than the first of these. Under ZeRO, whose ranks differ by gradients of
        parameters that two of them have parts of, the others are not played."""
        from memplan.predict.ranks import alike

        if self.recipe.parallel is None:
            return ()
        first, *others = alike(self.asked.spec, self.recipe)
        found = [
            Ranks(
                rank=self.tape.rank,
                count=first[1],
                peak_allocated_bytes=self.allocator.allocated_bytes,
                reserved_bytes=self.allocator.reserved_bytes,
                host_bytes=self.tape.host[1],
                host_pinned_bytes=self.tape.host[2],
            )
        ]
        for rank, count in others:
            run = predicted.run(self.asked.spec, self.recipe, lengths=self.asked.lengths, rank=rank)
            found.append(
                Ranks(
                    rank=rank,
                    count=count,
                    peak_allocated_bytes=run.free.allocated,
                    reserved_bytes=run.free.reserved,
                    host_bytes=run.tape.host[1],
                    host_pinned_bytes=run.tape.host[2],
                )
            )
        return tuple(found)

    @cached_property
    def accumulated_bytes(self) -> int | None:
        """The same, played: gradients stay through the forward after their own."""
        if self.recipe.gradient_accumulation_steps > 1:
            return None
        twice = self.recipe.model_copy(update={"gradient_accumulation_steps": 2})
        return replay(predicted.write(self.asked.spec, twice, lengths=self.asked.lengths)).allocated_bytes

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """What the Trainer's default evaluation takes: it is made in batches of 8 unless told otherwise, as a
        trainer's file may."""
        batch = self._evaluated_in(self.recipe)
        if not batch:
            return None
        peak, one = (replay(predicted.evaluation(self.asked.spec, self.recipe, size)) for size in (batch, 1))
        return Evaluation(
            batch_size=batch,
            tensor_bytes=peak.allocated_bytes,
            operation=peak.operation,
            module=peak.module,
            with_one_bytes=one.allocated_bytes,
        )

    def _evaluated_in(self, recipe: Recipe) -> int:
        """Sequences in a batch of an evaluation; 0 where none is made, or where nobody has compared one:
        under ZeRO-3, which gathers ahead by what training has recorded, and FSDP1, which lets go of gradients
        then."""
        if recipe.parallel in ("zero3", "fsdp"):
            return 0
        read = self.asked.read
        return DEFAULT_BATCH if read is None or read.evaluates is None else read.evaluates

    @cached_property
    def slip(self) -> Slipped | None:
        """What people leave out with this trainer, unless they said it."""
        found = stacks.find(self.recipe.trainer).slip
        if found is None or self.recipe.mode.value not in found.modes:
            return None
        if found.changes.keys() & self.asked.given.model_fields_set:
            return None
        try:  # of the resolved recipe: 4-bit layers multiply as before
            changed = Recipe(**{**self.recipe.model_dump(), **found.changes})
        except RecipeError:  # what was asked for can't be had so
            return None
        peak = replay(predicted.write(self.asked.spec, changed, lengths=self.asked.lengths))
        return Slipped(told=found.told, more_bytes=peak.allocated_bytes - self.peak.allocated_bytes)

    @cached_property
    def judged_evaluation(self) -> Evaluation | None:
        """The same with verdicts of the run with such an evaluation in it, for the cards on which that is
        higher than a step: where other kernels run than on the reference card, both are others too."""
        found = self.evaluation
        if found is None:
            return None
        higher = found.tensor_bytes > self.peak.allocated_bytes
        asked = [
            (gpu, card)
            for gpu, card in self.cards
            if (
                higher
                if card is None
                else self.with_evaluation(card).free.reserved > self.run(card).free.reserved
            )
        ]
        # where a step does not fit, an evaluation after it is not played to its end
        possible = {fit.gpu for fit in self.fits if fit.verdict != "does not fit"} if asked else ()
        fits = (judge(gpu, self.with_evaluation(card), explain=gpu.name in possible) for gpu, card in asked)
        return found.model_copy(update={"fits": tuple(fits)})

    def with_evaluation(self, card: Card | None = None, recipe: Recipe | None = None) -> Run:
        """As :meth:`run`, with an evaluation in it, if there is one to be had."""
        recipe = recipe or self.recipe
        batch = self._evaluated_in(recipe)
        if not batch:
            return self.run(card, recipe)
        tape = partial(predicted.evaluation, self.asked.spec, recipe, batch, card=card, folded=False)
        return self.run(card, recipe).with_evaluation(tape)


def _not_loaded(_capacity: int | None) -> None:
    """How a model comes onto the card whose tape is all there is: as it lies there."""


def _remarked(fit: Fit, gpu: Gpu, card: Card | None, recipe: Recipe) -> Fit:
    """With what a verdict has to say of the card; where the verdict is about another run than the plan's own
    figures, that too."""
    told = [fit.note, cards.remark(gpu, recipe)]
    if card is not None:
        told.append("its step takes another amount than the plan's, which is an A100's")
    return fit.model_copy(update={"note": "; ".join(filter(None, told)) or None})
