"""FSDP1 as accelerate sets it up: ``FullyShardedDataParallel`` with ``use_orig_params`` and ``FULL_SHARD``,
``SHARD_GRAD_OP`` or ``HYBRID_SHARD`` on each decoder layer and on the model (torch/distributed/fsdp, 2.13:
``_flat_param.py``, ``_runtime_utils.py``; accelerate 1.15 ``Accelerator.prepare_model``). With adapters
PEFT's policy makes each of their matrices a unit of its own (peft/utils/other.py, ``fsdp_auto_wrap_policy``).

The parameters of a unit are one flat tensor, of which each rank keeps a part, and what belongs to no layer is
the model's own unit, embedding, norm and output layer together. Before a unit runs, its part is cast on a
stream of its own, gathered on another, and the parameters are views of what was gathered. That goes when a
layer has run and comes again for its backward; the model's own stays from the first forward to the last
backward. When the gradients of all of a unit's parameters are there, they are laid end to end and summed over
the ranks, and this rank's part is what the optimizer finds. It stays until the next step's forward.

With ``SHARD_GRAD_OP`` what was gathered goes only when gradients have been summed. With ``HYBRID_SHARD`` the
ranks of a machine share a model, and what they have summed is summed over the machines on another stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from operator import itemgetter
from typing import Any

from memplan.asked.recipe import BackwardPrefetch, DTypeName, Mode, Recipe
from memplan.cuda.reduction import whole_scratch
from memplan.optimizers import Group, State
from memplan.optimizers._lists import gradient
from memplan.parts.context import Context, Layer, Leaves
from memplan.parts.loop import Loop
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
    int32,
    state,
    stream,
    uint8,
)
from memplan.strategies import Coming, Part, Strategy
from memplan.strategies._broadcast import coalesced
from memplan.strategies._host import Hosted
from memplan.tape import Category, Phase, rounded
from memplan.tape import Part as Does
from memplan.weights import LoadStep

_CASTING, _GATHERING, _REDUCING, _REPLICATING = 1, 2, 3, 4  # streams
_ALIGNED = 16  # bytes: _get_aligned_numel


@dataclass(slots=True)
class Parameter:
    """``whole``: what is computed with, a view of what its unit gathers; ``shard``: what of it this rank
    keeps; ``place``: where in the flat parameter it begins, in elements."""

    whole: Tensor
    name: str
    place: int
    shard: Tensor | None = None


@dataclass(slots=True)
class Unit:
    """A ``FlatParamHandle``. ``resting`` and ``computing``: dtypes; ``times``: how many it is;
    ``numel``: of the flat parameter so far; ``spare``: elements of each piece between parameters and behind
    them."""

    layer: int | None
    kind: Category
    resting: DType
    computing: DType
    trainable: bool
    times: int
    parameters: list[Parameter] = field(default_factory=list)
    numel: int = 0
    spare: list[int] = field(default_factory=list)
    block: Resizable = field(default_factory=Resizable)
    flat: Tensor | None = None  # what is gathered, as a leaf of the graph: parameters are views of it
    part: Tensor | None = None  # what rests
    grad: Tensor | None = None  # of what rests
    came: Tensor | None = None  # the part, from the host
    there: bool = False
    viewed: bool = False  # parameters are views of what is gathered, and not of the part
    prefetched: bool = False
    entered: bool = False
    place: int | None = None  # in the order in which they ran

    def add(self, whole: Tensor, name: str) -> None:
        """One more parameter, aligned as ``use_orig_params`` has it."""
        aligned = _ALIGNED // self.computing.itemsize
        if spare := -self.numel % aligned:
            self.spare.append(spare)
            self.numel += spare
        self.parameters.append(Parameter(whole, name, self.numel))
        self.numel += prod(whole.shape)

    @property
    def sizes(self) -> list[int]:
        """Elements of each parameter."""
        return [prod(parameter.whole.shape) for parameter in self.parameters]

    def close(self, world: int) -> None:
        """All are there."""
        if spare := -self.numel % world:
            self.spare.append(spare)
            self.numel += spare


class Fsdp(Hosted):
    """``mixed``: accelerate's mixed precision: parameters are gathered and gradients summed in bfloat16,
    and what is trained rests in float32."""

    shards = True

    def __init__(self, recipe: Recipe, rank: int | None = None) -> None:
        super().__init__(recipe.shards, rank and rank % recipe.shards)
        self.replicates = recipe.gpus > recipe.shards
        self.chosen = rank is not None
        self.mixed = recipe.autocast
        self.prefetch = recipe.backward_prefetch
        self.ahead = bool(recipe.forward_prefetch)
        self.away = recipe.offload is not None  # CPUOffload: parts, gradients and states on the host
        self.stays = recipe.reshard_after_forward is False  # SHARD_GRAD_OP
        self.order: list[Unit] = []  # in which they run, as the first step has recorded it
        self.adapted = recipe.mode is not Mode.FULL
        self.root: Unit | None = None
        self.layers: dict[int, Unit] = {}
        self.units: list[Unit] = []
        self.ordered: list[Unit] = []  # layers by their positions
        self.at: int | None = None
        self.of: dict[int, tuple[Unit, Parameter]] = {}
        self.groups: list[Group] = []
        self.ran: list[Unit] = []
        self.summed: dict[int, Unit] = {}  # units by the nodes where their gradients arrive
        self.kept: Tensor | None = None

    def first(self) -> None:
        """The order in which units run is not known yet."""
        self.ahead = False

    # -- what rests --------------------------------------------------------------------------------------

    def begin(self, part: Part) -> None:
        """The layer whose parameters come, or none."""
        self.at = part if isinstance(part, int) else None

    def parameter(self, shape: Shape, dtype: DType, kind: Category, trainable: bool) -> Tensor:
        """One more of its unit; a tensor without memory."""
        if self.adapted and trainable:
            unit = self._made(dtype, kind, trainable=True)
        else:
            unit = self._unit(dtype, kind, trainable)
        whole = Tensor(shape, unit.computing, unit.block)
        if trainable:
            require_grad(whole, parameter=True)
        unit.add(whole, state.tape.module)
        self.of[id(whole)] = unit, unit.parameters[-1]
        return whole

    def _unit(self, dtype: DType, kind: Category, trainable: bool) -> Unit:
        made = self.root if self.at is None else self.layers.get(self.at)
        if made is None:
            made = self._made(dtype, kind, trainable=trainable)
            if self.at is None:
                self.root = made
            else:
                self.layers[self.at] = made
                self.ordered.append(made)
        return made

    def _made(self, dtype: DType, kind: Category, *, trainable: bool) -> Unit:
        computing = bfloat16 if self.mixed else dtype
        resting = float32 if self.mixed and trainable else dtype
        self.units.append(Unit(self.at, kind, resting, computing, trainable, self.times))
        return self.units[-1]

    def resting(self, parameter: Tensor) -> DType:
        """That of its part, unless it is gathered ahead of its turn."""
        found = self.of.get(id(parameter))
        return parameter.dtype if found is None or found[0].viewed else found[0].resting

    def optimized(self, groups: list[Group]) -> list[Group]:
        """This rank's part of each unit, and what it has of each parameter."""
        tape = state.tape
        for unit in self.units:
            unit.close(self.world)
        if not self.chosen:
            self.rank = _most(self.units, self.world)
        for unit in self.units:
            tape.begin(Phase.SETUP, "flat parameters", unit.layer, Does.LOADED)
            prefix = "" if unit.layer is not None else "model."
            tape.module = unit.parameters[0].name if self._alone(unit) else f"{prefix}{_FLAT}"
            if self.away:
                unit.part = Tensor((unit.numel // self.world,), unit.resting, None)
                self._offload(unit)
            else:
                with category(unit.kind):
                    unit.part = empty((unit.numel // self.world,), unit.resting, "parameter")
            for parameter in unit.parameters:
                parameter.shard = self._shard(unit, parameter)
            if unit.trainable:
                unit.flat = Tensor((unit.numel,), unit.computing, None)
                require_grad(unit.flat, parameter=True)
                self.summed[id(unit.flat.node)] = unit
        self.groups = [Group(group.layer, group.repeat, self._shards(group.parameters)) for group in groups]
        self.groups = [group for group in self.groups if group.parameters]
        return [] if self.away else self.groups

    def _offload(self, unit: Unit) -> None:
        """``init_flat_param_attributes``: pinned, with room for a gradient, whether it has one or not."""
        assert unit.part is not None
        for _ in range(unit.times):
            self.on_host.pin(unit.part.nbytes)
            self.on_host.pin(unit.part.nbytes)
            if unit.trainable:
                self.on_host.keep_states(unit.part.nbytes)

    def _alone(self, unit: Unit) -> bool:
        """Whether it is an adapter's matrix."""
        return self.adapted and unit.trainable

    def _shard(self, unit: Unit, parameter: Parameter) -> Tensor | None:
        """A part of the flat parameter, of a shape that tells vectors from matrices; None if it is another
        rank's."""
        assert unit.part is not None
        own = _own(parameter, unit.numel // self.world, self.rank)
        if not own:
            return None
        shape = (own,) if len(parameter.whole.shape) < 2 else (own, 1)
        shard = Tensor(shape, unit.resting, unit.part.storage)
        if unit.trainable:
            require_grad(shard, parameter=True)
        return shard

    def _shards(self, parameters: list[Tensor]) -> list[Tensor]:
        shards = (self.of[id(parameter)][1].shard for parameter in parameters)
        return [shard for shard in shards if shard is not None]

    def updated(self, parameter: Tensor) -> Tensor:
        """Its shard, once there are some."""
        found = self.of.get(id(parameter))
        shard = None if found is None else found[1].shard
        return parameter if shard is None else shard

    def rest(self, groups: list[Group]) -> None:
        """Gradients of the step before."""
        for unit in self.units:
            if unit.trainable and not self.away:
                state.tape.begin(Phase.SETUP, "gradients", unit.layer, Does.RESTING)
                state.tape.module = "fsdp"
                with category(Category.GRADIENTS):
                    unit.grad = empty((unit.numel // self.world,), unit.resting, "reduce_scatter")
        state.tape.begin(Phase.SETUP, "gradients", part=Does.RESTING)
        state.tape.module = "fsdp"
        self.kept = empty((), float32, "_zero_scalar")  # which clip_grad_norm_ makes when it is first called

    # -- gathering ---------------------------------------------------------------------------------------

    def unshard(self, unit: Unit) -> None:
        """``_unshard``; in forward parameters are made views of what is there (``_use_unsharded_views``). A
        part that is cast comes from the host in any case (``pre_unshard``)."""
        state.tape.module = "fsdp"
        if not unit.there or (self.away and unit.resting is not unit.computing):
            self._gather(unit)
        unit.viewed = True
        if unit.flat is not None and state.grad:
            with stream(_GATHERING):
                views = Node(self._laid, unit.flat)
            views.context = unit
            for parameter in unit.parameters:
                attach(views, parameter.whole)

    def _gather(self, unit: Unit) -> None:
        with category(Category.COMMUNICATION):
            narrow = came = None
            with stream(_CASTING):
                if unit.resting is not unit.computing:
                    narrow = empty((unit.numel // self.world,), unit.computing, "_to_copy")
                if self.away:
                    came = empty((unit.numel // self.world,), unit.resting, "_to_copy")
            if narrow is not None:
                came = None
            else:
                unit.came = came  # parameters are views of it until they are the part's again
            if not unit.there:
                with stream(_GATHERING):
                    unit.block.resize(unit.numel * unit.computing.itemsize, "all_gather")
            del narrow, came
        unit.there = True

    def reshard(self, unit: Unit, *, forward: bool = False) -> None:
        """What was gathered goes, unless it stays up to a backward whose gradients are summed
        (``_should_free_in_backward``)."""
        unit.prefetched = False
        unit.viewed = self.stays and forward
        if unit.there and not (self.stays and (forward or not self.last)):
            unit.came = None
            unit.block.resize(0)
            unit.there = False

    def _fetch(self, unit: Unit) -> None:
        if not unit.prefetched:
            self.unshard(unit)

    # -- forward -----------------------------------------------------------------------------------------

    def given(self, number: Tensor) -> Tensor:
        """Cast, as the Trainer has divided it."""
        return empty(number.shape, bfloat16, "_to_copy") if self.mixed else number

    def module(self, name: str, run: Any, x: Tensor | None, *rest: Any) -> Any:
        """An adapter's matrix; and frequencies, which are buffers and rest in 16 bits."""
        found = self.of.get(id(rest[0])) if rest else None
        if found is not None and self._alone(found[0]):
            assert x is not None
            return self._matrix(found[0], run, x, *rest)
        if not self.mixed or name != "model.rotary_emb":
            return run(x, *rest)
        wide = empty((1,), float32, "_to_copy")
        tables = run(x, *rest)
        del wide
        return tables

    def _matrix(self, unit: Unit, run: Any, x: Tensor, *rest: Any) -> Tensor:
        """A unit of its own, which is gathered and gone in recomputation, too, unless its backward has begun;
        what it is given is cast (``_cast_forward_inputs``)."""
        again = state.frame is not None and state.frame.recomputing
        if again and unit.entered:
            return run(x, *rest)  # type: ignore[no-any-return]
        module = state.tape.module
        self._fetch(unit) if again else self._enter(unit)
        state.tape.module = module
        x = ops.to(x, unit.computing)
        out: Tensor = run(x, *rest)
        self.reshard(unit, forward=True)
        if not again:
            self._left(unit, out)
        return out

    def before(self) -> None:
        """``_root_pre_forward``: gradients of the step before go, and the model's own unit is gathered."""
        for unit in self.units:
            unit.grad = None
        assert self.root is not None
        if not self.order:
            self.order = [self.root, *(unit for unit in self.units if unit is not self.root)]
        self._enter(self.root)

    def _enter(self, unit: Unit) -> None:
        """``_pre_forward_unshard``."""
        self._fetch(unit)
        if self.ahead:
            behind = self.order.index(unit) + 1
            for following in self.order[behind : behind + 1]:
                if following.place is None:
                    self._ahead(following)

    def _ahead(self, unit: Unit) -> None:
        """``_prefetch_handle``."""
        if not unit.prefetched:
            self.unshard(unit)
            unit.prefetched = True

    def after(self, loss: Any, logits: Tensor | None) -> tuple[Any, Tensor | None]:
        """The model's own unit has run last."""
        assert self.root is not None
        self._left(self.root, *([loss] if isinstance(loss, Tensor) else loss), logits)
        return loss, logits

    def around(self, layer: int, run: Layer) -> Layer:
        """Gathered before it, gone after; in recomputation it is there."""
        unit = self.ordered[layer]

        def wrapped(modules: Leaves, hidden: Tensor, context: Context) -> Tensor:
            if state.frame is not None and state.frame.recomputing:
                return run(modules, hidden, context)
            self._enter(unit)
            if not unit.trainable:
                self._let_go_with(hidden, unit)
            out = run(modules, hidden, context)
            self.reshard(unit, forward=True)
            self._left(unit, out)
            return out

        return wrapped

    def _left(self, unit: Unit, *outputs: Any) -> None:
        """``_post_forward``, which watches what is returned."""
        unit.place = len(self.ran)
        self.ran.append(unit)
        for output in outputs:
            if isinstance(output, Tensor) and output.node is not None:
                output.node.before = lambda: self._pre_backward(unit)

    def _let_go_with(self, hidden: Tensor, unit: Unit) -> None:
        """``_register_post_backward_reshard_only_hook``: behind what else waits for that gradient."""
        node = hidden.node
        if node is None:
            return
        before = node.before

        def done() -> None:
            if before is not None:
                before()
            self.reshard(unit)

        node.before = done

    # -- backward ----------------------------------------------------------------------------------------

    def _pre_backward(self, unit: Unit) -> None:
        if unit.entered:
            return
        unit.entered = True
        self._fetch(unit)
        if self.prefetch is BackwardPrefetch.PRE:
            self._prefetch(unit)

    def _prefetch(self, unit: Unit) -> None:
        if unit.place:
            self._ahead(self.ran[unit.place - 1])

    def _laid(self, node: Node, grads: Any) -> Any:
        """The backward of the views, which are pieces of one split: ``split_with_sizes_backward``."""
        unit: Unit = node.context
        state.tape.module = "fsdp"
        missing = [size for grad, size in zip(_each(grads), unit.sizes, strict=True) if grad is None]
        with category(Category.COMMUNICATION), stream(_GATHERING):
            zeros = [empty((count,), unit.computing, "zeros") for count in (*unit.spare, *missing)]
            laid = empty((unit.numel,), unit.computing, "cat")
            del zeros
        return (laid,)

    def accumulated(self, node: AccumulateGrad) -> None:
        """``_post_backward_hook``, if it is a unit's."""
        unit = self.summed.get(id(node))
        if unit is None:
            return
        self.reshard(unit)
        if self.prefetch is BackwardPrefetch.POST:
            self._prefetch(unit)
        if not self.last:
            return
        state.tape.module = "fsdp"
        laid, node.grad = node.grad, None
        with stream(_REDUCING), category(Category.COMMUNICATION):
            summed = empty((unit.numel // self.world,), unit.computing, "reduce_scatter")
        last = _REPLICATING if self.replicates else _REDUCING
        if unit.resting is not unit.computing:
            with stream(last), category(Category.COMMUNICATION):
                summed = empty((unit.numel // self.world,), unit.resting, "_to_copy")
        assert summed.storage is not None
        state.tape.categories[summed.storage.index] = Category.GRADIENTS
        unit.grad = summed
        for parameter in () if self.away else unit.parameters:
            if parameter.shard is not None and isinstance(parameter.shard.node, AccumulateGrad):
                shard = parameter.shard
                parameter.shard.node.grad = Tensor(shard.shape, shard.dtype, summed.storage)
        del laid, summed

    def finish(self) -> None:
        """``_post_backward_final_callback``."""
        for unit in self.units:
            self.reshard(unit)
            unit.entered = False
            unit.place = None
        for unit in self.order if self.away and self.last else ():
            unit.grad = None  # it is on the host
        self.ran.clear()

    # -- the update --------------------------------------------------------------------------------------

    def update(self, recipe: Recipe, kept: State, loop: Loop[Tensor] | None) -> bool:
        """Nothing, where all is on the host."""
        if self.away:
            self._clip_on_host(recipe)
        return self.away

    @staticmethod
    def _clip_on_host(recipe: Recipe) -> None:
        """Only the norm comes by, to be summed over the ranks."""
        state.tape.begin(Phase.OPTIMIZER, "norm")
        if recipe.max_grad_norm:
            state.tape.module = "fsdp"
            local = empty((), float32, "_to_copy")
            squared = empty((), float32, "pow")
            total = empty((), float32, "pow")
            del squared, total, local

    def clip(self, loop: Loop[Tensor] | None) -> bool:
        """``FullyShardedDataParallel.clip_grad_norm_``, which takes one norm after the other."""
        tape = state.tape
        if loop is not None:
            tape.begin(Phase.OPTIMIZER, "norms")
            loop.clipping()
        tape.module = "clip_grad_norm_"
        norms: list[tuple[int | None, list[Tensor]]] = []
        count = 0
        for group in self.groups:
            tape.begin(Phase.OPTIMIZER, "norms, each", group.layer)
            wanted = [one for one in group.parameters if gradient(one) is not None]
            norms.append((group.layer, [_norm(one) for one in wanted]))
            count += group.repeat * len(wanted)
        tape.begin(Phase.OPTIMIZER, "total norm")
        stacked = empty((count,), float32, "stack")
        for layer, found in norms:
            tape.begin(Phase.OPTIMIZER, "free norms", layer)
            found.clear()
        tape.begin(Phase.OPTIMIZER, "clip")
        local = empty((), float32, "linalg_vector_norm")
        del stacked
        squared = empty((), float32, "pow")
        total = empty((), float32, "pow")
        del squared
        raised = empty((), float32, "add")
        inverse = empty((), float32, "reciprocal")
        coefficient = empty((), float32, "mul")
        del inverse, raised
        clamped = empty((), float32, "clamp")
        del local, coefficient
        if loop is not None:
            loop.clipped(total)
        del total, clamped
        return True


def _norm(parameter: Tensor) -> Tensor:
    """``torch.linalg.vector_norm`` of its gradient, in float32."""
    norm = empty((), float32, "linalg_vector_norm")
    for partial, flags in whole_scratch(prod(parameter.shape), parameter.dtype.itemsize, 4, state.card):
        parts = empty((partial,), uint8, "linalg_vector_norm"), empty((flags // 4,), int32, "semaphores")
        del parts
    return norm


def _own(parameter: Parameter, held: int, rank: int) -> int:
    """Elements of a parameter that a rank keeps."""
    last = min(parameter.place + prod(parameter.whole.shape), (rank + 1) * held)
    return max(last - max(parameter.place, rank * held), 0)


def _most(units: list[Unit], world: int) -> int:
    """The rank whose optimizer's states, one block for each piece of a parameter, take the most."""
    taken = [0] * world
    for unit in units:
        if unit.trainable:
            held = unit.numel // world
            for parameter in unit.parameters:
                last = parameter.place + prod(parameter.whole.shape) - 1
                for rank in range(parameter.place // held, last // held + 1):
                    states = rounded(_own(parameter, held, rank) * unit.resting.itemsize)
                    taken[rank] += unit.times * (2 * states + rounded(1))
    return taken.index(max(taken))


def _each(grads: Any) -> list[Tensor | None]:
    return [grads] if grads is None or isinstance(grads, Tensor) else grads


_FLAT = "flat_param"
_FREQUENCIES = (256, 256)  # bytes of the rotary tables, of which a large tensor takes no more
_Piece = tuple[int, "int | None", int]


def _load(recipe: Recipe, coming: Coming) -> Iterator[LoadStep]:
    """One unit after the other, the model's own last: its parameters come onto the card, are broadcast
    (``_sync_module_params_and_buffers``), are laid end to end, and a part is kept. accelerate casts these
    parts; what they were cast from stays until the first step has taken parameters for something else. The
    first forward (``init_flat_param_attributes``) takes all that is gathered later for a moment."""
    temporary = coming.temporary
    parts = {name: (number, nbytes) for number, name, nbytes in coming.resting}
    made = _units(coming, set(parts))
    cast: list[int] = []
    held: list[int] = []
    for name, of in made:
        came = [number for _, number, _ in of if number is not None]
        for _, number, nbytes in sorted(of, key=itemgetter(0)):  # breadth first
            if number is None:
                take, number = temporary(nbytes)
                yield take
                came.append(number)
        sent = [nbytes for _, _, nbytes in of]
        if name == made[-1][0] and recipe.dtype is DTypeName.FLOAT32:
            sent = [*_FREQUENCIES, *sent]  # buffers, which come first, are of their dtype then
        yield from coalesced(sent, temporary)
        rests, loaded = _itemsizes(recipe, name)
        number, kept = parts.get(name, (None, sum(sent) // recipe.shards // loaded * rests))
        held.append(kept)
        take, laid = temporary(kept // rests * loaded * recipe.shards)
        yield take
        if number is not None and rests == loaded:
            yield "alloc", number
        else:
            take, part = temporary(kept // rests * loaded)
            yield take
            if number is None:  # it goes to the host
                came.append(part)
            else:
                cast.append(number)
        for one in (laid, *came):
            yield "drop", one
    for number in (*cast[-1:], *cast[:-1]):
        yield "alloc", number
    sizes = [(_itemsizes(recipe, name)[0], kept) for (name, _), kept in zip(made, held, strict=True)]
    for rests, kept in (*sizes[-1:], *sizes[:-1]):
        narrow = kept // rests * 2
        whole = [narrow, narrow * recipe.shards] if recipe.autocast else []
        for size in (*whole, kept * recipe.shards):
            take, number = temporary(size)
            yield take
            yield "drop", number


def _units(coming: Coming, parts: set[str]) -> list[tuple[str, list[_Piece]]]:
    """Names of what rests of them, those of a layer before its own; of what each is made of, in order: how
    deep in the model it is, where it lies on the card already, if it does, and its bytes."""
    units: dict[str, dict[str, list[_Piece]]] = {}
    for number, name, _ in coming.resting:
        if not name.endswith(_FLAT):
            lies = coming.lying.get(name, ())
            pieces: list[_Piece] = [(0, one, coming.sizes[one]) for one in lies]
            units.setdefault(_place(name), {})[name] = pieces or [(0, None, coming.whole[number])]
    whole = [(name, None, nbytes) for name, nbytes in coming.whole.items() if isinstance(name, str)]
    lying = sorted(coming.lying.items(), key=lambda pair: _order(pair[0]))
    there = [(name, one, coming.sizes[one]) for name, of in lying for one in of]
    for name, one, nbytes in (*whole, *there):
        if name not in parts:
            own = units.setdefault(_place(name), {}).setdefault(f"{_place(name)}.{_FLAT}", [])
            own.append((name.count("."), one, nbytes))
    units["model"] = units.pop("model")
    return [unit for of in units.values() for unit in of.items()]


def _order(name: str) -> tuple[bool, bool]:
    """Of what belongs to no layer, that of the modules."""
    return name.startswith("lm_head"), not name.startswith("model.embed_tokens")


def _itemsizes(recipe: Recipe, name: str) -> tuple[int, int]:
    """Bytes of what rests of a unit, and of what it is loaded in."""
    loaded = DTYPES[recipe.dtype.value].itemsize
    frozen = recipe.mode is not Mode.FULL
    if name.endswith(_FLAT) and frozen:
        return loaded, loaded
    if frozen:
        loaded = DTYPES[recipe.adapter_dtype.value].itemsize
    return 4 if recipe.autocast else loaded, loaded


def _place(name: str) -> str:
    return ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else "model"


STRATEGY = Strategy(Fsdp, True, True, _load, rehearses=lambda recipe: bool(recipe.forward_prefetch))
