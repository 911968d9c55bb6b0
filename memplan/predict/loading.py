"""How a model comes onto the card, as far as the allocator remembers it: which block lies where, and what
loading leaves behind in the cache.

The stock ways:

*qlora*: ``from_pretrained`` quantises on the card. It first takes and drops one block as large as the model
(transformers 5.23 modeling_utils.py, ``caching_allocator_warmup``), then loads one parameter after the other
in the order of ``dot_natural_key`` without threads (core_model_loading.py: on-the-fly quantisation), each
weight in 16 bits until bitsandbytes has quantised it (0.50 functional.py, ``quantize_4bit``). PEFT's
preparation then casts what is not 4-bit and empties the cache (0.21 peft/utils/other.py). Adapters are moved
to the card in the dtype that their layer computes in, one layer after another, and then cast to fp32, all of
them (peft/tuners/tuners_utils.py, ``_move_adapter_to_device_of_base_layer``, ``cast_adapter_dtype``); TRL's
SFTTrainer casts them back to bf16 (1.16 trainer/sft_trainer.py). A checkpoint that is in 4 bits already comes
as it is, after the same block: nothing is there in 16 bits first, and threads read it, as below.

*full, lora*: the model is made on the host, and the Trainer moves it, parameter by parameter in the order of
its modules (torch/nn/modules/module.py, ``_apply``). With a ``device_map`` it is loaded onto the card as
above, by threads whose order is the machine's (here: that of the names), and adapters come as above.

In all of them the Trainer empties the cache before the first step.

And memplan's own, for what it measures (memplan/verify/made.py): a model is made where it stays, module by
module, and the cache is emptied after each weight that has been quantised.

Left out: scratch of the mean over scales; the copies that merge a checkpoint's experts; the norms that DoRA
computes when it begins.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from math import prod

from memplan import strategies, weights
from memplan.asked.recipe import DTypeName, Recipe
from memplan.asked.spec import ModelSpec
from memplan.device.allocator import SMALL_SEGMENT
from memplan.predict import blueprint, published
from memplan.predict.published import PLAIN, Published
from memplan.shadow.tensor import Shape
from memplan.tape import Category, Part, Phase, Tape
from memplan.weights import Brought, LoadStep, Temporary

_NOT_LOADED = ("rotary_emb", "rotary_pos_emb", "embed_scale", "bitsandbytes")  # made, not read
_WARMUP_RESERVE = int(1.2 * (1 << 30))  # what the warm-up leaves of a card that is smaller than the model
_ITEMSIZE = {DTypeName.BFLOAT16: 2, DTypeName.FLOAT16: 2, DTypeName.FLOAT32: 4}


def loading(spec: ModelSpec, recipe: Recipe, step: Tape, capacity: int | None = None) -> Tape:
    """What the allocator is asked for before the first step, of the storages that an unfolded ``step`` has
    in SETUP; optimizer states come later. ``capacity``: bytes of the card, which bound the warm-up.

    The storages of the step have the same numbers on this tape, and what is only there for a while follows.
    """
    shapes = blueprint.named_shapes(spec)
    strategy = strategies.of(recipe)
    if strategy is not None and strategy.part is not None:
        shapes = {name: strategy.part(name, shape, recipe.gpus) for name, shape in shapes.items()}
        recipe = recipe.model_copy(update={"device_map": "cuda"})  # a device, as transformers gives itself
    if strategy is not None and strategy.load is not None:
        if weights.of(recipe) is None:
            return _spread(strategy, spec, shapes, recipe, step, capacity)
        if strategy.shards:
            return _sharded(strategy, spec, shapes, recipe, step, capacity)
    if strategy is not None and strategy.wrap is not None:
        checkpoint = published.of(spec, recipe.dtype)
        steps = list(_steps(shapes, _brought(step, spec), recipe, step, capacity, checkpoint))
        wrapped = strategy.wrap(recipe, step, _temporary(sum(what == "scratch" for what, _ in steps)))
        return _written(iter([*steps, ("empty_cache", 0), *wrapped]), step, emptied=False)
    return loading_of(shapes, _brought(step, spec), recipe, step, capacity, published.of(spec, recipe.dtype))


def loading_of(
    shapes: Mapping[str, Shape],
    brought: Iterable[Brought],
    recipe: Recipe,
    step: Tape,
    capacity: int | None = None,
    checkpoint: Published = PLAIN,
) -> Tape:
    """The same of a step that somebody else wrote: ``shapes`` of all parameters of the base model by their
    full names, and what it ``brought``, in the order of modules."""
    return _written(_steps(shapes, list(brought), recipe, step, capacity, checkpoint), step)


def making(spec: ModelSpec, recipe: Recipe, step: Tape) -> Tape:
    """The same of a model that memplan's verifier makes."""
    steps = _steps(blueprint.named_shapes(spec), _brought(step, spec), recipe, step, None, None)
    return _written(steps, step)


