"""What is asked of a model, once, and what follows from it when somebody wants to know."""

from __future__ import annotations

from dataclasses import dataclass, field

from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.device.fit import Run
from memplan.planning.predicted import predicted_run


@dataclass
class Study:
    """Runs of a model by recipe (resolved) and by the card that they are written for, each written and
    simulated once: a plan, its verdicts and the advice for several cards ask about the same ones."""

    spec: ModelSpec
    _runs: dict[tuple[Recipe, Card | None], Run] = field(default_factory=dict)

    def run(self, recipe: Recipe, card: Card | None = None) -> Run:
        """The whole run, for the allocator; ``card`` where other kernels run than on the reference card."""
        key = recipe, card
        if key not in self._runs:
            self._runs[key] = predicted_run(self.spec, recipe, card)
        return self._runs[key]
