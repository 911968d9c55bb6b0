"""The predicted writer: plays one steady-state training step and returns its tape.

The step is the one that transformers' Trainer takes with a full batch: forward, loss, backward,
clipping, optimizer, ``zero_grad``. Before it begins, weights, adapters, optimizer states, the batch
and cuBLAS's workspaces are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import eq
from typing import Any, NamedTuple

from memplan import attention, families, losses
from memplan.asked.recipe import DTypeName, Mode, Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.optimizers import State
from memplan.parts.context import Context
from memplan.predict import blueprint, fold, masks, parameters, unlike, update
from memplan.predict.builder import Builder, Model
from memplan.predict.checkpoint import checkpoint
from memplan.predict.fold import Played
from memplan.predict.unlike import Standing, standing
from memplan.shadow import autograd, ops
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
from memplan.tape import Category, Part, Phase, Tape


def write_tape(spec: ModelSpec, recipe: Recipe, *, card: Card | None = None, folded: bool = True) -> Tape:
    """Play a step of ``recipe`` (resolved) on ``spec``.

    ``card`` is the reference card unless given. ``folded=False`` plays every layer.
    Raises RecipeError if the recipe does not suit the model.
    """
    return _written(spec, recipe, card, folded=folded, unfolded=False)


def write_long_tape(spec: ModelSpec, recipe: Recipe, *, card: Card | None = None) -> Tape:
    """The tape of ``write_tape(folded=False)``, written out from the folded one where that can be done."""
    return _written(spec, recipe, card, folded=True, unfolded=True)


class Resized(NamedTuple):
    """A step by way of another one that has its events. ``long``: that one's tape, with every layer;
    ``kinds``: of each storage on it; ``sizes``: of each kind, the step's own."""

    long: Tape
    kinds: list[int]
    sizes: list[int]

    @property
    def tape(self) -> Tape:
        """The step's own tape."""
        return self.long.resized([self.sizes[kind] for kind in self.kinds])


class _Known(NamedTuple):
    """A step that was written out: of how many layers, as they were played, and their storages' kinds."""

    played: Played | Standing
    short: Tape
    kinds: list[int]
    written: Resized


_KNOWN = 4  # steps: kernels take lengths apart by a multiple of 8, short from long


class LongTapes:
    """What :func:`write_long_tape` writes of one recipe for many batch sizes and lengths: a step that has the
    events of one before is not written out again.

    Storages are of one kind if they come from the same operation of the same module and are of one size. A
    step in which they still are is written out as before: by that, layers are told to be alike.
    """

    def __init__(self, spec: ModelSpec, recipe: Recipe, card: Card | None = None) -> None:
        self.spec, self.recipe, self.card = spec, recipe, card
        self._known: list[_Known] = []  # the last one first

    def of(self, batch_size: int, seq_len: int) -> Resized:
        """The step."""
        asked = self.recipe.model_copy(update={"batch_size": batch_size, "seq_len": seq_len})

        def play(played: Played | Standing) -> Tape:
            return _play(self.spec, asked, self.card, played)

        return self._as_before(play) or self._anew(play, asked)

    def _as_before(self, play: Callable[[Played | Standing], Tape]) -> Resized | None:
        if not self._known:
            return None
        with playing():
            short = play(self._known[0].played)
        for known in self._known:
            if short == replace(known.short, sizes=short.sizes, deltas=short.deltas):
                by_kind = dict(zip(known.kinds, short.sizes, strict=True))
                if all(map(eq, short.sizes, map(by_kind.__getitem__, known.kinds))):
                    return known.written._replace(sizes=[by_kind[kind] for kind in range(len(by_kind))])
        return None

    def _anew(self, play: Callable[[Played | Standing], Tape], asked: Recipe) -> Resized:
        shorts: list[tuple[Played | Standing, Tape]] = []

        def noted(played: Played | Standing) -> Tape:
            tape = play(played)  # which will be folded
            shorts.append((played, replace(tape, segments=[replace(segment) for segment in tape.segments])))
            return tape

        long = _finished(noted, self.spec, asked, folded=True, unfolded=True)
        played, short = shorts[-1]
        numbers: dict[tuple[int, str, str], int] = {}
        kinds, long_kinds = (
            [
                numbers.setdefault(kind, len(numbers))
                for kind in zip(tape.sizes, tape.operations, tape.modules, strict=True)
            ]
            for tape in (short, long)
        )
        found = Resized(long, long_kinds, [size for size, *_ in numbers])
        self._known = [_Known(played, short, kinds, found), *self._known[: _KNOWN - 1]]
        return found


