"""FSDP2 as accelerate sets it up: ``fully_shard`` on the embedding, on each decoder layer, and on the last
norm with the output layer; what is left, with adapters the norm, is the model's own
(torch/distributed/fsdp/_fully_shard, 2.13; accelerate 1.15 utils/fsdp_utils.py, ``fsdp2_prepare_model``).

Each rank keeps a part of every parameter. Before a layer runs, its parameters are gathered: copied in on a
stream of their own, gathered there, copied out into tensors that the model computes with. They go when it has
run; in backward they come again, a layer ahead. Its gradients are laid end to end, and what this rank keeps
of their sum is what the optimizer finds; of a step of several passes each rank keeps whole gradients up to
the last one (accelerate's ``no_sync``). The last norm and the output layer stay until their backward is over,
and with them the embedding where it is the output layer's weight; without ``reshard_after_forward`` all do.

Of several replicas (a mesh of two dimensions, HSDP) the GPUs of each divide the model. What they have summed
is summed over the replicas on a stream of its own, in its place; it is kept to the end of backward beside
what it is cast to (``AllReduceState``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from memplan.asked.recipe import DTypeName, Mode, Recipe
from memplan.cuda import lists
from memplan.parts.context import Context, Layer, Leaves
from memplan.shadow import ops
from memplan.shadow.autograd import AccumulateGrad, Node, attach, require_grad
from memplan.shadow.tensor import (
    DTYPES,
    DType,
    Resizable,
    Shape,
    Tensor,
    bfloat16,
    category,
    empty,
    float32,
    state,
    stream,
    uint8,
)
from memplan.strategies import EMBEDDING, NORM, Coming, Forward, Part, Strategy
from memplan.strategies._host import Hosted
from memplan.tape import Category, Phase
from memplan.weights import LoadStep

_GATHERING, _REDUCING, _REPLICATING = 1, 2, 3  # streams


@dataclass(slots=True)
class Parameter:
    """A parameter: ``shard`` rests and is updated, ``whole`` is computed with and has memory while it is
    gathered; ``rows``: of the longest shard."""

    shard: Tensor
    whole: Tensor
    rows: int
    name: str
    accumulated: Tensor | None = None

    @property
    def held(self) -> int:
        """Elements of a shard, padded as all of them are."""
        return self.rows * prod(self.whole.shape[1:])

    def gather(self, world: int) -> None:
        """Give it memory."""
        block = self.whole.storage
        assert isinstance(block, Resizable)
        block.resize(world * self.held * self.whole.dtype.itemsize, "all_gather")

    def drop(self) -> None:
        """Take that back."""
        block = self.whole.storage
        assert isinstance(block, Resizable)
        block.resize(0)

    def gradient(self) -> Tensor | None:
        """Taken from the parameter that was computed with, or what earlier passes have left of it."""
        node = self.whole.node
        if not isinstance(node, AccumulateGrad):
            return None
        grad, node.grad = node.grad, None
        if self.accumulated is not None:
            grad, self.accumulated = self.accumulated, None
        return grad


@dataclass(slots=True)
class Group:
    """What ``fully_shard`` gathers together (``FSDPParamGroup``). ``stays``: after its forward, too;
    ``gathered``: copied in and not out yet."""

    stays: bool = False
    parameters: list[Parameter] = field(default_factory=list)
    gathered: Tensor | None = None
    whole: bool = False
    reduced: bool = False
    entered: bool = False
    left: bool = False
    place: int | None = None  # in the order in which they ran
    summed: Tensor | None = None  # _all_reduce_state


class Fsdp2(Hosted):
    """Of mixed precision (the Trainer's bf16=True, without autocast):
    ``trained``: the dtype of what is trained; ``computing``: that of gathered parameters; ``reducing``: that
    in which gradients are summed. ``by_itself``: units as PyTorch's tutorial has them, in which the model
    gathers what its layers have not, and keeps it."""

    autocast = False
    shards = True

    def __init__(self, recipe: Recipe, rank: int | None = None, *, by_itself: bool = False) -> None:
        super().__init__(recipe.shards, rank and rank % recipe.shards)
        self.by_itself = by_itself
        self.replicates = recipe.gpus > recipe.shards
        mixed = recipe.autocast
        narrow = DTYPES[recipe.dtype.value] if recipe.dtype is DTypeName.FLOAT16 else bfloat16
        wide = DTYPES[recipe.shard_dtype.value] if recipe.shard_dtype else float32
        # accelerate upcasts what is trained, of a model without 4-bit weights
        self.trained = wide if mixed and recipe.mode is not Mode.QLORA else None
        self.computing = narrow if mixed else None
        self.reducing = DTYPES[recipe.reduce_dtype.value] if recipe.reduce_dtype else self.computing
        self.adapted = recipe.mode is not Mode.FULL  # accelerate finds no norm in PEFT's model
        self.stays = recipe.reshard_after_forward is False
        self.root, self.embedding, self.tail = Group(True), Group(self.stays), Group(True)
        self.layers: list[Group] = []
        self.group = self.root
        self.by_whole: dict[int, Parameter] = {}
        self.ran: list[Group] = []  # post_forward_order
        self.away = recipe.offload is not None  # CPUOffloadPolicy: shards, gradients and states on the host
        self.kept: Tensor | None = None  # all_gather_state
        self.summing: list[Tensor] = []  # reduce_scatter_states

    # -- what rests --------------------------------------------------------------------------------------

    def begin(self, part: Part) -> None:
        """The unit that what is made belongs to."""
        if isinstance(part, int):
            self.group = Group(self.stays)
            self.layers.append(self.group)
        elif self.by_itself or (part == NORM and self.adapted):
            self.group = self.root
        else:
            self.group = self.embedding if part == EMBEDDING else self.tail

    def parameter(self, shape: Shape, dtype: DType, kind: Category, trainable: bool) -> Tensor:
        """This rank's part, padded as all are; a tensor without memory."""
        rows = -(-shape[0] // self.world)
        own = max(min(rows, shape[0] - self.rank * rows), 0)
        resting = self.trained if trainable and self.trained is not None else dtype
        if self.away:
            shard = Tensor((own, *shape[1:]), resting, None)
            self._offload(rows * prod(shape[1:]) * resting.itemsize, trainable=trainable)
        else:
            with category(kind):
                padded = empty((rows, *shape[1:]), resting, "parameter")
            shard = Tensor((own, *shape[1:]), resting, padded.storage)
        whole = Tensor(shape, self.computing or dtype, Resizable())
        if trainable:
            require_grad(shard, parameter=True)
            require_grad(whole, parameter=True)
        made = Parameter(shard, whole, rows, state.tape.module)
        if self.group is self.tail and made.name == "model.norm":
            self.group.parameters.insert(0, made)  # accelerate names it before the embedding
        else:
            self.group.parameters.append(made)
        self.by_whole[id(whole)] = made
        return whole

    def _offload(self, nbytes: int, *, trainable: bool) -> None:
        """What a parameter takes on the host, and those of the layers that its own stands for."""
        for _ in range(self.times):
            self.on_host.pin(nbytes)
            if trainable:
                self.on_host.pin(nbytes)  # its gradient
                self.on_host.keep_states(nbytes)

    def updated(self, parameter: Tensor) -> Tensor:
        """Its shard."""
        return self.by_whole[id(parameter)].shard

    def optimized(self, groups: list[Any]) -> list[Any]:
        """Nothing, where all is on the host."""
        return [] if self.away else groups

    def update(self, recipe: Recipe, kept: Any, loop: Any) -> bool:
        """Of what is on the host, only the norm of the gradients comes by, to be summed over the ranks."""
        if not self.away:
            return False
        state.tape.begin(Phase.OPTIMIZER, "norm")
        if recipe.max_grad_norm:
            state.tape.module = "fsdp"
            summed = empty((), float32, "_to_copy")
            del summed
            squared, norm = empty((), float32, "all_reduce"), empty((), float32, "pow")
            del squared, norm
        return True

    # -- gathering ---------------------------------------------------------------------------------------

    def unshard(self, group: Group) -> None:
        """``FSDPParamGroup.unshard``: ``foreach_all_gather``."""
        if group.gathered is not None or group.whole or not group.parameters:
            return
        state.tape.module = "fsdp"
        dtype = group.parameters[0].whole.dtype
        count = sum(parameter.held for parameter in group.parameters)
        cast = sum(p.held for p in group.parameters if p.shard.dtype is not dtype)
        with category(Category.COMMUNICATION), stream(_GATHERING):
            if self.away:
                inputs = [self._brought(parameter) for parameter in group.parameters]
            else:
                inputs = [empty((cast,), dtype, "all_gather_copy_in")]
            group.gathered = empty((count * self.world,), dtype, "all_gather")
            while inputs:
                inputs.pop()

    def _brought(self, parameter: Parameter) -> Tensor:
        """A shard from the host, cast on the card (``FSDPParam.all_gather_inputs``)."""
        held = parameter.held
        came = empty((held,), parameter.shard.dtype, "_to_copy")
        if parameter.whole.dtype is came.dtype:
            return came
        return empty((held,), parameter.whole.dtype, "_to_copy")

    def copy_out(self, group: Group, *, forward: bool) -> None:
        """``FSDPParamGroup.wait_for_unshard``: ``foreach_all_gather_copy_out``. In forward the gathered
        bytes stay until the next ones have been copied out."""
        if group.gathered is None:
            return
        state.tape.module = "fsdp"
        before = None
        if forward:
            before, self.kept = self.kept, None
        with category(Category.COMMUNICATION):
            for parameter in group.parameters:
                parameter.gather(self.world)
        chunks = [p.held * p.whole.dtype.itemsize for p in group.parameters]
        places = empty((lists.split_copy(chunks, self.world, state.card),), uint8, "split_with_sizes_copy")
        del places
        del before
        group.whole = True
        if forward:
            self.kept = group.gathered
        group.gathered = None

    def reshard(self, group: Group) -> None:
        """What was gathered goes."""
        if group.whole:
            for parameter in group.parameters:
                parameter.drop()
            group.whole = False

    # -- forward -----------------------------------------------------------------------------------------

    def before(self) -> None:
        """The model's own parameters are gathered."""
        self._enter(self.root)

    def given(self, number: Tensor) -> Tensor:
        """Cast, as the Trainer has divided it (transformers 5.23 trainer.py, ``_get_num_items_in_batch``)."""
        if self.by_itself or self.computing is None:
            return number
        return empty(number.shape, self.computing, "_to_copy")

    def after(self, loss: Any, logits: Tensor | None) -> tuple[Any, Tensor | None]:
        """What stays is watched; what is returned is cast."""
        for group in (self.root, self.tail):  # the tail where the loss reads the output layer's weight
            if group.whole and not group.left:
                self._leave(group, *_tensors(loss, logits))
        self.kept = None
        return (loss, logits) if self.by_itself else (self._narrowed(loss), self._narrowed(logits))

    def _narrowed(self, returned: Any) -> Any:
        """``MixedPrecisionPolicy.output_dtype``."""
        if isinstance(returned, tuple):
            return type(returned)(*map(self._narrowed, returned))
        if self.computing is None or not isinstance(returned, Tensor) or not returned.dtype.floating:
            return returned
        return ops.to(returned, self.computing)

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Gathered, and gone if it is a unit of its own."""
        group = self.embedding if self.embedding.parameters else self.tail
        if self.by_itself:
            return run(ids)
        self._enter(group)
        out = run(ids)
        if group is self.embedding:
            self._leave(group, out)
        return out

    def normed(self, run: Forward, hidden: Tensor) -> Tensor:
        """With it the output layer is gathered."""
        return run(hidden if self.by_itself or self.adapted else self._into_tail(hidden))

    def head(self, head: Any) -> Any:
        """Gathered where it is called."""
        return head if self.by_itself else _Head(head, self)

    def run_head(self, head: Forward, hidden: Tensor) -> Tensor:
        """Its forward."""
        logits = head(self._into_tail(hidden))
        self._leave(self.tail, logits)
        return logits

    def _into_tail(self, hidden: Tensor) -> Tensor:
        if self.tail.whole:  # entered before, maybe with the embedding, whose input wants no gradient
            return hidden
        self._enter(self.tail)
        return self._registered(hidden, self.tail)

    def _enter(self, group: Group) -> None:
        self.unshard(group)
        self.copy_out(group, forward=True)

    def _leave(self, group: Group, *outputs: Tensor) -> None:
        group.left = True
        if not group.stays:
            self.reshard(group)
        self._ran(group)
        self._watch(group, *outputs)

    def around(self, layer: int, run: Layer) -> Layer:
        """Gathered before it, gone after; in recomputation it is there."""
        group = self.layers[layer]

        def wrapped(modules: Leaves, hidden: Tensor, context: Context) -> Tensor:
            if state.frame is not None and state.frame.recomputing:
                return run(modules, hidden, context)
            self._enter(group)
            out = run(modules, self._registered(hidden, group), context)
            self._leave(group, out)
            return out

        return wrapped

    def _ran(self, group: Group) -> None:
        group.place = len(self.ran)
        self.ran.append(group)

    def _watch(self, group: Group, *outputs: Tensor) -> None:
        """``_register_pre_backward_hook``."""
        for output in outputs:
            if output.node is not None:
                output.node.before = lambda: self._pre_backward(group)

    def _registered(self, hidden: Tensor, group: Group) -> Tensor:
        """``RegisterPostBackwardFunction``."""
        if hidden.node is None or not state.grad:
            return hidden
        node = Node(self._post_backward, hidden)
        node.python = True
        node.context = group
        out = hidden.detach()
        attach(node, out)
        return out

    # -- backward ----------------------------------------------------------------------------------------

    def _pre_backward(self, group: Group) -> None:
        if group.entered:
            return
        group.entered = True
        self.unshard(group)
        self.copy_out(group, forward=False)
        if group.place:
            self.unshard(self.ran[group.place - 1])
        group.place = None

    def _post_backward(self, node: Node, grad: Tensor) -> Any:
        with category(Category.TEMPORARIES):
            self._reduce(node.context)
        return (grad,)

    def _reduce(self, group: Group) -> None:
        """``post_backward``: ``foreach_reduce``."""
        group.reduced = True
        state.tape.module = "fsdp"
        if not self.last:
            self.reshard(group)
            self._accumulate(group)
            return
        found = [(parameter, parameter.gradient()) for parameter in group.parameters]
        reduced = [(parameter, grad) for parameter, grad in found if grad is not None]
        del found
        self.reshard(group)
        self.summing.clear()
        if not reduced:
            return
        grads = [grad for _, grad in reduced]
        parameters = [parameter for parameter, _ in reduced]
        del reduced
        dtype = self.reducing or grads[0].dtype
        count = sum(parameter.held for parameter in parameters)
        with category(Category.COMMUNICATION):
            laid = empty((count * self.world,), dtype, "reduce_scatter_input")
        if dtype is grads[0].dtype or dtype.itemsize == 4:
            chunks = [parameter.held * dtype.itemsize for parameter in parameters]
            places = empty((lists.chunk_cat(chunks),), uint8, "chunk_cat")
            del places
        last = grads[-1]
        while grads:
            grads.pop()
        with stream(_REDUCING), category(Category.COMMUNICATION):
            summed = empty((count,), dtype, "reduce_scatter")
        group.summed = summed if self.replicates else None
        with stream(_REPLICATING if self.replicates else _REDUCING):
            resting = parameters[0].shard.dtype
            if resting is not dtype:
                summed = empty((count,), resting, "_to_copy")
        assert summed.storage is not None
        state.tape.categories[summed.storage.index] = Category.GRADIENTS
        for parameter in () if self.away else parameters:
            node = parameter.shard.node
            assert isinstance(node, AccumulateGrad)
            node.grad = Tensor(parameter.shard.shape, resting, summed.storage)
        self.summing.append(laid)
        del last, summed

    def _accumulate(self, group: Group) -> None:
        """``accumulate_unsharded_grad_if_needed``, ``to_accumulated_grad_if_needed``: a gradient that is
        summed in another dtype is kept in that; others stay where they are."""
        for parameter in group.parameters:
            node = parameter.whole.node
            if not isinstance(node, AccumulateGrad) or node.grad is None:
                continue
            if self.reducing is not None and node.grad.dtype is not self.reducing:
                if parameter.accumulated is None:
                    with category(Category.GRADIENTS):
                        parameter.accumulated = empty(node.grad.shape, self.reducing, "_to_copy")
                node.grad = None

    def finish(self) -> None:
        """``_root_post_backward_final_callback``."""
        with category(Category.TEMPORARIES):
            for group in (self.root, self.embedding, *self.layers, self.tail):
                if not group.reduced:
                    self._reduce(group)
                group.gathered = group.summed = None
                group.reduced = group.entered = group.left = False
                group.place = None
        self.ran.clear()
        self.summing.clear()

    def norm(self, stacked: Tensor) -> Tensor:
        """``_NormPartial``: squares are summed over the ranks."""
        squares = empty(stacked.shape, stacked.dtype, "pow")
        summed = empty(stacked.shape, stacked.dtype, "all_reduce")
        norms = empty(stacked.shape, stacked.dtype, "pow")
        del squares, summed
        return norms


class _Head:
    """The output layer, which may be called or have its weight read."""

    def __init__(self, head: Any, spread: Fsdp2) -> None:
        self._head, self._spread = head, spread

    @property
    def weight(self) -> Tensor:
        """As it lies: gathered, or else as its ``full_tensor()`` (TRL 1.16 trainer/utils.py,
        ``add_fused_lm_head``)."""
        whole: Tensor = self._head.weight
        if self._spread.tail.whole:
            return whole
        spread = self._spread
        parts = spread.by_whole[id(whole)]
        with category(Category.COMMUNICATION):
            gathered = empty((spread.world * parts.rows, *whole.shape[1:]), parts.shard.dtype, "full_tensor")
        return Tensor(whole.shape, gathered.dtype, gathered.storage)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._spread.run_head(self._head, hidden)


def _tensors(loss: Any, logits: Tensor | None) -> list[Tensor]:
    """What the model returns."""
    returned = [loss] if isinstance(loss, Tensor) else [one for one in loss if isinstance(one, Tensor)]
    return returned if logits is None else [*returned, logits]


def _load(recipe: Recipe, coming: Coming) -> Iterator[LoadStep]:
    """``fully_shard`` of one unit after the other: all of its parameters come onto the card, a part of each
    is copied, and they go. accelerate's names for the weights of embedding and output layer hold those to the
    end of its preparation, and its ``original_sd`` what was on the card before (fsdp_utils.py,
    ``fsdp2_prepare_model``)."""
    whole, temporary = coming.whole, coming.temporary
    units: dict[str, list[tuple[int | str, str]]] = {}
    for number, name, _ in coming.resting:
        units.setdefault(_unit(name), []).append((number, name))
    away = [one for one in whole if isinstance(one, str)] if recipe.offload is not None else []
    there = {name: sum(coming.sizes[one] for one in of) for name, of in coming.lying.items()}
    if recipe.offload is not None:  # 4-bit weights, and what lies beside them
        away += there
    for name in away:
        units.setdefault(_unit(name), []).append((name, name))
    # what is trained is upcast before, which shards that rest here tell
    wide = recipe.offload is not None and recipe.mode is Mode.FULL and recipe.autocast
    wider = 4 // DTYPES[recipe.dtype.value].itemsize if wide and recipe.shard_dtype is None else 1
    held: list[int] = []
    for unit in sorted(units, key=lambda unit: (not unit.startswith("model.layers."), "norm" not in unit)):
        came: list[int] = []
        kept = held if unit in ("model.embed_tokens", "lm_head") else came
        for name in dict.fromkeys(name for _, name in units[unit]):  # several may be called alike
            held += coming.lying.get(name, ())
        for one, _ in units[unit]:
            if one in whole:
                take, temporarily = temporary(whole[one] * wider)
                yield take
                kept.append(temporarily)
        for one, _ in units[unit]:
            if isinstance(one, int):
                yield "alloc", one
                continue
            nbytes = whole[one] * wider if one in whole else there[one]
            take, shard = temporary(-(-nbytes // recipe.shards))  # on its way to the host
            yield take
            yield "drop", shard
        for number in came:
            yield "drop", number
    for number in held:
        yield "drop", number


def _unit(name: str) -> str:
    return ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name


STRATEGY = Strategy(Fsdp2, True, load=_load, units=4)
