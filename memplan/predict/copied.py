"""Like layers copied while the others are played, for strategies under which no two steps of a layer are the
same: what ZeRO does with a gradient goes by how much came before it (:attr:`Strategy.folds`).

All that a layer does by itself is alike, so the first layers and the last ones are played, and between them
a layer's events are those of a neighbour that was played, about storages of its own. Where a gradient
arrives, the strategy is called, with the parameter of the layer that it really is. Layers that turn out not
to be alike raise :class:`NotAlike`: then all have to be played. ``tests/test_zero.py`` plays all and
compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from memplan.shadow import autograd
from memplan.shadow.autograd import AccumulateGrad, Arrival, Node, attach
from memplan.shadow.tensor import Storage, Tensor, state
from memplan.tape import Phase, Segment

_BACK = 2  # layers that are played behind the copied ones: one is copied, the one behind it is its neighbour
_OWN, _BESIDE, _FORWARD, _BELOW = range(4)  # who made what an event is about

_Item = tuple[int, int, int]  # 0 for a birth and -1 for a death; who made it; which of these


class NotAlike(Exception):
    """Layers do otherwise than their neighbours."""


class _Piece(NamedTuple):
    """Events up to an arrival. ``births``: where they are on the tape that they are copied from."""

    items: list[_Item]
    births: list[int]
    arrival: Arrival | None


class Copied:
    """The copied layers of one forward pass and its backward. ``front``: layers that are played before them;
    ``trained``: the parameters of each layer that gradients arrive at."""

    def __init__(self, front: int, trained: list[list[Tensor]]) -> None:
        self.first, self.last = front, len(trained) - _BACK  # of those that are copied; the one behind them
        self.trained = trained
        self.forwards: dict[int, range] = {}  # what a layer's forward makes
        state.arrivals = []

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer < self.last

    # -- forward -----------------------------------------------------------------------------------------

    def forward(self, hidden: Tensor) -> Tensor:
        """All of them, behind the layer that is played before them, whose output this is; the last one's."""
        tape = state.tape
        before, segment = tape.segments[-2:]
        below, own = self._made(before, segment.start), self._made(segment, len(tape.events))
        self.forwards[self.first - 1] = own
        items = _items(tape.events[segment.start :], (own, range(0), range(0), below))
        if any(who == _BELOW for _, who, _ in items) and _kinds(below) != _kinds(own):
            raise NotAlike
        here = hidden.storage
        if here is None or here.index not in own or hidden.node is None:
            raise NotAlike
        out = own.index(here.index)
        self.goes = any(who == _BELOW for _, who, _ in items)  # a layer's input, in its forward
        self._only(items, _BELOW, out)
        node = Node(self._backward, hidden)
        if self.goes:
            here.events = []  # it is released in a copy
        else:
            node.saved = hidden
        for layer in range(self.first, self.last):
            tape.begin(Phase.FORWARD, "layer", layer)
            self.forwards[layer] = _born(own)
            made = self.forwards[layer], range(0), range(0), self.forwards[layer - 1]
            tape.events += [made[who][number] ^ flip for flip, who, number in items]
        node.scope = self.last - 1
        node.python = True
        result = Tensor(
            hidden.shape, hidden.dtype, _adopted(self.forwards[self.last - 1][out]), hidden.strides
        )
        attach(node, result)
        return result

    # -- backward ----------------------------------------------------------------------------------------

    def _backward(self, node: Node, grad: Tensor) -> Any:
        tape = state.tape
        beside, segment, here = tape.segments[-3:]
        played = [(one.phase, one.layer) for one in (beside, segment, here)]
        if played != [(Phase.BACKWARD, self.last + place) for place in (1, 0, -1)]:
            raise NotAlike
        self._finish_forward()
        pieces, own = self._template(segment, beside)
        state.arrivals = None
        items = [item for piece in pieces for item in piece.items]
        storage = grad.storage
        assert storage is not None
        out = own.index(storage.index) if storage.index in own else None
        self._only(items, _BESIDE, out)
        if any(who == _BESIDE for _, who, _ in items) != (out is not None):
            raise NotAlike
        if not self.goes:
            input_ = node.saved.storage
            number = self.forwards[self.first - 1].index(input_.index)
            self._only(items, _BELOW, number)
            if not any(who == _BELOW for _, who, _ in items):
                raise NotAlike
            input_.events = []
        elif any(who == _BELOW for _, who, _ in items):
            raise NotAlike
        if out is not None:
            storage.events = []
        made = own
        for layer in range(self.last - 1, self.first - 1, -1):
            if layer < self.last - 1:
                tape.begin(Phase.BACKWARD, "backward", layer)
            made = self._layer(layer, pieces, made)
        return (grad if out is None else Tensor(grad.shape, grad.dtype, _adopted(made[out]), grad.strides),)

    def _layer(self, layer: int, pieces: list[_Piece], beside: list[int]) -> list[int]:
        """One layer's backward; what it makes."""
        tape = state.tape
        own: list[int] = []
        made = own, beside, self.forwards[layer], self.forwards[layer - 1]
        for items, births, arrival in pieces:
            own += _born(births)
            tape.events += [made[who][number] ^ flip for flip, who, number in items]
            if arrival is not None:
                node = self.trained[layer][self._places[arrival.node]].node
                assert isinstance(node, AccumulateGrad)
                tape.module, state.category = node.module, node.category
                at = own[self._grads[arrival.storage]]
                node.grads = [Tensor(arrival.shape, arrival.dtype, _adopted(at), arrival.strides)]
                autograd.accumulate_grad(node)
        return own

    def _template(self, segment: Segment, beside: Segment) -> tuple[list[_Piece], list[int]]:
        """What a layer's backward does by itself, and the storages that it makes."""
        tape, last = state.tape, self.last
        arrivals = [one for one in state.arrivals or () if segment.start <= one.start < segment.stop]
        own, other = (self._alone(one) for one in (segment, beside))
        if own != other:
            raise NotAlike
        births, others = (
            [tape.events[at] for at in self._positions(one) if tape.events[at] >= 0]
            for one in (segment, beside)
        )
        numbers = {birth: number for number, birth in enumerate(births)}
        self._grads = {one.storage: numbers[one.storage] for one in arrivals if one.storage in numbers}
        self._places = {parameter.node: place for place, parameter in enumerate(self.trained[last])}
        if len(self._grads) < len(arrivals) or any(one.node not in self._places for one in arrivals):
            raise NotAlike  # one gradient for two, or another layer's
        for one in arrivals:  # in which nothing goes but gradients, and what is made there
            for event in tape.events[one.start : one.stop]:
                if ~event in numbers and ~event not in self._grads:
                    raise NotAlike
        known = births, others, self.forwards[last], self.forwards[last - 1]
        pieces = []
        start = segment.start
        for one_or_none in (*arrivals, None):
            stop = segment.stop if one_or_none is None else one_or_none.start
            events = tape.events[start:stop]
            if any(~event in self._grads for event in events):
                raise NotAlike
            pieces.append(
                _Piece(_items(events, known), [event for event in events if event >= 0], one_or_none)
            )
            start = segment.stop if one_or_none is None else one_or_none.stop
        return pieces, births

    def _positions(self, segment: Segment) -> list[int]:
        """Where a layer's events are that no arrival makes."""
        inside = {
            at
            for one in state.arrivals or ()
            if segment.start <= one.start < segment.stop
            for at in range(one.start, one.stop)
        }
        return [at for at in range(segment.start, segment.stop) if at not in inside]

    def _alone(self, segment: Segment) -> list[Any]:
        tape = state.tape
        events = [tape.events[at] for at in self._positions(segment)]
        return [
            (tape.sizes[event], tape.operations[event], tape.modules[event])
            if event >= 0
            else -tape.sizes[~event]
            for event in events
        ]

    def _finish_forward(self) -> None:
        """What a layer's forward makes is called as it is where the layers behind it were played, too."""
        tape, last = state.tape, self.last
        segments = [one for one in tape.segments if one.phase is Phase.FORWARD and one.layer == last]
        self.forwards[last] = played = self._made(segments[-1], segments[-1].stop)
        template = next(
            one
            for one in reversed(tape.segments)
            if one.phase is Phase.FORWARD and one.layer == self.first - 1
        )
        if self._alone(segments[-1]) != self._alone(template):
            raise NotAlike
        categories = tape.categories[played.start : played.stop]
        for layer in range(self.first - 1, last):
            tape.categories[self.forwards[layer].start : self.forwards[layer].stop] = categories

    def _made(self, segment: Segment, stop: int) -> range:
        births = [event for event in state.tape.events[segment.start : stop] if event >= 0]
        return range(births[0], births[-1] + 1) if births else range(0)

    @staticmethod
    def _only(items: list[_Item], who: int, number: int | None) -> None:
        """A layer leaves its neighbour one tensor, which it was given."""
        if any(maker == who and which != number for _, maker, which in items):
            raise NotAlike


def _items(events: list[int], makers: tuple[Sequence[int], ...]) -> list[_Item]:
    """Events by who made what they are about."""
    known = {storage: (who, number) for who, made in enumerate(makers) for number, storage in enumerate(made)}
    try:
        return [(0, *known[event]) if event >= 0 else (-1, *known[~event]) for event in events]
    except KeyError:
        raise NotAlike from None


def _kinds(births: range) -> list[Any]:
    tape = state.tape
    return [(tape.sizes[index], tape.operations[index], tape.modules[index]) for index in births]


def _born(births: range | list[int]) -> range:
    """The same storages once more, without their events."""
    tape = state.tape
    start = len(tape.sizes)
    if births:
        first, stop = births[0], births[-1] + 1
        columns: tuple[list[Any], ...] = (tape.sizes, tape.categories, tape.operations, tape.modules)
        for column in columns:
            column += column[first:stop]
        moved = start - first
        tape.products.update([index + moved for index in tape.products.intersection(births)])
        if not tape.streams.keys().isdisjoint(births):
            raise NotAlike
    return range(start, len(tape.sizes))


def _adopted(index: int) -> Storage:
    """A storage that is on the tape already."""
    found = Storage.__new__(Storage)
    found.index, found.events = index, state.tape.events
    return found
