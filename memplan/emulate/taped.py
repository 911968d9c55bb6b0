"""A step of a program on a card that is not there, as a tape: what hook/memplan_history.py wrote of it."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from memplan.errors import MemplanError
from memplan.tape import Category, Part, Phase, Tape
from memplan.tape.categories import Lived, Moment, categorise
from memplan.tape.modules import layer_of, plain_name

_HEAD = " past the head"
_PHASES = {"backward": Phase.BACKWARD, "recomputation": Phase.BACKWARD, "update": Phase.OPTIMIZER}


class _Step(BaseModel):
    """``before``: address, bytes, module, name and category of what is there; ``events``: address, bytes (0:
    it is released), phase, module and line; ``gradients``: where they lie when the optimizer begins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: tuple[tuple[int, NonNegativeInt, str, str, str], ...]
    events: tuple[tuple[int, NonNegativeInt, str, str, str], ...]
    gradients: tuple[int, ...]


def read_step(folder: Path) -> Tape | None:
    """The last step of the process that allocated the most; None if none took one. Raises MemplanError for a
    file that the program did not write so."""
    try:
        found = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.step"))]
        steps = [step for step in (_Step.model_validate(one) for one in found if one) if step.events]
    except (OSError, ValueError, ValidationError) as error:
        raise MemplanError("what the program wrote of its last step can't be read") from error
    return max(map(_tape, steps), key=lambda tape: sum(tape.sizes), default=None)


def _tape(step: _Step) -> Tape:
    lived = Lived(Tape(provenance="emulated"))
    tape, live = lived.tape, dict[int, int]()
    gradients = _last(step)
    tape.begin(Phase.SETUP, "before", part=Part.RESTING)
    for address, size, module, name, category in step.before:
        tape.module = plain_name(module)
        what = Category(category) if category else Category.TEMPORARIES
        live[address] = tape.alloc(size, name or "unattributed", what)
        lived.births.append(Moment(Phase.SETUP, False, False))
    opened: tuple[Phase, str, int | None] | None = None
    for position, (address, size, where, module, line) in enumerate(step.events):
        phase, layer = _PHASES.get(where, Phase.FORWARD), layer_of(module)
        head = where.endswith(_HEAD) or (where == "backward" and layer is None)
        moment = Moment(phase, where == "recomputation", head)
        if opened != (here := (phase, _name(phase, layer, head), layer)):
            opened = here
            tape.begin(*here, Part.UPDATE if phase is Phase.OPTIMIZER else Part.STEP)
        if size:
            tape.module = plain_name(module)
            category = Category.GRADIENTS if position in gradients else Category.TEMPORARIES
            live[address] = tape.alloc(size, line, category)
            lived.births.append(moment)
        elif address in live:
            index = live.pop(address)
            lived.deaths[index] = moment
            tape.free(index)
    tape.finish()
    categorise(lived)
    return tape


def _name(phase: Phase, layer: int | None, head: bool) -> str:
    """What a segment is called."""
    if phase is Phase.OPTIMIZER:
        return "step"
    if layer is not None:
        return "layers"
    return "head" if head else "embedding"


def _last(step: _Step) -> set[int]:
    """The numbers of the events that made the gradients that the optimizer found: the last ones before it at
    their addresses."""
    wanted, found = set(step.gradients), dict[int, int]()
    for position, (address, size, where, _, _) in enumerate(step.events):
        if where == "update":
            break
        if size and address in wanted:
            found[address] = position
    return set(found.values())
