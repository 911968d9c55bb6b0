"""How a model comes onto the card whose step somebody else wrote: as memplan predicts it, of the storages
that the other's tape has. A trace begins with a model that is there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.tape import Part, Tape

# the parts of a quantised weight, which are the module's own in a trace; what PEFT wraps it in
_PART = re.compile(r"\.(?:weight|bias|absmax|quant_map|offset|nested_absmax|nested_quant_map)$")
_WRAPPER = re.compile(r"\.(?:base_layer|default|original_module)(?=\.|$)")


def loading_of(spec: ModelSpec, recipe: Recipe, tape: Tape) -> Callable[[int | None], Tape] | None:
    """The loading tape for a card of so many bytes, of an unfolded ``tape`` of a step of ``recipe``
    (resolved); None where its storages are not those that memplan knows by module and size."""
    from memplan.predict.loading import loading
    from memplan.predict.step import write_long_tape

    ours = write_long_tape(spec, recipe)
    there = _alike(ours, tape)
    if there is None:
        return None
    return lambda capacity: _renumbered(loading(spec, recipe, ours, capacity), len(ours.sizes), tape, there)


def _alike(ours: Tape, theirs: Tape) -> dict[int, int] | None:
    """Their storage for each of ours that loading brings: the next of the same module and size."""
    waiting: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, name in reversed(_brought(theirs)):
        waiting[name, theirs.sizes[index]].append(index)
    found = {}
    for index, name in _brought(ours):
        alike = waiting[name, ours.sizes[index]]
        if not alike:
            return None
        found[index] = alike.pop()
    return None if any(waiting.values()) else found


def _brought(tape: Tape) -> list[tuple[int, str]]:
    """The storages that loading brings, with the module that each belongs to."""
    found = []
    for segment in tape.segments:
        prefix = "" if segment.layer is None else f"model.layers.{segment.layer}."
        if segment.part is Part.LOADED:
            births = (event for event in tape.events[segment.start : segment.stop] if event >= 0)
            found += [(event, _owner(prefix + tape.modules[event])) for event in births]
    return found


def _owner(name: str) -> str:
    return _WRAPPER.sub("", _PART.sub("", name))


def _renumbered(loading: Tape, ours: int, step: Tape, there: dict[int, int]) -> Tape:
    """``loading``, whose first so many storages are ``ours``, of the storages of ``step``."""
    first = len(step.sizes)

    def number(index: int) -> int:
        return there[index] if index < ours else first + index - ours

    columns = ("sizes", "categories", "operations", "modules")
    result = Tape(
        step.provenance, **{name: getattr(step, name) + getattr(loading, name)[ours:] for name in columns}
    )
    result.events = [number(event) if event >= 0 else ~number(~event) for event in loading.events]
    result.segments = [replace(segment) for segment in loading.segments]
    result.finish()
    return result
