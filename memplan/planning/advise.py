"""What to change so that a run fits, and what the room could buy if it does.

Every suggestion is a change of the recipe, and its price is found by planning the changed recipe: no rule
of thumb says what it saves. What it costs otherwise (time, quality) is said in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from memplan import attention, losses, strategies
from memplan.asked.recipe import DTypeName, Kernels, Mode, Offload, Recipe
from memplan.errors import MemplanError
from memplan.planning.records import Advice, Change, Combination
from memplan.tape import replay
from memplan.units import gib

if TYPE_CHECKING:
    from memplan.asked.gpus import Gpu
    from memplan.device.fit import Verdict
    from memplan.planning.frontier import Peaks
    from memplan.planning.study import Prediction
    from memplan.runfiles import RunFile


class Cost(IntEnum):
    """What a change takes, from cheap to dear."""

    NOTHING = 0
    TIME = 1
    QUALITY = 2
    METHOD = 3


@dataclass(frozen=True, slots=True)
class _Idea:
    """A change that could be made: ``apply`` returns the fields to change, None where it makes no sense."""

    rank: Cost
    title: Callable[[Recipe], str]
    cost: str
    apply: Callable[[Recipe], dict[str, object] | None]
    command: Callable[[Recipe], str]
    config: Callable[[Recipe], str]


def _said(text: str) -> Callable[[Recipe], str]:
    return lambda _recipe: text


def _with_expandable_segments(recipe: Recipe) -> dict[str, object] | None:
    from memplan.asked.alloc_conf import parse_settings

    if parse_settings(recipe.alloc_conf).expandable_segments:
        return None
    return {"alloc_conf": _expandable(recipe)}


def _expandable(recipe: Recipe) -> str:
    """The allocator's settings with expandable segments beside what was set."""
    return ",".join(filter(None, (recipe.alloc_conf, "expandable_segments:True")))


def _accumulated(recipe: Recipe) -> dict[str, object] | None:
    if recipe.batch_size == 1:
        return None
    steps = recipe.gradient_accumulation_steps * recipe.batch_size
    return {"batch_size": 1, "gradient_accumulation_steps": steps}


def _with_loss(loss: str) -> Callable[[Recipe], dict[str, object] | None]:
    return lambda recipe: None if losses.find(recipe.loss).tiled else {"loss": loss}


def _with_optimizer(
    optimizer: str, instead_of: Iterable[str]
) -> Callable[[Recipe], dict[str, object] | None]:
    allowed = frozenset(instead_of)
    return lambda recipe: {"optimizer": optimizer, "momentum": 0.0} if recipe.optimizer in allowed else None


def _without_autocast(recipe: Recipe) -> str:
    return " --no-autocast" if recipe.autocast else ""


def _shards(recipe: Recipe) -> bool:
    """Whether adapters need mixed precision."""
    return recipe.parallel == "fsdp2"


_32_BIT = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit")
_OFFLOADING = ("zero2", "zero3")