def _written(spec: ModelSpec, recipe: Recipe, card: Card | None, *, folded: bool, unfolded: bool) -> Tape:
    return _finished(
        lambda played: _play(spec, recipe, card, played), spec, recipe, folded=folded, unfolded=unfolded
    )


def _finished(
    play: Callable[[Played | Standing], Tape],
    spec: ModelSpec,
    recipe: Recipe,
    *,
    folded: bool,
    unfolded: bool,
) -> Tape:
    tape = written(play, spec, recipe, folded=folded, unfolded=unfolded)
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
            if played.complete or (unlike if isinstance(played, Standing) else fold).fold(tape, played):
                break
            played = played.longer()
        if unfolded and isinstance(played, Played) and not played.complete:
            tape = fold.unfold(tape, played) or play(every)
    return tape


def layers_to_play(spec: ModelSpec, recipe: Recipe) -> Played | Standing:
    """The layers that are played of a folded tape."""
    every = fold.all_layers(spec.num_hidden_layers)
    if router_loss(spec, recipe):  # which goes over all layers again, in the head
        return every
    layers = kinds(spec, recipe)
    played = fold.layers_to_play(layers, first_is_like_others=recipe.mode is Mode.FULL)
    return standing(layers, _trained(spec, recipe)) if played.complete else played


def kinds(spec: ModelSpec, recipe: Recipe) -> list[Any]:
    """What tells layers apart: experts or not, which mask and rotation they are given, what is adapted."""
    wanted = masks.needed(spec, recipe)
    caches = uses_cache(recipe) and "sliding_attention" in spec.layer_types
    by_type = any(wanted.values()) or caches or families.find(spec.model_type).rotates_by_layer
    adapted = parameters.adapted_by_layer(spec, recipe)
    return [
        (
            blueprint.is_sparse(spec, index),
            masks.layer_type(spec, index) if by_type else None,
            adapted[index] if adapted else None,
        )
        for index in range(spec.num_hidden_layers)
    ]


def _trained(spec: ModelSpec, recipe: Recipe) -> list[bool]:
    """Whether each layer has anything to train."""
    adapted = parameters.adapted_by_layer(spec, recipe)
    return [adapted is None or bool(adapted[index]) for index in range(spec.num_hidden_layers)]


def uses_cache(recipe: Recipe) -> bool:
    """Whether training fills a cache of keys and values: checkpointing and TRL's fused head turn it off."""
    return recipe.use_cache and not recipe.gradient_checkpointing and not losses.find(recipe.loss).sft


