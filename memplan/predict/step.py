"""The predicted writer: plays one steady-state training step and returns its tape.

The step is the one that transformers' Trainer takes with a full batch: forward, loss, backward,
clipping, optimizer, ``zero_grad``. Before it begins, weights, adapters, optimizer states, the batch
and cuBLAS's workspaces are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from memplan import attention, families, losses, strategies, towers
from memplan.asked.recipe import DTypeName, Mode, Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.optimizers import State
from memplan.parts.context import Context
from memplan.parts.leaves import Embedding
from memplan.parts.loop import MODULE, Loop
from memplan.predict import blueprint, fold, masks, parameters, unlike, update
from memplan.predict.builder import Builder, Model
from memplan.predict.checkpoint import checkpoint
from memplan.predict.copied import Copied, NotAlike
from memplan.predict.fed import Batch, Lengths, Rows, batch, of_lengths, waiting, whole, widest
from memplan.predict.fold import Played
from memplan.predict.unlike import Standing, standing
from memplan.shadow import autograd, ops
from memplan.shadow.spread import Spread
from memplan.shadow.tensor import (
    DTYPES,
    Tensor,
    begin,
    bfloat16,
    category,
    empty,
    float32,
    int64,
    no_grad,
    playing,
    state,
)
from memplan.shadow.turns import in_part
from memplan.tape import Category, Part, Phase, Tape


def write_tape(
    spec: ModelSpec,
    recipe: Recipe,
    *,
    card: Card | None = None,
    lengths: Sequence[Lengths] | None = None,
    looped: bool = False,
    folded: bool = True,
    rank: int | None = None,
) -> Tape:
    """Play a step of ``recipe`` (resolved) on ``spec``.

    ``card`` is the reference card unless given; ``lengths``: those of the sequences of each forward pass of
    the step, which else are ``seq_len``. ``looped``: it is a step of a Trainer's loop, which keeps more
    on the card (:mod:`memplan.parts.loop`). ``folded=False`` plays every layer; ``rank``: of those that share
    the step; unless given, the one that takes the most.
    Raises RecipeError if the recipe does not suit the model.
    """
    return _written(spec, recipe, card, lengths, rank, looped=looped, folded=folded, unfolded=False)


def write_long_tape(
    spec: ModelSpec,
    recipe: Recipe,
    *,
    card: Card | None = None,
    lengths: Sequence[Lengths] | None = None,
    looped: bool = False,
    rank: int | None = None,
    first: bool = False,
) -> Tape:
    """The tape of ``write_tape(folded=False)``, written out from the folded one where that can be done.
    ``first``: of a run's first step, where a strategy rehearses."""
    return _written(spec, recipe, card, lengths, rank, looped=looped, folded=True, unfolded=True, first=first)


def _written(
    spec: ModelSpec,
    recipe: Recipe,
    card: Card | None,
    lengths: Sequence[Lengths] | None,
    rank: int | None,
    *,
    looped: bool,
    folded: bool,
    unfolded: bool,
    first: bool = False,
) -> Tape:
    # every micro-step after the first finds gradients there, so the second shows what all others do that are
    # alike
    micro_steps = min(recipe.gradient_accumulation_steps, 2)
    step = [whole(recipe)] * micro_steps if lengths is None else [of_lengths(recipe, one) for one in lengths]
    which, host = 0, (0, 0, 0)
    copies = folded and _copies(spec, recipe)

    def play(played: Played | Standing) -> Tape:
        nonlocal which, host, copies
        spread = _spread(recipe, rank)
        if spread is not None and first:
            spread.first()
        try:
            found = _play(spec, recipe, step, card, played, spread, looped=looped, copies=copies)
        except NotAlike:
            copies = False
            return play(played)
        if spread is not None:
            which, host = spread.rank, spread.host()
        return found

    tape = written(
        play,
        spec,
        widest(step),
        folded=folded,
        unfolded=unfolded,
    )
    tape.rank, tape.host = which, host
    for segment in tape.segments:
        if segment.phase is Phase.OPTIMIZER:
            segment.layer = None  # an update goes by parameters, not by layers: folding alone needed to know
    return tape