IDEAS = (
    _Idea(
        Cost.NOTHING,
        _said("fused AdamW"),
        "nothing: one kernel instead of lists of temporaries",
        _with_optimizer("adamw_torch_fused", ("adamw_torch",)),
        _said("--optimizer adamw_torch_fused"),
        _said('TrainingArguments(optim="adamw_torch_fused")'),
    ),
    _Idea(
        Cost.NOTHING,
        _said("mixed precision (autocast)"),
        "nothing: what TRL does unless told otherwise",
        lambda recipe: None if recipe.autocast or recipe.mode is Mode.FULL else {"autocast": True},
        _said("--autocast"),
        lambda recipe: f"TrainingArguments({'fp16' if recipe.dtype is DTypeName.FLOAT16 else 'bf16'}=True)",
    ),
    _Idea(
        Cost.NOTHING,
        _said("FlashAttention 2"),
        "nothing; needs the package flash-attn",
        lambda recipe: None if attention.of(recipe).package else {"attn": "flash_attention_2"},
        _said("--attn flash_attention_2"),
        _said('from_pretrained(attn_implementation="flash_attention_2")'),
    ),
    _Idea(
        Cost.NOTHING,
        _said("sdpa attention"),
        "nothing",
        lambda recipe: None if attention.of(recipe).fused else {"attn": "sdpa"},
        _said("--attn sdpa"),
        _said('from_pretrained(attn_implementation="sdpa")'),
    ),
    _Idea(
        Cost.NOTHING,
        _said("expandable segments"),
        "nothing but slower first steps",
        _with_expandable_segments,
        lambda recipe: f"--alloc-conf {_expandable(recipe)}",
        lambda recipe: f"export PYTORCH_ALLOC_CONF={_expandable(recipe)}",
    ),
    _Idea(
        Cost.NOTHING,
        _said("fused linear cross entropy"),
        "nothing; needs liger-kernel",
        _with_loss("liger"),
        _said("--loss liger"),
        _said("TrainingArguments(use_liger_kernel=True)"),
    ),
    _Idea(
        Cost.NOTHING,
        _said("chunked cross entropy"),
        "nothing; TRL's SFTTrainer does it by default",
        _with_loss("chunked"),
        _said("--loss chunked"),
        _said("trl.SFTTrainer"),
    ),
    _Idea(
        Cost.NOTHING,
        _said("embedding, lm_head and norms in 16 bits"),
        "the precision of norms and logits; most runs do not notice",
        lambda recipe: {"kbit_prep": False} if recipe.kbit_prep else None,
        _said("--no-kbit-prep"),
        lambda recipe: (
            "leave out prepare_model_for_kbit_training(model)"
            + ("; TrainingArguments(gradient_checkpointing=True)" if recipe.gradient_checkpointing else "")
        ),
    ),
    _Idea(
        Cost.TIME,
        _said("shared out by FSDP2"),
        "time: each layer is gathered from the other GPUs, twice a step",
        lambda recipe: {"parallel": "fsdp2"} if recipe.parallel == "ddp" else None,
        _said("--parallel fsdp2"),
        _said(
            "accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
            "--fsdp_reshard_after_forward true"
        ),
    ),
    _Idea(
        Cost.TIME,
        _said("shared out by ZeRO-3"),
        "time: each module's parameters are gathered from the other GPUs, twice a step",
        lambda recipe: {"parallel": "zero3"} if recipe.parallel in ("zero1", "zero2") else None,
        _said("--parallel zero3"),
        _said('"stage": 3'),
    ),
    _Idea(
        Cost.TIME,
        _said("gradient checkpointing"),
        "time: every layer's forward runs twice, about a third more",
        lambda recipe: None if recipe.gradient_checkpointing else {"gradient_checkpointing": True},
        _said("--gradient-checkpointing"),
        _said("TrainingArguments(gradient_checkpointing=True)"),
    ),
    _Idea(
        Cost.TIME,
        lambda recipe: f"batch 1, accumulated {recipe.batch_size} times as often",
        "time: smaller products; the same updates",
        _accumulated,
        lambda recipe: (
            "--batch-size 1 --gradient-accumulation-steps "
            f"{recipe.gradient_accumulation_steps * recipe.batch_size}"
        ),
        lambda recipe: (
            "TrainingArguments(per_device_train_batch_size=1, gradient_accumulation_steps="
            f"{recipe.gradient_accumulation_steps * recipe.batch_size})"
        ),
    ),
    _Idea(
        Cost.TIME,
        _said("the optimizer on the host"),
        "time: gradients and parameters cross the bus, and the host updates them; takes its memory",
        lambda recipe: (
            {"offload": "optimizer"} if recipe.parallel in _OFFLOADING and recipe.offload is None else None
        ),
        _said("--offload optimizer"),
        _said('"offload_optimizer": {"device": "cpu", "pin_memory": true}'),
    ),
    _Idea(
        Cost.TIME,
        _said("parameters and the optimizer on the host"),
        "time: parameters cross the bus for each layer, too; takes the host's memory",
        lambda recipe: (
            {"offload": "both"}
            if recipe.parallel in ("zero3", "fsdp2") and recipe.offload is not Offload.BOTH
            else None
        ),
        _said("--offload both"),
        lambda recipe: (
            "accelerate launch --fsdp_offload_params true"
            if recipe.parallel == "fsdp2"
            else ", ".join(
                f'"{what}": {{"device": "cpu", "pin_memory": true}}'
                for what in ("offload_optimizer", "offload_param")
            )
        ),
    ),
    _Idea(
        Cost.TIME,
        _said("memplan's kernels"),
        "time: 1.1 to 1.6 times a step's on an H200; needs Triton and an NVIDIA card from Ampere on",
        lambda recipe: (
            {"kernels": Kernels.MEMPLAN}
            if recipe.mode is Mode.QLORA and recipe.kernels is Kernels.STOCK
            else None
        ),
        _said("--kernels memplan"),
        _said("memplan.kernels.apply(model)"),
    ),
    _Idea(
        Cost.TIME,
        _said("paged 8-bit AdamW"),
        "time where pages move; little quality",
        _with_optimizer("paged_adamw_8bit", (*_32_BIT, "adamw_bnb_8bit")),
        _said("--optimizer paged_adamw_8bit"),
        _said('TrainingArguments(optim="paged_adamw_8bit")'),
    ),
    _Idea(
        Cost.QUALITY,
        _said("8-bit AdamW"),
        "little quality: block-wise 8-bit states",
        _with_optimizer("adamw_bnb_8bit", _32_BIT),
        _said("--optimizer adamw_bnb_8bit"),
        _said('TrainingArguments(optim="adamw_bnb_8bit")'),
    ),
    _Idea(
        Cost.QUALITY,
        lambda recipe: f"r {recipe.r // 2} instead of {recipe.r}",
        "quality: adapters of half the rank",
        lambda recipe: (
            {"r": recipe.r // 2, "lora_alpha": None}
            if recipe.mode is not Mode.FULL and recipe.r > 1
            else None
        ),
        lambda recipe: f"--r {recipe.r // 2}",
        lambda recipe: f"LoraConfig(r={recipe.r // 2})",
    ),
    _Idea(
        Cost.QUALITY,
        _said("adapters on q and v only"),
        "quality: a quarter of the adapters or fewer",
        lambda recipe: (
            {"target_modules": "q,v"}
            if recipe.mode is not Mode.FULL and recipe.target_modules == "all-linear"
            else None
        ),
        _said("--target-modules q,v"),
        _said('LoraConfig(target_modules=["q_proj", "v_proj"])'),
    ),
    _Idea(
        Cost.QUALITY,
        lambda recipe: f"sequences of {recipe.seq_len // 2} tokens",
        "quality: what lies further back is not seen",
        lambda recipe: {"seq_len": recipe.seq_len // 2} if recipe.seq_len > 1 else None,
        lambda recipe: f"--seq-len {recipe.seq_len // 2}",
        lambda recipe: f"SFTConfig(max_length={recipe.seq_len // 2})",
    ),
    _Idea(
        Cost.QUALITY,
        _said("weights in 16 bits"),
        "quality: updates are rounded to bfloat16",
        lambda recipe: (
            {"dtype": DTypeName.BFLOAT16, "autocast": False} if recipe.dtype is DTypeName.FLOAT32 else None
        ),
        lambda recipe: "--dtype bfloat16" + _without_autocast(recipe),
        _said('from_pretrained(dtype="bfloat16")'),
    ),
    _Idea(
        Cost.METHOD,
        _said("LoRA instead of full fine-tuning"),
        "another method: adapters are trained, not the weights",
        lambda recipe: {"mode": Mode.LORA} if recipe.mode is Mode.FULL else None,
        _said("--mode lora"),
        _said("get_peft_model(model, LoraConfig(...))"),
    ),
    _Idea(
        Cost.METHOD,
        _said("QLoRA: the base in 4 bits"),
        "time to dequantise, a little quality",
        lambda recipe: (
            {"mode": Mode.QLORA, "autocast": recipe.autocast and _shards(recipe)}
            if recipe.mode is not Mode.QLORA
            else None
        ),
        lambda recipe: "--mode qlora" + ("" if _shards(recipe) else _without_autocast(recipe)),
        _said(
            'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
        ),
    ),
)


def advise(study: Prediction, gpu: str, host: int | None = None, *, evaluates: bool = False) -> Advice:
    """What would make the recipe that is asked about fit on the card called ``gpu``, or what it leaves room
    for. ``host``: bytes of the host's memory, beyond which nothing is offloaded; ``evaluates``: with an
    evaluation in the run.

    Raises MemplanError if the recipe can't be had on that card, or pricing changes of it takes too long.
    """
    from memplan.device.here import find_card

    card = next((one for one in study.asked.gpus if one.name == gpu), None) or find_card(gpu)
    recipe = study.asked.given
    file = _file(study)
    _check_size(study)
    pricer = _Pricer(study, card, host, evaluates=evaluates)
    asked = study.recipe
    if pricer.verdict(recipe) != "does not fit":
        return Advice(gpu=card.name, room=tuple(_room(recipe, pricer, file)))
    changes = []
    before = pricer.allocated(recipe)
    for idea in IDEAS:
        changed = _changed(recipe, idea, pricer, file)
        if changed is None:
            continue
        after = pricer.allocated(changed)
        if after >= before and pricer.verdict(changed) == "does not fit":
            continue
        changes.append((idea, changed, after))
    changes.sort(key=lambda one: (_VERDICTS.index(pricer.verdict(one[1])), one[0].rank, one[2]))
    listed = tuple(
        Change(
            title=idea.title(asked),
            cost=_cost(idea, changed, pricer),
            command=idea.command(asked),
            config=idea.config(asked) if file is None else _lines(idea, asked, file),
            tensor_bytes=after,
            saves_bytes=before - after,
            needed_bytes=pricer.needed(changed),
            verdict=pricer.verdict(changed),
        )
        for idea, changed, after in changes
    )
    combination = None
    if not any(change.verdict != "does not fit" for change in listed):
        combination = _combination(recipe, pricer, file)
    return Advice(gpu=card.name, changes=listed, combination=combination, cards=_cards_for(study, card))


_VERDICTS: tuple[Verdict, ...] = ("fits", "tight", "does not fit")  # what is listed first


def _cost(idea: _Idea, changed: Recipe, pricer: _Pricer) -> str:
    if changed.offload is None:
        return idea.cost
    return f"{idea.cost}: {gib(pricer.on_host(changed))} GiB of it"


def _file(study: Prediction) -> RunFile | None:
    """The kind of file that the recipe is from, if it says what a recipe is and not only where it runs: what
    is advised is a change of it."""
    if study.asked.read is None:
        return None
    from memplan.runfiles import find

    found = find(study.asked.read.kind)
    return found if found.says else None


def _lines(idea: _Idea, recipe: Recipe, file: RunFile) -> str:
    """A change as lines of the file; ``recipe`` as :meth:`_Idea.apply` takes it."""
    fields = file.sayable(idea.apply(recipe) or {})
    return "" if fields is None else file.change(fields, recipe)


def _check_size(study: Prediction) -> None:
    """Raise MemplanError if pricing some twenty changes of the recipe takes too long."""
    from memplan.planning.frontier import MOST_SEARCHED

    events = len(study.run().tape.events)
    if events > MOST_SEARCHED:
        raise MemplanError(
            f"a step of {events:,} allocations and releases takes too long for pricing changes of it: use "
            "--no-advise"
        )


class _Pricer:
    """Plans recipes (as asked, not resolved), each once."""

    def __init__(
        self, study: Prediction, gpu: Gpu, host: int | None = None, *, evaluates: bool = False
    ) -> None:
        self.study, self.gpu, self.host, self.evaluates = study, gpu, host, evaluates
        self._known: dict[Recipe, Peaks] = {}
        self._allocated: dict[Recipe, int] = {}
        self._fits: dict[Recipe, tuple[Verdict, int | None]] = {}

    def resolved(self, recipe: Recipe) -> Recipe:
        """What the recipe is on this model. Raises RecipeError if it does not suit it, MemplanError if the
        card can't run it."""
        return self.peaks(recipe).recipe

    def peaks(self, recipe: Recipe) -> Peaks:
        """The peaks of the recipe on the card. Raises as :meth:`resolved`."""
        from memplan.planning.frontier import Peaks

        if recipe not in self._known:
            asked = self.study.asked
            resolved = asked.recipe if recipe == asked.given else asked.otherwise(recipe).recipe
            self._known[recipe] = Peaks(asked.spec, resolved, self.gpu)
        return self._known[recipe]

    def allocated(self, recipe: Recipe) -> int:
        """Bytes allocated at the peak."""
        if recipe not in self._allocated:
            self._allocated[recipe] = self._peak(recipe)
        return self._allocated[recipe]

    def _peak(self, recipe: Recipe) -> int:
        peaks = self.peaks(recipe)
        if strategies.folds(peaks.recipe):
            return peaks.played(recipe.batch_size, recipe.seq_len)
        # every layer is played, and the run has the same tape
        return replay(self.study.run(peaks.card, peaks.recipe).tape).allocated_bytes

    def on_host(self, recipe: Recipe) -> int:
        """Bytes that the processes of a node keep on its host."""
        peaks = self.peaks(recipe)
        tape = self.study.run(peaks.card, peaks.recipe).tape
        return tape.host[1] * peaks.recipe.gpus_per_node

    def verdict(self, recipe: Recipe) -> Verdict:
        """Whether it fits."""
        return self._judged(recipe)[0]

    def needed(self, recipe: Recipe) -> int | None:
        """Bytes with the allocator simulated; None where the peak alone is too large."""
        return self._judged(recipe)[1]

    def _judged(self, recipe: Recipe) -> tuple[Verdict, int | None]:
        from memplan.device.fit import judge

        if recipe not in self._fits:
            peaks = self.peaks(recipe)
            if self.allocated(recipe) > peaks.room:
                self._fits[recipe] = "does not fit", None
            else:
                run = self.study.with_evaluation if self.evaluates else self.study.run
                fit = judge(self.gpu, run(peaks.card, peaks.recipe))
                self._fits[recipe] = fit.verdict, fit.needed_bytes
        return self._fits[recipe]


def _changed(recipe: Recipe, idea: _Idea, pricer: _Pricer, file: RunFile | None = None) -> Recipe | None:
    """The recipe (as asked, not resolved) after a change; None where it does not apply, can't be had of the
    model or on the card, or can't be said in the file that was asked about."""
    fields = idea.apply(pricer.resolved(recipe))
    if fields is not None and file is not None:
        fields = file.sayable(fields)
    if fields is None:
        return None
    try:
        changed = Recipe(**{**recipe.model_dump(exclude_unset=True), **fields})
        pricer.resolved(changed)
        if pricer.host is not None and changed.offload is not None and pricer.on_host(changed) > pricer.host:
            return None
    except MemplanError:
        return None
    return changed


def _combination(recipe: Recipe, pricer: _Pricer, file: RunFile | None) -> Combination | None:
    """Changes are added from cheap to dear, each where it saves something, until the run fits; then those are
    taken out again that it can do without, the dearest first."""

    def applied(ideas: list[_Idea]) -> tuple[Recipe, list[tuple[str, str, str]]]:
        changed, told = recipe, []
        for idea in ideas:
            after = _changed(changed, idea, pricer, file)
            if after is not None:
                resolved = pricer.resolved(changed)
                lines = "" if file is None else _lines(idea, resolved, file)
                told.append((idea.title(resolved), idea.command(resolved), lines))
                changed = after
        return changed, told

    chosen: list[_Idea] = []
    for idea in sorted(IDEAS, key=lambda idea: idea.rank):
        before, _ = applied(chosen)
        after, told = applied([*chosen, idea])
        free = after.alloc_conf != before.alloc_conf
        if after == before or not (free or pricer.allocated(after) < pricer.allocated(before)):
            continue
        chosen.append(idea)
        if pricer.verdict(after) != "does not fit":
            break
    else:
        return None
    for idea in reversed(chosen[:]):
        without = [other for other in chosen if other is not idea]
        if pricer.verdict(applied(without)[0]) != "does not fit":
            chosen = without
    changed, told = applied(chosen)
    needed = pricer.needed(changed)
    assert needed is not None
    return Combination(
        titles=tuple(title for title, _, _ in told),
        command=" ".join(command for _, command, _ in told),
        config=None if file is None else "; ".join(lines for _, _, lines in told),
        needed_bytes=needed,
        verdict=pricer.verdict(changed),
    )


def _cards_for(study: Prediction, than: Gpu) -> tuple[str, ...]:
    """The three smallest cards, each of another size, on which the run fits as it is."""
    from memplan.asked.gpus import load_gpus
    from memplan.device.fit import judge
    from memplan.planning.cards import written_for

    found: list[str] = []
    sizes: set[int] = set()
    for gpu in sorted(load_gpus(), key=lambda gpu: gpu.visible_bytes):
        if gpu.visible_bytes <= than.visible_bytes or gpu.gb in sizes or gpu.kind == "slice":
            continue
        try:
            if written_for(study.recipe, gpu) is not None:
                continue  # other kernels run there
        except MemplanError:
            continue  # its kernels don't run there
        if judge(gpu, study.run(), explain=False).verdict == "fits":
            found.append(gpu.name)
            sizes.add(gpu.gb)
        if len(found) == 3:
            break
    return tuple(found)


def _room(recipe: Recipe, pricer: _Pricer, file: RunFile | None) -> Iterable[str]:
    """What a run that fits leaves room for."""
    from memplan.planning.frontier import largest

    def how(field: str, value: object, option: str) -> str:
        fields = None if file is None else file.sayable({field: value})
        return option if file is None or fields is None else file.change(fields, recipe)

    # with use_reentrant given, the option that turns checkpointing off would contradict it
    if pricer.resolved(recipe).gradient_checkpointing and recipe.use_reentrant is None:
        asked = {**recipe.model_dump(exclude_unset=True), "gradient_checkpointing": False}
        if pricer.verdict(Recipe(**asked)) == "fits":
            how_said = how("gradient_checkpointing", False, "--no-gradient-checkpointing")
            yield f"no checkpointing: about a quarter less time ({how_said})"
    peaks = pricer.peaks(recipe)
    longest = largest(peaks, "seq_len", recipe.batch_size)
    if longest > recipe.seq_len:
        yield f"sequences of up to {longest:,} tokens ({how('seq_len', longest, f'--seq-len {longest}')})"
    most = largest(peaks, "batch_size", recipe.seq_len)
    if most > recipe.batch_size:
        yield f"up to {most} sequences at once ({how('batch_size', most, f'--batch-size {most}')})"
