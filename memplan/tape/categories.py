"""What storages were for, told by where they were born and when they died."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from memplan.tape import Category, Phase, Tape


class Moment(NamedTuple):
    """When something happened. ``after_head``: at or past the output layer, or in its backward."""

    phase: Phase
    recomputing: bool
    after_head: bool


class Lives(Protocol):
    """A tape, with the moments at which its storages were born, and at which those died that did."""

    tape: Tape
    births: list[Moment]
    deaths: dict[int, Moment]


@dataclass
class Lived:
    """:class:`Lives`, as one reads a tape off a history."""

    tape: Tape
    births: list[Moment] = field(default_factory=list)
    deaths: dict[int, Moment] = field(default_factory=dict)


def categorise(recorder: Lives) -> None:
    """Give every storage of the step that is no gradient its category.

    - logits and loss: born at or after the output layer in forward; in backward, by the nodes that those
      operations left;
    - activations: born in forward and still there in backward, or born in recomputation and outliving it;
    - temporaries: the rest.
    """
    tape = recorder.tape
    for index, birth in enumerate(recorder.births):
        if birth.phase is Phase.SETUP or tape.categories[index] is not Category.TEMPORARIES:
            continue
        if birth.after_head:
            tape.categories[index] = Category.LOGITS_AND_LOSS
            continue
        death = recorder.deaths.get(index)
        saved_by_forward = birth.phase is Phase.FORWARD and (
            death is not None and death.phase is not Phase.FORWARD
        )
        saved_by_recomputation = (
            birth.phase is Phase.BACKWARD and birth.recomputing and not (death is None or death.recomputing)
        )
        if saved_by_forward or saved_by_recomputation:
            tape.categories[index] = Category.ACTIVATIONS