def written(
    play: Callable[[Played | Standing], Tape],
    spec: ModelSpec,
    recipe: Recipe,
    *,
    folded: bool,
    unfolded: bool,
) -> Tape:
    """What ``play`` writes of so many layers that the others follow from them (all of them unless
    ``folded``); ``unfolded``: written out again."""
    every = fold.all_layers(spec.num_hidden_layers)
    played = layers_to_play(spec, recipe) if folded else every
    with playing():
        while True:
            tape = play(played)
            if isinstance(played, Standing) and unfolded and not played.complete:
                return unlike.unfold(tape, played) or play(every)
            if played.complete:
                return tape
            if (unlike if isinstance(played, Standing) else fold).fold(tape, played):
                long = fold.unfold(tape, played) if unfolded and isinstance(played, Played) else tape
                if long is not None:
                    return long
            played = played.longer()


def layers_to_play(spec: ModelSpec, recipe: Recipe) -> Played | Standing:
    """The layers that are played of a folded tape."""
    every = fold.all_layers(spec.num_hidden_layers)
    if router_loss(spec, recipe):  # which goes over all layers again, in the head
        return every
    if not strategies.folds(recipe):
        return every
    layers = kinds(spec, recipe)
    strategy = strategies.of(recipe)
    played = fold.layers_to_play(
        layers,
        first_is_like_others=recipe.mode is Mode.FULL,
        units=3 if strategy is None else strategy.units,
    )
    return standing(layers, _trained(spec, recipe)) if played.complete else played