def _spread(
    strategy: strategies.Strategy,
    spec: ModelSpec,
    shapes: Mapping[str, Shape],
    recipe: Recipe,
    step: Tape,
    capacity: int | None,
) -> Tape:
    """The same of a model that is spread over ranks when it is there, with nothing emptied after."""
    assert strategy.load is not None
    temporary = _temporary()
    brought = _brought(step, spec)
    resting = [(one.storage, one.name, step.sizes[one.storage]) for one in brought if not one.made]
    made = [one.storage for one in brought if one.made]
    known = {name.removesuffix(".weight"): prod(shape) for name, shape in shapes.items()}
    there = {name for _, name, _ in resting}
    itemsize = strategy.itemsize or _ITEMSIZE[recipe.dtype]
    whole: dict[int | str, int] = {n: count * itemsize for n, count in known.items() if n not in there}
    for number, name, nbytes in resting:
        share = nbytes * recipe.shards
        count = known.get(name, 0)
        exact = next((count * size for size in (4, 2) if 0 <= share - count * size < share // 8), share)
        whole[number] = exact if ".lora_" not in name else share
    coming = strategies.Coming(resting, whole, {}, temporary, capacity)
    steps = [*strategy.load(recipe, coming), *(("alloc", number) for number in made)]
    return _written(iter(steps), step, emptied=False)


def _sharded(
    strategy: strategies.Strategy,
    spec: ModelSpec,
    shapes: Mapping[str, Shape],
    recipe: Recipe,
    step: Tape,
    capacity: int | None,
) -> Tape:
    """The same of one with 4-bit weights, which is whole on the card as on one GPU before it is sharded."""
    from memplan.predict.step import write_long_tape

    assert strategy.load is not None
    alone = recipe.model_copy(update={"parallel": None, "gpus": 1})
    lone = write_long_tape(spec, alone)
    whole = {one.storage: one for one in _brought(lone, spec)}
    resting, stays = [], defaultdict(list)  # of these, what is whole on each rank
    for one in _brought(step, spec):
        if one.made or one.category is Category.QUANTIZATION_STATE:
            stays[one.name].append(one.storage)
        else:
            resting.append((one.storage, one.name, step.sizes[one.storage]))
    temporary = _temporary()
    steps: list[LoadStep] = []
    lies: dict[str, list[int]] = defaultdict(list)
    sizes: dict[int, int] = {}
    numbers: list[int] = []  # of what is only there for a while, as numbered on one GPU
    checkpoint = published.of(spec, recipe.dtype)
    for what, value in _steps(shapes, list(whole.values()), alone, lone, capacity, checkpoint):
        if what == "scratch":
            take, number = temporary(value)
            numbers.append(number)
            steps.append(take)
        elif what == "drop":
            steps.append((what, numbers[value]))
        elif what == "alloc" and stays.get(whole[value].name):
            steps.append((what, stays[whole[value].name].pop(0)))
        elif what == "alloc":
            take, number = temporary(lone.sizes[value])
            lies[whole[value].name].append(number)
            sizes[number] = lone.sizes[value]
            steps.append(take)
        else:
            steps.append((what, value))
    steps.append(("empty_cache", 0))
    steps += strategy.load(recipe, strategies.Coming(resting, {}, lies, temporary, capacity, sizes))
    return _written(iter(steps), step, emptied=False)


def _written(steps: Iterator[LoadStep], step: Tape, *, emptied: bool = True) -> Tape:
    tape = Tape(
        "predicted",  # whoever wrote the step
        sizes=step.sizes[:],
        categories=step.categories[:],
        operations=step.operations[:],
        modules=step.modules[:],
    )
    first = len(tape.sizes)
    tape.begin(Phase.SETUP, "loading", part=Part.LOADED)
    for what, number in steps:
        if what == "alloc":
            tape.events.append(number)
            tape.module = tape.modules[number]
        elif what == "scratch":
            tape.alloc(number, "parameter", Category.TEMPORARIES)
        elif what == "drop":
            tape.free(first + number)
        else:
            _empty_cache(tape)
    if emptied:
        _empty_cache(tape)  # Trainer.train: accelerator.free_memory (transformers 5.23 trainer.py)
    tape.finish()
    return tape


def _empty_cache(tape: Tape) -> None:
    tape.begin(Phase.SETUP, "empty_cache", part=Part.EMPTIED)
    tape.begin(Phase.SETUP, "loading", part=Part.LOADED)


def _steps(
    shapes: Mapping[str, Shape],
    brought: list[Brought],
    recipe: Recipe,
    tape: Tape,
    capacity: int | None,
    checkpoint: Published | None,
) -> Iterator[LoadStep]:
    """``checkpoint``: None where memplan makes the model."""
    if weights.of(recipe) is not None or (checkpoint is not None and recipe.device_map):
        return _onto_card(shapes, brought, recipe, tape, capacity, checkpoint)
    return iter([("alloc", one.storage) for one in brought])


def _brought(tape: Tape, spec: ModelSpec) -> list[Brought]:
    """Storages of weights, quantisation state and adapters in SETUP of a tape of the shadow."""
    found = []
    layers = blueprint.layers_of(spec)
    for segment in tape.segments:
        if segment.part is not Part.LOADED:
            continue
        prefix = "" if segment.layer is None else f"{layers}{segment.layer}."
        for event in tape.events[segment.start : segment.stop]:
            if event >= 0:
                name = prefix + tape.modules[event]
                made = name.endswith(_NOT_LOADED)
                found.append(Brought(event, name, tape.categories[event], made))
    return found


def _onto_card(
    shapes: Mapping[str, Shape],
    brought: list[Brought],
    recipe: Recipe,
    tape: Tape,
    capacity: int | None,
    checkpoint: Published | None,
) -> Iterator[LoadStep]:
    """As transformers loads a checkpoint, else as memplan makes a model."""
    stock = checkpoint is not None
    held = checkpoint or PLAIN
    storages: dict[str, list[int]] = {}
    adapters: list[tuple[int, str]] = []
    made = []
    for one in brought:
        if one.category is Category.ADAPTERS:
            adapters.append((one.storage, one.name))
        elif one.made:
            made.append(one.storage)
        else:
            storages.setdefault(one.name, []).append(one.storage)
    itemsize = _ITEMSIZE[recipe.dtype]
    temporary = _temporary()
    form = weights.of(recipe)
    quantised = {name for name in shapes if form is not None and form.made(name, storages)}
    if stock:
        size = sum(
            form.packed(prod(shape)) if form is not None and name in quantised else prod(shape) * itemsize
            for name, shape in shapes.items()
        )
        size += sum(held.buffers.values())
        if recipe.device_map == "auto":
            # accelerate asks for a number on the card, whose segment counts as room
            take, probe = temporary(1)
            yield take
            yield "drop", probe
            size = size - SMALL_SEGMENT if size > 2 * SMALL_SEGMENT else 0
        if capacity is not None:
            size = min(size, max(capacity - _WARMUP_RESERVE, 0))
        if size:
            take, warm = temporary(size)
            yield take
            yield "drop", warm
    for index in made:
        yield "alloc", index
    narrow: list[tuple[int, int]] = []  # what the preparation casts: scratch, storage
    order = (lambda name: _natural(held.first(name))) if stock else _tree
    for name in sorted([*shapes, *held.buffers], key=order):
        if name in held.buffers:
            yield from (("alloc", index) for index in _take(storages, name))
            continue
        if form is not None and name in quantised and held.stored:
            yield from form.stored(storages, name.removesuffix(".weight"), temporary)
            continue
        if form is not None and name in quantised:
            yield from form.load(shapes[name], itemsize, storages, name.removesuffix(".weight"), temporary)
            if not stock:
                yield "empty_cache", 0
            continue
        indices = _take(storages, name)
        for index in indices:
            nbytes = prod(shapes[name]) * itemsize
            arrives: LoadStep = ("alloc", index)
            if recipe.kbit_prep and itemsize == 2 and tape.sizes[index] > nbytes:
                arrives, number = temporary(nbytes)
                narrow.append((number, index))
            yield from held.arriving(name, shapes[name], itemsize, arrives, temporary)
    for indices in storages.values():  # what is no parameter
        for index in indices:
            yield "alloc", index
    if recipe.kbit_prep:
        for number, index in sorted(narrow, key=lambda pair: pair[1]):  # the order of model.parameters()
            yield "alloc", index
            yield "drop", number
        yield "empty_cache", 0
    if held.packed:  # quantizer_mxfp4.py, _process_model_after_weight_loading
        yield "empty_cache", 0
    yield from _adapters(recipe, adapters, tape, quantised if stock else set(), temporary)


def _temporary(made: int = 0) -> Temporary:
    """What makes the next step of something that is there for a while, and its number; ``made``: how many
    there are already."""
    numbers = count(made)
    return lambda nbytes: (("scratch", nbytes), next(numbers))


def _adapters(recipe, adapters, tape, quantised, temporary) -> Iterator[LoadStep]:  # type: ignore[no-untyped-def]
    """Adapters as PEFT brings them onto the card, and as a trainer casts them afterwards, each time one after
    the other; ``quantised``: the names of quantised weights."""
    back = recipe.casts_adapters_back
    widened = recipe.adapter_dtype is DTypeName.FLOAT32 or back
    stays: dict[int, list[int]] = {}  # by storage, bytes: as it arrives, after PEFT, after the trainer
    for index, name in adapters:
        size = tape.sizes[index]
        stays[index] = [size] * 3
        if ".lora_" not in name:
            continue
        wide = 2 * size if back and ".lora_magnitude" not in name else size
        if widened:
            base = _ITEMSIZE[_of_base(recipe, name.partition(".lora_")[0] + ".weight" in quantised)]
            stays[index] = [wide * base // 4, wide, size]
    lies: dict[int, int] = {}
    for when in range(3):
        for index, sizes in stays.items():
            if when and sizes[when] == sizes[when - 1]:
                continue
            if len(set(sizes[when:])) == 1:
                yield "alloc", index
                number = None
            else:
                take, number = temporary(sizes[when])
                yield take
            if when:
                yield "drop", lies[index]
            if number is not None:
                lies[index] = number


def _of_base(recipe: Recipe, quantised: bool) -> DTypeName:
    """What PEFT makes an adapter of: the dtype of the weight, or what a quantised one multiplies in."""
    if quantised:
        return recipe.compute_dtype or recipe.dtype
    return DTypeName.FLOAT32 if recipe.kbit_prep else recipe.dtype


def _take(storages: dict[str, list[int]], name: str) -> list[int]:
    """The storage of a parameter: the tape names those of one module alike, weight before bias."""
    for known in (name, name.rpartition(".")[0]):
        if storages.get(known):
            first = storages[known].pop(0)
            if not storages[known]:
                del storages[known]
            return [first]
    return []


def _tree(name: str) -> bool:
    """The order of modules: the embedding comes before the layers that ``named_shapes`` begins with."""
    return ".embed_tokens." not in name


def _natural(name: str) -> list[tuple[int, int, str, int]]:
    """``dot_natural_key``: parts between dots; numbers come by value and before words."""
    return [
        (0, int(part), "", 0)
        if part.isdigit()
        else (1, 0, part.rstrip("0123456789"), int(re.search(r"\d*$", part)[0] or -1))  # type: ignore[index]
        for part in name.split(".")
    ]
