"""Which of the ranks that share a step are alike."""

from __future__ import annotations

from memplan import strategies
from memplan.asked.recipe import Mode, Recipe
from memplan.asked.spec import ModelSpec
from memplan.predict import blueprint


def alike(spec: ModelSpec, recipe: Recipe) -> list[tuple[int, int]]:
    """The first rank of each kind and how many there are of it, the one with the most first. Ranks differ
    where a strategy divides parameters by rows and there are fewer in the last parts."""
    world = recipe.gpus
    strategy = strategies.of(recipe)
    if strategy is None or not strategy.shards or strategy.flat:
        return [(0, world)]
    shapes = blueprint.named_shapes(spec).values()
    rows = {shape[0] for shape in shapes}
    if recipe.mode is not Mode.FULL:
        rows.add(recipe.r)
        for experts, outputs, _ in (shape for shape in shapes if len(shape) == 3):
            rows |= {outputs, experts * recipe.r, 2 * experts * recipe.r}
    kinds: dict[tuple[int, ...], list[int]] = {}
    for rank in range(recipe.shards):
        kinds.setdefault(tuple(_share(count, recipe.shards, rank) for count in sorted(rows)), []).append(rank)
    return [(ranks[0], len(ranks) * world // recipe.shards) for ranks in kinds.values()]


def _share(rows: int, world: int, rank: int) -> int:
    """``torch.chunk``: equal parts but for the last ones."""
    part = -(-rows // world)
    return max(min(part, rows - rank * part), 0)
