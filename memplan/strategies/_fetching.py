"""What ZeRO-3 gathers when (deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py and
partition_parameters.py)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from memplan.shadow.tensor import DType, Tensor, category, empty, state, stream
from memplan.tape import Category

_GATHERING = 2  # a stream: __allgather_stream
_LIVE = 1_000_000_000  # elements: stage3_max_live_parameters
_REUSE = 1_000_000_000  # stage3_max_reuse_distance
PARTITIONED, IN_FLIGHT, AVAILABLE = range(3)  # ZeroParamStatus


@dataclass(slots=True, eq=False)
class Parameter:
    """``tensor`` is computed with and has memory while it is gathered; ``kept``: the partition, where it is
    on the card and not one of many in a flat buffer."""

    tensor: Tensor
    numel: int
    partition: int
    ds_id: tuple[bool, int]
    kept: Tensor | None
    persists: bool = False
    away: bool = False  # the partition is on the host
    status: int = PARTITIONED
    active: set[Module] = field(default_factory=set)  # ds_active_sub_modules
    fetched_for: int = -1  # __most_recent_step_id_param_fetched_for


@dataclass(slots=True, eq=False)
class Module:
    """A module that is called, and its own parameters; of a ``leaf`` those of all modules in it."""

    key: tuple[int | None, str]  # its layer and name
    parameters: list[Parameter]
    leaf: bool = False
    grads_remaining: int = 0
    pre_backward: int = 0  # applied_pre_backward_ref_cnt
    recompute: list[Parameter] = field(default_factory=list)


class One:
    """``AllGatherHandle``: of a parameter that is gathered in its place. ``sent``: the partition, if it came
    from the host; NCCL's work keeps it to the end (where its watchdog sees that first, not so long)."""

    __slots__ = ("parameter", "sent")

    def __init__(self, parameter: Parameter, sent: Tensor | None) -> None:
        self.parameter, self.sent = parameter, sent

    def wait(self) -> None:
        """It is there."""
        self.sent = None
        self.parameter.status = AVAILABLE


class Coalesced:
    """``AllGatherCoalescedHandle``, one a dtype: gathered together, and copied out when the first is waited
    for."""

    __slots__ = ("flat", "parameters")

    def __init__(self, parameters: list[Parameter], flat: dict[DType, Tensor]) -> None:
        self.parameters, self.flat = parameters, flat

    def wait(self) -> None:
        """All of them are."""
        for parameter in self.parameters:
            tensor = parameter.tensor
            with category(Category.COMMUNICATION):
                tensor.storage = empty(tensor.shape, tensor.dtype, "all_gather_copy_out").storage
            parameter.status = AVAILABLE
        self.parameters = []