def router_loss(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether the load-balancing loss of a mixture of experts is added: SFTTrainer does (trl 1.16,
    trainer/sft_trainer.py, aux_loss_enabled), other trainers where the config says so, which is refused."""
    weighed = any(spec.sparse_layers) and spec.router_aux_loss_coef != 0.0
    return weighed and losses.find(recipe.loss).sft


def at_rest(
    spec: ModelSpec, recipe: Recipe, card: Card | None, played: Played | Standing
) -> tuple[Model, State, list[Tensor]]:
    """Begin a new tape with what is there before a step: the model, its optimizer states, and cuBLAS's
    workspaces."""
    tape = begin(card)
    model = Builder(spec, recipe).build(played)
    states = update.states(model.trainable, recipe, model.embedding.weight)
    tape.begin(Phase.SETUP, "workspaces", part=Part.RESTING)
    tape.module = ""
    # one for each cuBLAS handle, and autograd's thread has its own
    workspaces = [
        empty((state.card.cublas_workspace,), DTYPES["uint8"], "cublas_workspace") for _ in range(2)
    ]
    tape.workspaces.update(one.storage.index for one in workspaces if one.storage is not None)
    tape.begin(Phase.SETUP, "batch", part=Part.RESTING)
    return model, states, workspaces


def batch(size: int, length: int) -> list[Tensor]:
    """Token ids, attention mask and labels."""
    with category(Category.ACTIVATIONS):
        return [empty((size, length), int64, "batch") for _ in range(3)]


def _play(spec: ModelSpec, recipe: Recipe, card: Card | None, played: Played | Standing) -> Tape:
    model, states, _workspaces = at_rest(spec, recipe, card, played)
    tape = state.tape
    ids, attention_mask, labels = batch(recipe.batch_size, recipe.seq_len)
    # every micro-step after the first finds gradients there, so the second shows what all the others do
    for _ in range(min(recipe.gradient_accumulation_steps, 2)):
        loss = forward(model, ids, attention_mask, labels, list(played.indices))
        if recipe.gradient_accumulation_steps > 1:
            with category(Category.LOGITS_AND_LOSS):
                loss = ops.scale(loss, "div")
        tape.begin(Phase.BACKWARD, "backward")
        tape.module = "loss"
        grad = empty((), loss.dtype, "ones_like")  # torch.autograd.backward holds it to the end
        autograd.backward(loss, grad)
        tape.begin(Phase.BACKWARD, "graph freed")
        del grad
        loss = loss.detach()
    if recipe.max_grad_norm:
        update.clip(model.trainable)
    tape.begin(Phase.OPTIMIZER, "step", part=Part.UPDATE)
    update.step(model.trainable, recipe, states)
    update.zero_grad(model.trainable)
    tape.begin(Phase.OPTIMIZER, "end")
    del loss
    tape.finish()  # what dies with these names is no part of the step
    return tape


def forward(model: Model, ids: Tensor, attention_mask: Tensor, labels: Tensor, played: list[int]) -> Tensor:
    """``model(**batch).loss``, under autocast as accelerate wraps it."""
    recipe = model.recipe
    if recipe.autocast:
        state.autocast = bfloat16 if recipe.dtype is DTypeName.FLOAT32 else DTYPES[recipe.dtype.value]
    loss, logits, cache = _causal_lm(model, ids, attention_mask, labels, played)
    if recipe.autocast:
        state.autocast = None
        state.autocast_cache.clear()
        # convert_outputs_to_fp32 (accelerate/utils/operations.py): all 16-bit outputs, logits too
        converted = None if logits is None else ops.to(logits, float32)
        del logits, converted
    loss = losses.find(recipe.loss).finish(loss)
    state.category = Category.TEMPORARIES
    del cache
    return loss


def _causal_lm(
    model: Model, ids: Tensor, attention_mask: Tensor, labels: Tensor, played: list[int]
) -> tuple[Any, Tensor | None, Any]:
    """``ForCausalLM.forward``: the loss, and the outputs that live until the caller drops them."""
    tape = state.tape
    tape.begin(Phase.FORWARD, "embed")
    router_logits: list[Tensor] | None = [] if router_loss(model.spec, model.recipe) else None
    hidden, cache = _decoder(model, ids, attention_mask, played, router_logits)
    tape.begin(Phase.FORWARD, "head")
    state.category = Category.LOGITS_AND_LOSS
    head = losses.find(model.recipe.loss).head
    loss, logits = head(model.head, hidden, labels, router_logits, model.spec)
    return loss, logits, cache


def _decoder(
    model: Model,
    ids: Tensor,
    attention_mask: Tensor,
    played: list[int],
    router_logits: list[Tensor] | None,
) -> tuple[Tensor, Any]:
    spec, recipe, tape = model.spec, model.recipe, state.tape
    embeds = model.embedding(ids)
    tape.module = "model"
    cache: list[Tensor] | None = [] if uses_cache(recipe) else None
    with category(Category.ACTIVATIONS if recipe.gradient_checkpointing else Category.TEMPORARIES):
        # recomputation needs them
        positions = _positions(recipe.seq_len)
        attention_masks = masks.make(spec, recipe, attention_mask.shape, embeds.dtype)  # type: ignore[arg-type]
    hidden = embeds
    tape.module = "model.rotary_emb"
    with no_grad():
        rotary = _rotary_tables(spec, recipe.seq_len, hidden)
    layer = families.find(spec.model_type).layer
    attend = attention.of(recipe).attend
    for modules, index in zip(model.layers, played, strict=True):
        tape.begin(Phase.FORWARD, "layer", index)
        state.scope = index
        kind = masks.layer_type(spec, index)
        cos, sin = rotary[kind if len(rotary) > 1 else next(iter(rotary))]
        context = Context(
            spec,
            attend,
            DTYPES[recipe.dtype.value],
            cos,
            sin,
            attention_masks[kind],
            positions,
            kind == "sliding_attention",
            cache,
            router_logits,
        )
        if recipe.gradient_checkpointing:
            hidden = checkpoint(layer, modules, hidden, context, reentrant=bool(recipe.use_reentrant))
        else:
            hidden = layer(modules, hidden, context)
        del cos, sin, context
    state.scope = None
    tape.begin(Phase.FORWARD, "final norm")
    hidden = model.norm(hidden)
    del positions
    return hidden, cache


def _positions(length: int) -> Tensor:
    arange = empty((length,), int64, "arange")
    return ops.pointwise("add", arange)


def _rotary_tables(spec: ModelSpec, length: int, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    family = families.find(spec.model_type)
    kinds = sorted(set(spec.layer_types)) if family.rotates_by_layer else ["full_attention"]
    return {kind: family.cos_sin(spec, length, hidden) for kind in kinds}