def _copies(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether layers are tried to be copied (:mod:`memplan.predict.copied`)."""
    strategy = strategies.of(recipe)
    if strategy is None or not strategy.copies or router_loss(spec, recipe) or uses_cache(spec, recipe):
        return False
    first, *others = kinds(spec, recipe)
    return len(others) >= _FEWEST_COPIED and all(kind == first for kind in others)


_FEWEST_COPIED = 6


def _rehearsed(spec: ModelSpec, recipe: Recipe) -> int:
    """How many layers tell in which order all of them are called: the first, a middle one and the last, if
    like modules are in all of them."""
    count = spec.num_hidden_layers
    alike = len({(sparse, adapted) for sparse, _, adapted, *_ in kinds(spec, recipe)}) == 1
    return min(count, 3) if alike and not router_loss(spec, recipe) else count


def kinds(spec: ModelSpec, recipe: Recipe) -> list[Any]:
    """What tells layers apart: experts or not, which mask and rotation they are given, what is adapted."""
    wanted = masks.needed(spec, recipe)
    caches = uses_cache(spec, recipe) and "sliding_attention" in spec.layer_types
    by_type = any(wanted.values()) or caches or families.find(spec.model_type).rotates_by_layer
    by_type |= "linear_attention" in spec.layer_types
    adapted = parameters.adapted_by_layer(spec, recipe)
    return [
        (
            blueprint.is_sparse(spec, index),
            (masks.layer_type(spec, index) if by_type else None, masks.is_rotated(spec, index)),
            adapted[index] if adapted else None,
            *_deepened(spec, recipe, index),
        )
        for index in range(spec.num_hidden_layers)
    ]


def _deepened(spec: ModelSpec, recipe: Recipe, index: int) -> tuple[int, ...]:
    """Of a layer behind which a tower's features are added: its number."""
    deep = recipe.images and spec.vision is not None and index < len(spec.vision.deepstack)
    return (index,) if deep else ()


def _trained(spec: ModelSpec, recipe: Recipe) -> list[bool]:
    """Whether each layer has anything to train."""
    adapted = parameters.adapted_by_layer(spec, recipe)
    return [adapted is None or bool(adapted[index]) for index in range(spec.num_hidden_layers)]


def uses_cache(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether training fills a cache of keys and values: checkpointing and TRL's fused head turn it off.
    Where the language model has a configuration of its own, the Trainer does not."""
    return (
        (recipe.use_cache or spec.text_cache)
        and not recipe.gradient_checkpointing
        and not losses.find(recipe.loss).sft
    )


def router_loss(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether the load-balancing loss of a mixture of experts is added: SFTTrainer does (trl 1.16,
    trainer/sft_trainer.py, aux_loss_enabled), other trainers where the config says so, which is refused."""
    weighed = any(spec.sparse_layers) and spec.router_aux_loss_coef != 0.0
    return weighed and losses.find(recipe.loss).sft


def _spread(recipe: Recipe, rank: int | None = None) -> Spread | None:
    strategy = strategies.of(recipe)
    return None if strategy is None else strategy.spread(recipe, rank)


def at_rest(
    spec: ModelSpec,
    recipe: Recipe,
    card: Card | None,
    played: Played | Standing,
    spread: Spread | None = None,
    *,
    looped: bool,
) -> tuple[Model, State, list[Tensor], Loop[Tensor] | None]:
    """Begin a new tape with what is there before a step: the model, its optimizer states, cuBLAS's
    workspaces, and what a Trainer's loop keeps."""
    tape = begin(card)
    state.spread = spread or _spread(recipe)
    if state.spread is not None:
        state.spread.looped = looped
    model = Builder(spec, recipe).build(played)
    if state.spread is not None:
        model.trainable = state.spread.optimized(model.trainable)
    embedding = model.embedding.weight
    looked_up = [one.weight for one in model.tower.values() if isinstance(one, Embedding)]
    states = update.states(
        model.trainable, recipe, [state.spread.updated(embedding) if state.spread else embedding, *looked_up]
    )
    if state.spread is not None:
        state.spread.rest(model.trainable)
    tape.begin(Phase.SETUP, "workspaces", part=Part.RESTING)
    tape.module = ""
    # one for each cuBLAS handle, and autograd's thread has its own
    workspaces = [
        empty((state.card.cublas_workspace,), DTYPES["uint8"], "cublas_workspace") for _ in range(2)
    ]
    tape.workspaces.update(one.storage.index for one in workspaces if one.storage is not None)
    loop = None
    if looped:
        tape.begin(Phase.SETUP, "loop", part=Part.RESTING)
        tape.module = MODULE
        counts = families.find(spec.model_type).counts_items
        loop = Loop(recipe, lambda name: empty((), float32, name), counts=counts)
        tape.module = ""
    tape.begin(Phase.SETUP, "batch", part=Part.RESTING)
    if recipe.images:
        stays = families.find(spec.model_type).stays(recipe.batch_size)
        model.stays.update({name: empty(shape, int64, name) for name, shape in stays.items()})
    return model, states, workspaces, loop


@in_part
def _play(
    spec: ModelSpec,
    recipe: Recipe,
    step: Sequence[Rows],
    card: Card | None,
    played: Played | Standing,
    spread: Spread | None = None,
    *,
    looped: bool,
    copies: bool = False,
) -> Tape:
    model, states, _workspaces, loop = at_rest(spec, recipe, card, played, spread, looped=looped)
    tape = state.tape
    items = None if loop is None else loop.items
    batches = {number: batch(spec, rows, items) for number, rows in {id(rows): rows for rows in step}.items()}
    if looped:  # lengths make each batch of a step another one, and these are all there
        _waiting = waiting(batches[id(step[0])], recipe.gradient_accumulation_steps - len(batches))
    spread = state.spread
    if spread is not None and spread.rehearses:
        mark = tape.mark()
        few = _rehearsed(spec, recipe)
        rehearsing = replace(model, layers=model.layers[:few])
        spread.backward(forward(rehearsing, batches[id(step[0])], list(played.indices[:few])))
        spread.rehearsed(few, len(model.layers))
        tape.rewind(mark)
        tape.begin(Phase.SETUP, "gathered", part=Part.RESTING)
        spread.gathered()
    for number, rows in enumerate(step, 1):
        if spread is not None:
            spread.last = number == len(step)
        loss = forward(model, batches[id(rows)], list(played.indices), copies=copies)
        lost = loss if looped else None  # the name in Trainer.training_step
        unscaled = None
        if loop is not None and not loop.counts:
            with category(Category.LOGITS_AND_LOSS):
                loss = ops.scale(loss, "div")
            lost = loss
        if (looped or recipe.gradient_accumulation_steps > 1) and (spread is None or spread.divides):
            with category(Category.LOGITS_AND_LOSS):
                loss = ops.scale(loss, "div")
                if loop is not None and loop.scale is not None:
                    unscaled = loss
                    loss = ops.mul(loss, loop.scale)
        tape.begin(Phase.BACKWARD, "backward")
        tape.module = "loss"
        if spread is None:
            grad = empty((), loss.dtype, "ones_like")  # torch.autograd.backward holds it to the end
            autograd.backward(loss, grad)
            tape.begin(Phase.BACKWARD, "graph freed")
            del grad
        else:
            spread.backward(loss)
        del unscaled
        loss = (lost or loss).detach()
        lost = None
        if loop is not None and not (spread is not None and spread.inside and spread.last):
            loop.backward(loss)
    if spread is None or not spread.update(recipe, states, loop):
        clips = recipe.max_grad_norm or looped
        if clips and (spread is None or not spread.clip(loop)):
            update.clip(model.trainable, loop)
        tape.begin(Phase.OPTIMIZER, "step", part=Part.UPDATE)
        held = [] if spread is None else spread.stepping()
        update.step(model.trainable, recipe, states)
        del held
        if loop is not None:
            loop.updated()
        update.zero_grad(model.trainable)
    if loop is not None and spread is not None and spread.inside:
        loop.backward(loss)
    tape.begin(Phase.OPTIMIZER, "end")
    del loss
    tape.finish()  # what dies with these names is no part of the step
    if spread is not None:
        spread.played(tape)
    return tape


def forward(model: Model, fed: Batch, played: list[int], *, copies: bool = False) -> Tensor:
    """``model(**batch).loss``, under autocast as accelerate wraps it. ``copies``: layers are copied where
    that can be."""
    recipe = model.recipe
    spread = state.spread
    autocast = recipe.autocast and (spread is None or spread.autocast)
    if autocast:
        state.autocast = bfloat16 if recipe.dtype is DTypeName.FLOAT32 else DTYPES[recipe.dtype.value]
    if spread is not None:
        state.tape.begin(Phase.FORWARD, "embed")
        if fed.labels.items is not None and not losses.find(recipe.loss).sft:
            fed = replace(fed, labels=fed.labels.divided_by(spread.given(fed.labels.items)))
        spread.before()
    loss, logits, cache = _causal_lm(model, fed, played, copies=copies)
    if autocast:
        state.autocast = None
        state.autocast_cache.clear()
        # convert_outputs_to_fp32 (accelerate/utils/operations.py): all 16-bit outputs, logits too
        logits = None if logits is None else ops.to(logits, float32)
    if spread is not None:
        loss, logits = spread.after(loss, logits)
    del logits
    loss = losses.find(recipe.loss).finish(loss)
    state.category = Category.TEMPORARIES
    del cache
    return loss


def _causal_lm(
    model: Model, fed: Batch, played: list[int], *, copies: bool
) -> tuple[Any, Tensor | None, Any]:
    """``ForCausalLM.forward``: the loss, and the outputs that live until the caller drops them."""
    tape = state.tape
    tape.begin(Phase.FORWARD, "embed")
    router_logits: list[Tensor] | None = [] if router_loss(model.spec, model.recipe) else None
    hidden, cache = _decoder(model, fed, played, router_logits, copies=copies)
    tape.begin(Phase.FORWARD, "head")
    state.category = Category.LOGITS_AND_LOSS
    head = losses.find(model.recipe.loss).head
    module = model.head if state.spread is None else state.spread.head(model.head)
    loss, logits = head(module, hidden, fed.labels, router_logits, model.spec)
    return loss, logits, cache


def _decoder(
    model: Model,
    fed: Batch,
    played: list[int],
    router_logits: list[Tensor] | None,
    *,
    copies: bool,
) -> tuple[Tensor, Any]:
    spec, recipe, tape = model.spec, model.recipe, state.tape
    rows = fed.rows.recipe
    spread, family = state.spread, families.find(spec.model_type)
    embeds = model.embedding(fed.ids) if spread is None else spread.embed(model.embedding, fed.ids)
    tape.module = "model"
    if family.multiplied_embedding:
        embeds = ops.scale(embeds)
    cache: list[Tensor] | None = [] if uses_cache(spec, recipe) else None
    seen = None
    if fed.pictures is not None:
        held = [embeds]
        del embeds  # the name is given what the images are in
        seen = _see(model, held, fed, fed.pictures)
        embeds = held.pop()
    with category(Category.ACTIVATIONS if recipe.gradient_checkpointing else Category.TEMPORARIES):
        # recomputation needs them
        positions = fed.positions or (_positions(rows.seq_len) if seen is None else seen.positions)
        attention_masks = masks.make(spec, rows, embeds.dtype, fed.mask)
    hidden = embeds
    tape.module = f"{family.root}.rotary_emb"
    with no_grad():
        rotary = (
            _rotary_tables(hidden, spec, rows.seq_len)
            if spread is None
            else spread.module("model.rotary_emb", _rotary_tables, hidden, spec, rows.seq_len)
        )
    layer = family.layer
    attend = attention.of(recipe).attend
    layer_outputs: Tensor | None = None  # a name of models that see
    copied = Copied(2 if recipe.mode is Mode.FULL else 3, model.trained) if copies else ()
    for number, (modules, index) in enumerate(zip(model.layers, played, strict=True)):
        if number in copied:
            assert isinstance(copied, Copied)
            if number == copied.first:
                hidden = copied.forward(hidden)
            continue
        run = layer if spread is None else spread.around(number, layer)
        tape.begin(Phase.FORWARD, "layer", index)
        state.scope = index
        kind = masks.layer_type(spec, index)
        cos, sin = rotary[kind if len(rotary) > 1 else next(iter(rotary))]
        context = Context(
            spec.of(kind),
            attend,
            DTYPES[recipe.dtype.value],
            cos,
            sin,
            attention_masks[kind],
            positions if seen is None else None,
            kind == "sliding_attention",
            masks.is_rotated(spec, index),
            cache,
            router_logits,
            None if losses.find(recipe.loss).sft else fed.labels.items,
        )
        if recipe.gradient_checkpointing:
            hidden = checkpoint(run, modules, hidden, context, reentrant=bool(recipe.use_reentrant))
        else:
            hidden = run(modules, hidden, context)
        del cos, sin, context
        layer_outputs = hidden if family.sees is not None else None
        if seen is not None:
            state.scope = None
            hidden = seen.after(index, hidden)
    state.scope = None
    tape.begin(Phase.FORWARD, "final norm")
    hidden = model.norm(hidden) if spread is None else spread.normed(model.norm, hidden)
    del positions, seen, layer_outputs
    return hidden, cache


def _see(model: Model, held: list[Tensor], fed: Batch, seen: towers.Pictures) -> families.Seen:
    """What the model makes of a batch's images before its decoder runs; ``held``: the embeddings, in whose
    place come those with images."""
    spec, recipe = model.spec, model.recipe
    sees = families.find(spec.model_type).sees
    assert sees is not None

    def run(block: Any, modules: Any, hidden: Tensor, context: Any) -> Tensor:
        if recipe.gradient_checkpointing:
            return checkpoint(block, modules, hidden, context, reentrant=False)
        out: Tensor = block(modules, hidden, context)
        return out

    attend = attention.of(recipe).attend
    features = towers.find(seen.vision.kind).forward(model.tower, fed.looks, seen, attend, run)
    found = sees(features, held, fed.ids, fed.looks, seen)
    model.stays.update(found.stays)
    return found


def _positions(length: int) -> Tensor:
    arange = empty((length,), int64, "arange")
    return ops.pointwise("add", arange)


def _rotary_tables(hidden: Tensor, spec: ModelSpec, length: int) -> dict[str, tuple[Tensor, Tensor]]:
    family = families.find(spec.model_type)
    kinds = sorted(set(spec.layer_types)) if family.rotates_by_layer else ["full_attention"]
    return {kind: family.cos_sin(spec.of(kind), length, hidden) for kind in kinds}