class Coordinator:
    """``PartitionedParameterCoordinator``. ``prefetch``: stage3_prefetch_bucket_size; ``nested``: all
    parameters in a module."""

    def __init__(
        self, world: int, nested: Callable[[Module], Collection[Parameter]], *, overlap: bool = True
    ) -> None:
        self.world, self.nested = world, nested
        self.stream = _GATHERING if overlap else 0
        self.prefetch = 0
        self.in_flight: dict[Parameter, One | Coalesced] = {}
        self.order: list[Module] = []
        self.complete = False
        self.queue: deque[tuple[Parameter, int]] = deque()
        self.traced: list[tuple[Parameter, int]] = []
        self.uses: dict[Parameter, list[int]] = {}  # steps
        self.before: list[int] = []  # elements of the parameters of all steps before each
        self.fetched: set[Parameter] = set()
        self.step = 0
        self.available = 0
        self.active: dict[Module, None] = {}  # __active_backward_submodules

    def finish_trace(self) -> None:
        """``construct_parameter_trace_from_module_trace``: from here on modules come in this order."""
        self.complete = True
        total = 0
        for step, module in enumerate(self.order):
            self.before.append(total)
            for parameter in sorted(module.parameters, key=lambda one: one.ds_id):
                self.traced.append((parameter, step))
                if not module.leaf:
                    self.uses.setdefault(parameter, []).append(step)
                    total += parameter.numel

    def reset_step(self) -> None:
        """A pass through the model begins. What the first one has shown is the order of all others."""
        if self.order and not self.complete:
            self.finish_trace()
        for parameter, handle in self.in_flight.items():
            handle.wait()
            self.release_parameter(parameter)
        self.in_flight.clear()
        self.queue = deque(self.traced)
        for parameter in self.fetched:
            parameter.fetched_for = -1
        self.fetched.clear()
        self.step = self.available = 0

    def fetch(self, module: Module, *, forward: bool, in_backward: bool) -> None:
        """``fetch_sub_module``."""
        state.tape.module = "zero3"
        if not self.complete:
            self.order.append(module)
        if not forward:
            self.active[module] = None
        wanted = module.parameters
        self.gather([one for one in wanted if one.status == PARTITIONED])
        for one in wanted:
            one.active.add(module)
            if forward and in_backward and self.active and one.tensor.node is None:
                owner = next(reversed(self.active))
                if one not in owner.recompute:
                    owner.recompute.append(one)
                one.active.add(owner)
            if one in self.in_flight:
                with stream(self.stream):
                    self.in_flight.pop(one).wait()
        if self.complete:
            missing = sum(one.fetched_for < self.step for one in wanted)
            for _ in range(missing):
                self.pop()
            self.fetch_ahead()
        self.step += 1

    def pop(self) -> Parameter:
        """The next of the queue, for the last step up to where it is known to be needed."""
        one, step = self.queue.popleft()
        one.fetched_for = max(one.fetched_for, step)
        self.fetched.add(one)
        return one

    def fetch_ahead(self) -> None:
        """Gather for the modules to come."""
        most = min(_LIVE - self.available, self.prefetch)
        ahead: list[Parameter] = []
        elements = 0
        while self.queue and elements < most:
            one = self.pop()
            if one.status == PARTITIONED and one not in ahead:
                ahead.append(one)
                elements += one.numel
        self.gather(ahead)

    def gather(self, parameters: list[Parameter]) -> None:
        """``__all_gather_params``, ``all_gather_coalesced``."""
        if not parameters:
            return
        self.available += sum(one.numel for one in parameters)
        handle: One | Coalesced
        with category(Category.COMMUNICATION), stream(self.stream):
            if len(parameters) == 1:
                one = parameters[0]
                one.tensor.storage = self.whole(one).storage
                handle = One(one, _partition(one) if one.away else None)
            else:
                parameters.sort(key=lambda one: (one.tensor.dtype.name, one.ds_id))
                flat = {}
                for dtype in dict.fromkeys(one.tensor.dtype for one in parameters):
                    count = sum(one.partition for one in parameters if one.tensor.dtype is dtype) * self.world
                    flat[dtype] = empty((count,), dtype, "all_gather_coalesced")
                    own = [_partition(one) for one in parameters if one.away and one.tensor.dtype is dtype]
                    while own:
                        own.pop()
                handle = Coalesced(parameters, flat)
        for one in parameters:
            one.status = IN_FLIGHT
            self.in_flight[one] = handle

    def gather_now(self, parameters: Iterable[Parameter], *, sent: bool = True) -> None:
        """``param.all_gather()`` (``_allgather_params_coalesced``); of what is ``sent``, or just there."""
        parameters = list(parameters)
        with category(Category.COMMUNICATION):
            own = [_partition(one) for one in parameters if one.away and sent]
            for one in parameters:
                one.tensor.storage = self.whole(one).storage
                one.status = AVAILABLE
            del own

    def whole(self, one: Parameter) -> Tensor:
        """A parameter in a buffer of its own."""
        return empty((one.partition * self.world,), one.tensor.dtype, "all_gather")

    def release(self, module: Module, *, forward: bool) -> None:
        """``release_sub_module``."""
        wanted = [one for one in module.parameters if not self.complete or self.goes(one, module.leaf)]
        every: Iterable[Parameter] = module.parameters
        if not forward:
            wanted += [one for one in module.recompute if not one.persists]
            every = dict.fromkeys([*module.parameters, *module.recompute])
            module.recompute.clear()
            self.active.pop(module, None)
        for one in every:
            one.active.discard(module)
            if one in wanted:
                self.release_parameter(one)

    def goes(self, one: Parameter, leaf: bool) -> bool:
        """``__params_to_release``: not if it is needed again soon. What is between counts by modules' own
        parameters, or by all in them where it is a leaf that is released."""
        if one.persists or one.fetched_for > self.step:
            return False
        if leaf:
            passed = 0
            for module in self.order[self.step :]:
                if passed >= _REUSE:
                    break
                inside = self.nested(module)
                if one in inside:
                    return False
                passed += sum(other.numel for other in inside)
            return True
        here = self.before[self.step] if self.step < len(self.before) else 0
        again = next((step for step in self.uses.get(one, ()) if step >= self.step), None)
        return again is None or self.before[again] - here >= _REUSE

    def release_leftovers(self) -> None:
        """``release_backward_leftovers``."""
        while self.active:
            module, _ = self.active.popitem()
            for one in dict.fromkeys([*module.parameters, *module.recompute]):
                one.active.discard(module)
                if not one.persists:
                    self.release_parameter(one)
            module.recompute.clear()

    def release_parameter(self, one: Parameter) -> None:
        """``__release_param``."""
        if one.status == AVAILABLE and not one.active:
            one.tensor.storage = None
            one.status = PARTITIONED
            self.available -= one.numel

    def release_all(self, parameters: Iterable[Parameter]) -> None:
        """``release_and_reset_all``."""
        for one in parameters:
            if one in self.in_flight:
                self.in_flight.pop(one).wait()
            one.active.clear()
            self.release_parameter(one)


def _partition(one: Parameter) -> Tensor:
    """One that comes from the host to be sent."""
    return empty((one.partition,), one.tensor.dtype, "_to_copy")
