"""DeepSpeed's ZeRO-3 (deepspeed 0.19.8, runtime/zero/stage3.py, parameter_offload.py): parameters, too, are
partitioned. Each module's own are gathered before it runs, and those of the modules behind it ahead of that,
in the order that the first pass through the model has recorded; so one pass is rehearsed before the one that
is played.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from math import prod
from typing import Any

from memplan.asked.recipe import DTypeName, Mode, Offload, Recipe
from memplan.optimizers import Group, State
from memplan.parts.context import Context, Layer, Leaves
from memplan.parts.loop import Loop
from memplan.shadow import autograd, ops
from memplan.shadow.autograd import AccumulateGrad, Node, attach, save, split_sum, unpack
from memplan.shadow.matmul import product
from memplan.shadow.ops import clone, tracked
from memplan.shadow.tensor import (
    DType,
    Shape,
    Tensor,
    bool_,
    category,
    empty,
    float32,
    float64,
    state,
    stream,
    view_strides,
)
from memplan.strategies import Coming, Part, Strategy
from memplan.strategies._fetching import AVAILABLE, PARTITIONED, Coordinator, Module, Parameter
from memplan.strategies._zero import (
    REDUCING,
    Zero,
    by_name,
    combine_grad_norm_groups,
    is_invalid_grad_norm,
    mask_nan_or_inf,
    place,
    scalar,
    unscale,
    vector_norm,
)
from memplan.tape import Category, Phase
from memplan.tape import Part as TapePart
from memplan.weights import LoadStep, Temporary

_FLAT, _MASTER, _GRADIENTS = "lp_param_buffer", "fp32_partitioned_groups_flat", "gradients"
_SUB_GROUP = 1_000_000_000  # elements: sub_group_size


Names = dict[tuple[int | None, str], list[Parameter]]  # by layer and name


class Zero3(Zero):
    """A step on one rank. Elements: ``size``: reduce_bucket_size; ``prefetch``: stage3_prefetch_bucket_size;
    ``persistence``: stage3_param_persistence_threshold; None for what follows from the model's width
    (transformers/integrations/deepspeed.py, ``trainer_config_finalize``)."""

    rehearses = True

    def __init__(self, recipe: Recipe, rank: int | None = None) -> None:
        super().__init__(recipe, rank)
        asked = (
            recipe.reduce_bucket_size,
            recipe.stage3_prefetch_bucket_size,
            recipe.stage3_param_persistence_threshold,
        )
        self.size, self.prefetch, self.persistence = (None if one == "auto" else one for one in asked)
        self.adapted, self.trainer = recipe.mode is not Mode.FULL, recipe.trainer
        self.away = recipe.offload is Offload.BOTH  # partitions of parameters, too
        self.norms: list[Tensor] = []  # norm_for_param_grads
        self.passes = 0
        of_name: Names = {}
        self.of_name = of_name
        self.coordinator = Coordinator(
            self.world, lambda module: _nested(module, of_name), overlap=self.overlap
        )
        self.parameters: list[Parameter] = []
        self.of_tensor: dict[int, Parameter] = {}
        self.in_leaves: set[int] = (
            set()
        )  # of a module whose parameters are gathered together (z3_leaf_module)
        self.modules: dict[tuple[int | None, str], Module] = {}
        self.layer: int | None = None
        self.in_backward = self.running = False
        self.sub_groups: list[list[Parameter]] = []
        self.flat: list[Tensor] = []
        self.bucket: Tensor | None = None
        self.in_bucket: list[Parameter] = []
        self.elements = 0
        self.linear = linear

    # -- what rests --------------------------------------------------------------------------------------

    def begin(self, part: Part) -> None:
        """A layer, or what is outside of them."""
        self.layer = part if isinstance(part, int) else None

    def parameter(self, shape: Shape, dtype: DType, kind: Category, trainable: bool) -> Tensor:
        """What rests of it is here where it is frozen, else in a flat buffer."""
        # zero.Init makes the model in its dtype, and what is added later keeps its own, which TRL asks not to
        # be another (trl 1.16, trainer/sft_trainer.py, autocast_adapter_dtype)
        keeps = kind is Category.ADAPTERS and self.trainer != "trl"
        tensor = Tensor(shape, dtype if keeps else self.computed(dtype), None)
        numel = prod(shape)
        partition = -(-numel // self.world)
        if not self.parameters:  # the embedding
            width = shape[-1]
            self.size = self.size or width * width
            self.coordinator.prefetch = int(0.9 * width * width) if self.prefetch is None else self.prefetch
            self.persistence = 10 * width if self.persistence is None else self.persistence
        assert self.persistence is not None
        kept = None
        if trainable:
            self.remember(tensor)
            self.kind = kind
        elif not self.away:
            with category(kind):
                kept = empty((partition,), tensor.dtype, "ds_tensor")
        ds_id = (kind is Category.ADAPTERS, len(self.parameters))
        persists = numel <= self.persistence
        one = Parameter(tensor, numel, partition, ds_id, kept, persists, away=self.away)
        self.parameters.append(one)
        self.of_tensor[id(tensor)] = one
        if state.tape.module.startswith(("mlp.experts.", "mlp.gate.")):
            self.in_leaves.add(id(tensor))
        self.of_name.setdefault((self.layer, state.tape.module), []).append(one)
        return tensor

    def optimized(self, groups: list[Group]) -> list[Group]:
        """``_create_fp16_partitions_with_defragmentation``, ``_setup_for_real_optimizer``."""
        tape = state.tape
        tape.begin(Phase.SETUP, "partitions", part=TapePart.LOADED)
        for group in self.grouped():
            elements = _SUB_GROUP
            for trained in group:
                if elements >= _SUB_GROUP:
                    self.sub_groups.append([])
                    elements = 0
                one = self.of_tensor[id(trained.tensor)]
                self.sub_groups[-1].append(one)
                elements += one.partition
        sizes = [sum(one.partition for one in sub) for sub in self.sub_groups]
        if not self.away:
            tape.module = _FLAT
            with category(self.kind):
                self.flat.append(empty((sum(sizes),), self.trained[0].tensor.dtype, "parameter"))
        for size in sizes:
            self.master(size, _MASTER)
        tape.module = _GRADIENTS
        with category(Category.COMMUNICATION):
            self.bucket = empty((self.size or 0,), self.dtype, "ipg_bucket")
        if not self.offloads:
            with category(Category.GRADIENTS):
                self.flat.append(empty((sum(sizes),), self.dtype, "grad_partitions_flat_buffer"))
        else:
            self.offload(sizes)
        tape.begin(Phase.SETUP, "norm", part=TapePart.RESTING)
        tape.module = "zero3"
        if not self.offloads:
            self.flat.append(scalar(bool_, "inf_or_nan_tracker"))
        self.keep_norm(None, None)
        return [Group(None, 1, [master]) for master in self.masters]

    def offload(self, sizes: list[int]) -> None:
        """What rests on the host, of sub-groups of these sizes. Partitions of trained parameters were there
        one by one before they were laid together (``_move_to_flat_buffer``)."""
        host, itemsize = self.on_host, self.dtype.itemsize
        if self.away:
            for one in self.parameters:
                host.pin(one.partition * one.tensor.dtype.itemsize)
            for group in self.grouped():
                host.pin(sum(self.of_tensor[id(one.tensor)].partition for one in group) * itemsize)
            for trained in self.trained:
                host.unpin(self.of_tensor[id(trained.tensor)].partition * itemsize)
        host.pin(sum(sizes) * itemsize)  # grad_partitions_flat_buffer
        for size in sizes:
            host.keep(4 * size)
            host.pin(4 * size)
            host.keep_states(4 * size)

    def gathered(self) -> None:
        """Small parameters stay whole from one step to the next (``_allgather_params_coalesced``)."""
        self.gather_small(sent=False)

    def gather_small(self, *, sent: bool = True) -> None:
        """The same, as a step does it at its end."""
        state.tape.module = "zero3"
        self.coordinator.gather_now((one for one in self.parameters if one.persists), sent=sent)

    def rehearsed(self, layers: int, of: int) -> None:
        """All is released, and the trace is known."""
        if layers < of:
            self.coordinator.order = list(self._of_all(layers, of))
        coordinator = self.coordinator
        self.norms.clear()
        self.passes = 0
        for one in self.parameters:
            one.tensor.storage = None
            one.status = PARTITIONED
            one.active.clear()
        for module in self.modules.values():
            module.recompute.clear()
        coordinator.in_flight.clear()
        coordinator.active.clear()
        coordinator.finish_trace()

    def _of_all(self, layers: int, of: int) -> Iterator[Module]:
        """The modules in the order that a shorter row of layers has shown."""
        before = 0
        for layer, run in groupby(self.coordinator.order, key=lambda one: one.key[0]):
            modules = list(run)
            if layer is None or layer == 0:
                yield from modules
            elif layer == layers - 1:
                yield from self._in(of - 1, modules)
            else:
                middle = range(layer, of - layers + layer + 1)
                for other in middle if before < layer else reversed(middle):
                    yield from self._in(other, modules)
            before = before if layer is None else layer
        self.layer = None

    def _in(self, layer: int, modules: list[Module]) -> Iterator[Module]:
        """The same modules of another layer."""
        self.layer = layer
        return (self.find(one.key[1]) for one in modules)

    # -- modules -----------------------------------------------------------------------------------------

    def leaf(self, name: str, module: Any) -> Any:
        """With its hooks."""
        key = self.layer, name
        if key not in self.of_name:
            # a tied one; or lora_A's, which lora.Linear reads: it is an external parameter of it
            weight = getattr(module, "down", None) or getattr(module, "weight", None)
            if weight is not None and id(weight) in self.of_tensor:
                self.of_name[key] = [self.of_tensor[id(weight)]]
        return Leaf(name, module, self)

    def find(self, name: str) -> Module:
        """A module of the layer that runs."""
        key = self.layer, name
        found = self.modules.get(key)
        if found is None:
            experts = (f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
            own = [key, *((self.layer, part) for part in (*experts, "mlp.gate.weight") if name == "mlp")]
            parameters = [one for part in own for one in self.of_name.get(part, ())]
            found = self.modules[key] = Module(key, parameters, name == "mlp" and bool(parameters))
        return found

    def module(self, name: str, run: Callable[..., Any], x: Tensor | None, *rest: Any) -> Any:
        """With its hooks."""
        one = self.find(name)
        x = self.enter(one, x)
        out = run(x, *rest)
        return self.leave(one, out)

    def read(self, weight: Tensor) -> None:
        """A parameter is read outside of its module's forward (``ZeROOrderedDict``): from the next pass on it
        is gathered for the module that reads it, too, which is the one with the head."""
        one = self.of_tensor[id(weight)]
        if not self.running or one.status == AVAILABLE:
            return
        self.find(self.outer()[-2]).parameters.append(one)
        self.coordinator.gather_now([one])

    def enter(self, one: Module, x: Tensor | None) -> Tensor | None:
        """The hooks before a module's forward."""
        module = state.tape.module
        self.coordinator.fetch(one, forward=True, in_backward=self.in_backward)
        state.tape.module = module
        one.grads_remaining = 0
        if x is None:
            return None
        out = x.detach()
        if x.node is not None:
            one.grads_remaining += 1
            if state.grad:
                node = Node(self._post_backward, x)
                node.python = True
                node.context = one
                attach(node, out)
        return out

    def leave(self, one: Module, out: Any) -> Any:
        """Those behind it."""
        self.coordinator.release(one, forward=True)
        return self._watched(one, out)

    def _watched(self, one: Module, out: Any) -> Any:
        if isinstance(out, dict):
            return {key: self._watched(one, part) for key, part in out.items()}
        if isinstance(out, tuple):
            parts = (self._watched(one, part) for part in out)
            return type(out)(*parts) if hasattr(out, "_fields") else tuple(parts)
        if not isinstance(out, Tensor):
            return out
        one.pre_backward += 1
        alias = out.detach()
        if state.grad and out.node is not None:
            node = Node(self._pre_backward, out)
            node.python = True
            node.context = one
            attach(node, alias)
        return alias

    def _pre_backward(self, node: Node, grad: Tensor) -> Any:
        one: Module = node.context
        if one.pre_backward > 0:
            self.coordinator.fetch(one, forward=False, in_backward=True)
            one.pre_backward -= 1
        return (grad,)

    def _post_backward(self, node: Node, grad: Tensor) -> Any:
        one: Module = node.context
        one.grads_remaining -= 1
        if not one.grads_remaining:
            if one.leaf:  # reduce_leaf_module_grads
                for parameter in one.parameters:
                    if isinstance(parameter.tensor.node, AccumulateGrad):
                        self.add(parameter)
            self.coordinator.release(one, forward=False)
        return (grad,)

    def before(self) -> None:
        """The modules around the layers are entered."""
        self.layer = None
        self.coordinator.reset_step()
        self.running = True
        for name in self.outer():
            self.enter(self.find(name), None)

    def outer(self) -> list[str]:
        """The model, what PEFT has around it, and its decoder."""
        return ["", "base_model", "base_model.model", "model"] if self.adapted else ["", "model"]

    def embed(self, run: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """With its hooks."""
        out: Tensor = self.module("model.embed_tokens", run, ids)
        return out

    def around(self, layer: int, run: Layer) -> Layer:
        """With its hooks, inside what is checkpointed."""

        def wrapped(modules: Leaves, hidden: Tensor, context: Context) -> Tensor:
            self.layer = layer
            one = self.find("")
            x = self.enter(one, hidden)
            assert x is not None
            out: Tensor = self.leave(one, run(modules, x, context))
            self.layer = None
            return out

        return wrapped

    def normed(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """The decoder is left."""
        self.layer = None
        out: Tensor = self.leave(self.find("model"), run(hidden))
        return out

    def after(self, loss: Any, logits: Tensor | None) -> Any:
        """The model is left."""
        self.running = False
        for name in reversed(self.outer()[:-1]):
            loss, logits = self.leave(self.find(name), (loss, logits))
        return loss, logits

    # -- backward ----------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """runtime/engine.py, ``DeepSpeedEngine.backward``."""
        self.in_backward = True
        scaled = ops.scale(loss)
        grad = empty((), loss.dtype, "ones_like")
        autograd.backward(scaled, grad)
        state.tape.begin(Phase.BACKWARD, "graph freed")
        del grad
        self.in_backward = False
        self.reduce()
        self.coordinator.release_leftovers()
        self.passes += 1
        del scaled

    def accumulated(self, node: AccumulateGrad) -> None:
        """Gradients of experts wait for their module's backward to end."""
        one = self.of_tensor[id(self.by_node[node].tensor)]
        if id(one.tensor) not in self.in_leaves:
            self.add(one)

    def add(self, one: Parameter) -> None:
        """``reduce_independent_p_g_buckets_and_remove_grads``."""
        node = one.tensor.node
        assert self.bucket is not None
        assert isinstance(node, AccumulateGrad)
        size = self.bucket.shape[0]
        if self.elements and self.elements + one.numel > size:
            self.reduce()
        if self.elements + one.numel <= size:
            node.grad = self.bucket.viewed(one.tensor.shape)
        self.in_bucket.append(one)
        self.elements += one.numel

    def reduce(self) -> None:
        """``__reduce_and_partition_ipg_grads``, ``reduce_scatter_coalesced``."""
        found = self.in_bucket
        if not found:
            return
        state.tape.module = "zero3"
        found.sort(key=lambda one: one.ds_id)
        laid = None
        with category(Category.COMMUNICATION), stream(REDUCING if self.overlap else state.stream):
            narrow = [self.narrowed(one) for one in found]
            if len(found) > 1 or found[0].numel % self.world:
                least = min(one.numel // one.partition for one in found)  # ranks before it have no padding
                padding = [
                    empty((missing,), self.dtype, "reduce_scatter_padding")
                    for rank in range(least, self.world)
                    for one in found
                    if (missing := min((rank + 1) * one.partition - one.numel, one.partition)) > 0
                ]
                count = sum(one.partition for one in found) * self.world
                laid = empty((count,), self.dtype, "reduce_scatter_coalesced")
                while padding:
                    padding.pop()
            if self.offloads:
                self.send(found)
        for one in found:
            node = one.tensor.node
            assert isinstance(node, AccumulateGrad)
            node.grad = None
        found.clear()
        self.elements = 0
        del narrow, laid

    def send(self, parameters: list[Parameter]) -> None:
        """``partition_grads``: each partition goes to the host and comes back for its norm, or with what was
        there before to be added to."""
        came = None
        for one in parameters:
            elements = min(one.partition, one.numel - self.rank * one.partition)
            if elements <= 0:
                continue
            if not self.passes:
                came = None
            with category(Category.GRADIENTS):
                came = empty((elements,), self.dtype, "_to_copy")
            if self.last:
                norm = vector_norm(elements, self.dtype, "_constant_buffered_norm2")
                square = scalar(float64, "_constant_buffered_norm2")
                del norm
                self.norms.append(scalar(float64, "_constant_buffered_norm2"))
                del square
                with category(Category.GRADIENTS):
                    wide = empty((elements,), float32, "_to_copy")
                del wide
        del came

    def narrowed(self, one: Parameter) -> Tensor | None:
        """What a gradient that no bucket took is sent as."""
        node = one.tensor.node
        assert isinstance(node, AccumulateGrad) and node.grad is not None
        return None if node.grad.dtype is self.dtype else empty(node.grad.shape, self.dtype, "_to_copy")

    # -- the step ----------------------------------------------------------------------------------------

    def update(self, recipe: Recipe, kept: State, loop: Loop[Tensor] | None) -> bool:
        """``DeepSpeedZeroOptimizer_Stage3.step``."""
        tape = state.tape
        tape.begin(Phase.OPTIMIZER, "norm")
        tape.module = "zero3"
        self.coordinator.release_all(self.parameters)
        self.passes = 0
        if self.offloads:
            self.update_on_host()
            return True
        norms = [self.grad_norm(sub) for sub in self.sub_groups]
        total = combine_grad_norm_groups(norms)
        is_invalid_grad_norm(total)
        current = scalar(float32, "_global_grad_norm")
        for number, (sub, master) in enumerate(zip(self.sub_groups, self.masters, strict=True)):
            size = master.shape[0]
            with category(Category.GRADIENTS):
                flattened = empty((size,), self.dtype, "flatten") if len(sub) > 1 else None
                grad = empty((size,), float32, "single_grad_partition")
            del flattened
            if self.clips:
                unscale(total)
            if not number:
                tape.begin(Phase.OPTIMIZER, "step", part=TapePart.UPDATE)
            self.optimize(master, grad, recipe, kept)
            del grad
        tape.begin(Phase.OPTIMIZER, "gather")
        self.gather_small()
        tape.begin(Phase.OPTIMIZER, "end")
        del total
        while norms:
            norms.pop()
        self.keep_norm(current, loop)
        return True

    def update_on_host(self) -> None:
        """The norm of each group is summed on the card (``complete_grad_norm_calculation_for_cpu_offload``);
        ``_post_step`` lets go of its parts."""
        name = "complete_grad_norm_calculation_for_cpu_offload"
        for sub in self.sub_groups:
            total = None
            for _ in sub:
                square = scalar(float64, name)
                total = total or scalar(float64, name)
                del square
            single = empty((1,), float32, name)
            total = scalar(float32, name)
            mask_nan_or_inf(total)
            del single, total
        self.norms.clear()
        state.tape.begin(Phase.OPTIMIZER, "gather")
        self.gather_small()
        state.tape.begin(Phase.OPTIMIZER, "end")

    def grad_norm(self, sub: list[Parameter]) -> Tensor:
        """``get_grad_norm_direct``."""
        name = "get_grad_norm_direct"
        grad_norms = [vector_norm(one.partition, self.dtype, name) for one in sub]
        stacked = empty((len(grad_norms),), float64, name)
        squares = empty(stacked.shape, float64, name)
        del stacked
        summed = scalar(float64, name)
        del squares
        total_norm = scalar(float64, name)
        magnitude = scalar(float64, name)
        norm_is_inf = scalar(bool_, name)
        del magnitude
        norm_is_nan = scalar(bool_, name)
        inf_or_nan = scalar(bool_, name)
        err = scalar(float32, name)
        wide = scalar(float64, name)
        masked = scalar(float64, name)
        del wide, total_norm, summed
        while grad_norms:
            grad_norms.pop()
        del norm_is_inf, norm_is_nan, inf_or_nan, err
        return masked


def _nested(module: Module, of_name: Names) -> list[Parameter]:
    """All parameters in a module, by its name."""
    layer, name = module.key
    name = name.removesuffix(".adapter")
    if layer is None and name in ("", "base_model", "base_model.model", "model"):
        return [one for key, own in of_name.items() if key[1] != "lm_head" or name != "model" for one in own]
    return [
        one
        for (of_layer, of), own in of_name.items()
        if of_layer == layer and (not name or of == name or of.startswith(name + "."))
        for one in own
    ]


class Leaf:
    """A leaf module as it is called."""

    __slots__ = ("_module", "_name", "_spread")

    def __init__(self, name: str, module: Any, spread: Zero3) -> None:
        self._name, self._module, self._spread = name, module, spread

    def __call__(self, x: Tensor) -> Any:
        """Through the hooks."""
        return self._spread.module(self._name, self._module, x)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name == "weight":
            self._spread.read(found)
        return found


# -- LinearFunctionForZeroStage3 (runtime/zero/linear.py), which F.linear is where the model is made ------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Its input is kept, whoever wants a gradient."""
    shape = (*x.shape[:-1], weight.shape[0])
    node = Node(_linear_backward, x, weight, bias) if tracked(x, weight, bias) else None
    folded = _folded(x)
    out = product(shape, x.dtype, "mm")
    del folded
    if node is not None:
        node.python = True
        node.saved = save(x), save(weight), None if bias is None else save(bias)
        attach(node, out)
    return out


def _linear_backward(node: Node, grad: Tensor) -> Any:
    x, weight, _bias = [None if saved is None else unpack(saved) for saved in node.saved]
    assert x is not None and weight is not None
    for_x = for_weight = for_bias = None
    if node.edges[0]:
        folded = _folded(grad)
        for_x = product(x.shape, grad.dtype, "mm")
        del folded
    if node.edges[1]:
        folds = _folded(grad), _folded(x)
        for_weight = product(weight.shape, grad.dtype, "mm")
        del folds
    if node.edges[2]:
        for_bias = empty((grad.shape[-1],), grad.dtype, "sum")
        split_sum(grad.shape)
    return for_x, for_weight, for_bias


def _folded(x: Tensor) -> Tensor:
    """``x.reshape(-1, x.shape[-1])``."""
    if x.strides is None or view_strides(x.shape, x.strides, (prod(x.shape[:-1]), x.shape[-1])) is not None:
        return x
    return clone(x)


# -- loading -----------------------------------------------------------------------------------------------


def _load(recipe: Recipe, coming: Coming) -> Iterator[LoadStep]:
    """Each parameter is made whole and divided (``zero.Init``), gathered once to be filled, once more when
    its hooks are made; between, partitions of trained ones are laid together on the host (``defragment``)."""
    temporary = coming.temporary
    found: dict[str, list[tuple[int, int]]] = {}
    for number, name, nbytes in coming.resting:
        found.setdefault(name, []).append((number, nbytes))
    own = (_FLAT, _MASTER, _GRADIENTS)
    nbytes_of = by_name(coming)
    names = sorted((name for name in nbytes_of if name not in own), key=place)
    trained = [name for name in names if name not in found]
    away = recipe.offload is Offload.BOTH
    wide = recipe.trainer == "trl" and recipe.dtype is DTypeName.FLOAT32
    partitions = []
    for name in names:
        if wide:  # what torch.empty makes is cast (zero_wrapper_for_fp_tensor_constructor)
            take, before = temporary(2 * nbytes_of[name])
            yield take
        take, made = temporary(nbytes_of[name])
        yield take
        if wide:
            yield "drop", before
        if name in found:
            yield from (("alloc", number) for number, _ in found[name])
        elif not away:
            take, number = temporary(-(-nbytes_of[name] // recipe.gpus))
            yield take
            partitions.append(number)
        yield "drop", made
    if recipe.trainer == "trl":
        yield from _gathered(names, nbytes_of, temporary)
    yield from (("drop", number) for number in partitions)
    yield "empty_cache", 0
    yield from (("alloc", number) for number, _ in found.get(_FLAT, ()))
    masters = found.get(_MASTER, ())
    for number, nbytes in masters:
        take, converted = temporary(nbytes)
        yield take
        yield "alloc", number
        yield "drop", converted
    if masters:
        take, buffer = temporary(max(nbytes for _, nbytes in masters))
        yield take
        yield "drop", buffer
    yield from (("alloc", number) for number, _ in found[_GRADIENTS])
    yield from _gathered(trained, nbytes_of, temporary)


def _gathered(names: list[str], nbytes_of: dict[str, int], temporary: Temporary) -> Iterator[LoadStep]:
    for name in names:
        take, number = temporary(nbytes_of[name])
        yield take
        yield "drop", number


STRATEGY = Strategy(Zero3, load=_load, folds=False, itemsize=2, rehearses=lambda _: True)
