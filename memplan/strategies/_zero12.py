"""ZeRO-1 and ZeRO-2 (deepspeed 0.19.8, runtime/zero/stage_1_and_2.py): the parameters of a group lie end to
end, each rank updates one part of them in fp32. Gradients are copied into buckets as they come, which all
ranks reduce when they are full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from memplan.asked.recipe import Recipe
from memplan.optimizers import Group, State
from memplan.parts.loop import Loop
from memplan.shadow import autograd, ops
from memplan.shadow.autograd import AccumulateGrad
from memplan.shadow.tensor import DType, Shape, Tensor, bool_, category, empty, float32, state, stream, uint8
from memplan.strategies import Coming
from memplan.strategies._zero import (
    REDUCING,
    Trained,
    Zero,
    by_name,
    combine_grad_norm_groups,
    count_of,
    has_inf_or_nan,
    is_invalid_grad_norm,
    mask_nan_or_inf,
    place,
    scalar,
    unscale_and_clip_grads,
    vector_norm,
)
from memplan.tape import Category, Part, Phase
from memplan.weights import LoadStep

_BUCKET = 500_000_000  # elements: reduce_bucket_size (runtime/zero/config.py)
FLAT, MASTER = "bit16_groups_flat", "single_partition_of_fp32_groups"
SENT = "temp_grad_buffer_for_gpu_offload"
_ALIGNMENT = 2  # nccl_start_alignment_factor


@dataclass(slots=True)
class Bucket:
    """``IPGBucket``. ``large``: the one gradient that no buffer holds."""

    buffers: list[Tensor] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)
    elements: int = 0
    index: int = 0


@dataclass(slots=True)
class Flat:
    """A group of parameters: its elements, those of a partition, what this rank has a part of."""

    trained: list[Trained]
    elements: int
    partition: int
    own: list[Trained]
    averaged: list[tuple[int, Tensor]] = field(default_factory=list)  # elements of which tensor
    accumulated: list[Tensor] | None = None  # all_grad_tensors


class Zero12(Zero):
    """A step on one rank. ``gradients``: they are partitioned, too (stage 2); ``size``: of a bucket."""

    def __init__(self, recipe: Recipe, rank: int | None = None, *, gradients: bool) -> None:
        super().__init__(recipe, rank)
        self.chosen = rank is not None
        self.gradients = gradients
        self.size = count_of(recipe.reduce_bucket_size, _BUCKET)
        self.groups: list[Flat] = []
        self.group_of: dict[Trained, Flat] = {}
        self.flat: list[Tensor] = []  # bit16_groups_flat
        self.bucket = Bucket()
        self.ready = False  # ready_for_gradients
        self.in_partition: Tensor | None = None  # grads_in_partition
        self.sent: Tensor | None = None
        self.norms: dict[Trained, Tensor] = {}  # norm_for_param_grads

    # -- what rests --------------------------------------------------------------------------------------

    def parameter(self, shape: Shape, dtype: DType, kind: Category, trainable: bool) -> Tensor | None:
        dtype = self.computed(dtype)
        self.size = self.size or shape[-1] ** 2  # the embedding's width
        if trainable:
            tensor = Tensor(shape, dtype, None)  # a view of its group, which is made when all are known
            self.remember(tensor)
            self.kind = kind
            return tensor
        with category(kind):
            return empty(shape, dtype, "parameter")

    def optimized(self, groups: list[Group]) -> list[Group]:
        state.tape.begin(Phase.SETUP, "partitions", part=Part.LOADED)
        laid = [(group, self.laid(group, _ALIGNMENT * self.world)) for group in self.grouped()]
        if not self.chosen:
            self.rank = _most(laid, self.world)
        for group, elements in laid:
            partition = elements // self.world
            state.tape.module = FLAT
            with category(self.kind):
                self.flat.append(empty((elements,), self.dtype, "parameter"))
            self.master(partition, MASTER)
            if self.offloads:
                self.on_host.pin(4 * partition)
                self.on_host.pin(2 * partition)  # param_buffer_of_bit16_for_cpu_offload_groups
            own = [one for one in group if self.rank in _partitions(one, partition)]
            flat = Flat(group, elements, partition, own)
            self.groups.append(flat)
            self.group_of.update(dict.fromkeys(group, flat))
        if self.offloads:
            state.tape.module = SENT
            with category(Category.COMMUNICATION):
                self.sent = empty((max(one.numel for one in self.trained),), self.dtype, "zeros")
            self.offload()
        state.tape.begin(Phase.SETUP, "norm", part=Part.RESTING)
        self.keep_norm(None, None)
        return [Group(None, 1, [master]) for master in self.masters]

    def offload(self) -> None:
        """What else rests on the host."""
        assert self.sent is not None
        self.on_host.pin(2 * self.sent.shape[0])  # temp_grad_buffer_for_cpu_offload
        for group in self.groups:
            self.on_host.pin(4 * group.partition)  # gradients of the masters
            self.on_host.keep_states(4 * group.partition)
            for one in group.own if self.accumulates else ():
                self.on_host.pin(2 * one.numel)  # accumulated_grads_in_cpu

    # -- backward ----------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """runtime/engine.py, ``DeepSpeedEngine.backward``."""
        scaled = ops.scale(loss)
        grad = empty((), loss.dtype, "ones_like")
        autograd.backward(scaled, grad)
        state.tape.begin(Phase.BACKWARD, "graph freed")
        del grad
        if self.gradients or self.last:
            self.epilogue()
        del scaled

    def accumulated(self, node: AccumulateGrad) -> None:
        """``process_gradients``."""
        state.tape.module = "deepspeed"
        if not self.ready:  # setup_buckets
            with category(Category.COMMUNICATION):
                for _ in range(1 + self.overlap):
                    self.bucket.buffers.append(empty((self.size,), self.dtype, "setup_buckets"))
            self.bucket.index = 0
            self.ready = True
        if self.gradients or (self.overlap and self.last):
            self.fill(self.by_node[node])

    def fill(self, one: Trained) -> None:
        """``reduce_independent_p_g_buckets_and_remove_grads``."""
        bucket = self.bucket
        if bucket.elements + one.numel > self.size:
            self.reduce()
            if self.overlap:
                bucket.index = 1 - bucket.index
        if one.numel <= self.size:
            one.node.grad = bucket.buffers[bucket.index].viewed(one.tensor.shape)
        bucket.elements += one.numel
        bucket.trained.append(one)

    def reduce(self) -> None:
        """``reduce_ipg_grads``."""
        self.average()
        with stream(REDUCING if self.overlap else state.stream):
            for one in self.bucket.trained:
                if one in self.group_of[one].own:
                    self.keep(one)
                elif self.gradients:
                    one.node.grad = None
        self.bucket.trained.clear()
        self.bucket.elements = 0

    def average(self) -> None:
        """``average_tensor``: slices of ranks, each of which is laid beside the next where there are several
        (``allreduce_and_scatter``, ``allreduce_bucket``)."""
        slices: list[list[int]] = []
        for one in self.bucket.trained:
            partition = self.group_of[one].partition
            for rank in _partitions(one, partition):
                elements = _shared(one, rank, partition)
                if slices and slices[-1][0] == rank:
                    slices[-1][1] += elements
                else:
                    slices.append([rank, elements])
        together: list[int] = []
        for _rank, elements in slices:
            together.append(elements)
            if sum(together) > self.size:
                self.all_reduce(together)
        if together:
            self.all_reduce(together)

    def all_reduce(self, together: list[int]) -> None:
        if len(together) > 1:
            with category(Category.COMMUNICATION), stream(REDUCING if self.overlap else state.stream):
                laid = empty((sum(together),), self.dtype, "allreduce_bucket")
                del laid
        together.clear()

    def keep(self, one: Trained) -> None:
        """``copy_grads_in_partition``."""
        if self.offloads:
            self.send(one)
            return
        if self.in_partition is None:
            total = sum(other.numel for group in self.groups for other in group.own)
            with category(Category.GRADIENTS):
                self.in_partition = empty((total,), self.dtype, "copy_grads_in_partition")
        one.node.grad = self.in_partition.viewed(one.tensor.shape)

    def send(self, one: Trained) -> None:
        """What earlier passes left on the host is added on the card; the last one's sum is sent as fp32
        (``set_norm_for_param_grad_in_gpu``, ``async_inplace_copy_grad_to_fp32_buffer_from_gpu``)."""
        if not self.last:
            return
        own = _shared(one, self.rank, self.group_of[one].partition)
        self.norms[one] = vector_norm(own, self.dtype, "set_norm_for_param_grad_in_gpu")
        has_inf_or_nan(one.numel, self.dtype)
        with category(Category.GRADIENTS):
            wide = empty((own,), float32, "_to_copy")
        del wide
        one.node.grad = None

    def epilogue(self) -> None:
        """``independent_gradient_partition_epilogue``."""
        state.tape.module = "deepspeed"
        if not (self.gradients or self.overlap):  # reduce_gradients
            for group in self.groups:
                for one in group.trained:
                    if one.node.grad is not None:
                        self.fill(one)
        self.reduce()
        for group in () if self.offloads else self.groups:
            if group.accumulated is None:
                group.accumulated = [self.gradient(one) for one in group.own]
            else:  # which is added to
                _new = [self.gradient(one) for one in group.own]
                del _new
            if self.last:
                group.averaged = self.flat_partition(group)
                group.accumulated = None
        self.bucket.buffers.clear()
        self.in_partition = None
        self.ready = False
        for group in self.groups:
            for one in group.trained:
                one.node.grad = None

    def gradient(self, one: Trained) -> Tensor:
        grad = one.node.grad
        if grad is None:
            with category(Category.GRADIENTS):
                return empty(one.tensor.shape, self.dtype, "get_all_grad_tensors")
        return grad

    def flat_partition(self, group: Flat) -> list[tuple[int, Tensor]]:
        """``get_flat_partition``: views, and what fills it up."""
        assert group.accumulated is not None
        parts = [
            (_shared(one, self.rank, group.partition), grad)
            for one, grad in zip(group.own, group.accumulated, strict=True)
        ]
        left = group.partition - sum(elements for elements, _ in parts)
        if left:
            with category(Category.GRADIENTS):
                parts.append((left, empty((left,), self.dtype, "get_flat_partition")))
        return parts

    # -- the step ----------------------------------------------------------------------------------------

    def update(self, recipe: Recipe, kept: State, loop: Loop[Tensor] | None) -> bool:
        """``DeepSpeedZeroOptimizer.step``."""
        tape = state.tape
        tape.begin(Phase.OPTIMIZER, "norm")
        tape.module = "deepspeed"
        if self.offloads:
            self.update_on_host()
            return True
        self.check_overflow()
        norms = []
        for group in self.groups:
            norms.append(self.grad_norm(group))
        total = combine_grad_norm_groups(norms)
        while norms:
            norms.pop(0)
        is_invalid_grad_norm(total)
        current = scalar(float32, "_global_grad_norm")
        for number, (group, master) in enumerate(zip(self.groups, self.masters, strict=True)):
            flattened = None
            if len(group.averaged) > 1:
                with category(Category.GRADIENTS):
                    flattened = empty((group.partition,), self.dtype, "flatten")
            with category(Category.GRADIENTS):
                grad = empty((group.partition,), float32, "single_grad_partition")
            del flattened
            group.averaged.clear()
            if self.clips:
                unscale_and_clip_grads(total)
            if not number:
                tape.begin(Phase.OPTIMIZER, "step", part=Part.UPDATE)
            self.optimize(master, grad, recipe, kept)
            del grad
        tape.begin(Phase.OPTIMIZER, "end")
        del total
        self.keep_norm(current, loop)
        return True

    def update_on_host(self) -> None:
        """The card is asked whether all ranks are well, and for the norm of each group."""
        overflow = empty((1,), uint8, "has_overflow")
        del overflow
        for _ in self.groups:
            total = empty((1,), float32, "complete_grad_norm_calculation_for_cpu_offload")
            del total
        state.tape.begin(Phase.OPTIMIZER, "end")
        self.norms.clear()

    def check_overflow(self) -> None:
        """``has_overflow``."""
        invalid_grad_count = empty((1,), float32, "has_overflow_partitioned_grads_serial")
        for group in self.groups:
            for elements, _ in group.averaged:
                has_inf_or_nan(elements, self.dtype)
        overflow = empty((1,), bool_, "has_overflow_partitioned_grads_serial")
        del invalid_grad_count
        overflow_gpu = empty((1,), uint8, "has_overflow")
        del overflow, overflow_gpu

    def grad_norm(self, group: Flat) -> Tensor:
        """``get_grad_norm_direct``."""
        name = "get_grad_norm_direct"
        own = group.averaged[: len(group.own)]
        all_norms = [vector_norm(elements, self.dtype, name) for elements, _ in own]
        del own
        if all_norms:
            stacked = empty((len(all_norms),), all_norms[0].dtype, name)
            squares = empty(stacked.shape, stacked.dtype, name)
            del stacked
            total = scalar(squares.dtype, name)
            del squares
            total_norm = scalar(float32, name)
            del total
        else:
            total_norm = scalar(float32, name)
        norm = scalar(float32, name)
        del total_norm
        mask_nan_or_inf(norm)
        while all_norms:
            all_norms.pop()
        return norm


def _partitions(one: Trained, partition: int) -> range:
    """The ranks that have a part of a parameter."""
    return range(one.start // partition, (one.start + one.numel - 1) // partition + 1)


def _shared(one: Trained, rank: int, partition: int) -> int:
    """The elements of a parameter that a rank has."""
    return min(one.start + one.numel, (rank + 1) * partition) - max(one.start, rank * partition)


def _most(groups: list[tuple[list[Trained], int]], world: int) -> int:
    """The rank that has a part of the most elements: gradients of such parameters are kept whole."""
    elements = [0] * world
    for group, padded in groups:
        for one in group:
            for rank in _partitions(one, padded // world):
                elements[rank] += one.numel
    return elements.index(max(elements))


def load(recipe: Recipe, coming: Coming) -> Iterator[LoadStep]:
    """The model is cast and comes onto the card as it is (``module.to(device)``), and each of its groups is
    laid out flat; what it lay in goes, first where the card has no room for both. A partition is copied in
    its own dtype before it is widened; gradients of all are made once (``initialize_optimizer_states``), on
    the host where they are offloaded."""
    temporary = coming.temporary
    frozen: dict[str, list[int]] = {}
    groups: list[tuple[int, int]] = []
    masters = [number for number, name, _ in coming.resting if name == MASTER]
    sent = [number for number, name, _ in coming.resting if name == SENT]
    for number, name, nbytes in coming.resting:
        if name == FLAT:
            groups.append((number, nbytes))
        elif name not in (MASTER, SENT):
            frozen.setdefault(name, []).append(number)
    nbytes_of = by_name(coming)
    allocated = sum(nbytes for _, name, nbytes in coming.resting if name in frozen)
    came: dict[str, int] = {}
    for name in sorted(nbytes_of, key=place):
        if name in frozen:
            yield from (("alloc", number) for number in frozen[name])
        elif name not in (FLAT, MASTER, SENT):
            take, came[name] = temporary(nbytes_of[name])
            allocated += nbytes_of[name]
            yield take
    for last, (flat, nbytes) in enumerate(groups):
        yield "empty_cache", 0
        own = [name for name in came if last or _decays(name)]
        apart = coming.capacity is not None and coming.capacity - allocated < nbytes
        if not apart:  # flatten_on_accelerator
            yield "alloc", flat
        yield from (("drop", came.pop(name)) for name in own)
        if apart:
            yield "empty_cache", 0
            yield "alloc", flat
        allocated += nbytes - sum(nbytes_of[name] for name in own)
        partition = nbytes // recipe.gpus
        take, copied = temporary(partition)
        yield take
        if masters:
            yield "alloc", masters[last]
            allocated += 2 * partition
        yield "drop", copied
    yield from (("alloc", number) for number in sent)
    made = [temporary(2 * (nbytes // recipe.gpus)) for _, nbytes in groups if masters]
    yield from (take for take, _ in made)
    yield from (("drop", number) for _, number in made)


def _decays(name: str) -> bool:
    return "norm" not in name and not name.endswith(".bias")
