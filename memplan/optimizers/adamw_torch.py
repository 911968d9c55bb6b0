"""torch's AdamW with foreach (torch/optim/adam.py ``_multi_tensor_adam``, 2.13)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.asked.recipe import Recipe
from memplan.optimizers import Group, Optimizer, State
from memplan.optimizers._lists import by_decay, release
from memplan.optimizers._torch import moments
from memplan.shadow.tensor import Storage, state
from memplan.tape import Phase

if TYPE_CHECKING:
    import torch


def _real(parameters: list[dict[str, Any]], model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    from torch.optim import AdamW

    return AdamW(parameters, lr=1e-4)


def _step(groups: list[Group], kept: State) -> None:
    """``_multi_tensor_adam``: square roots of all second moments at once, one parameter group and dtype at a
    time; the name that holds a dtype's list keeps it until the next one's is there."""
    for name, chosen in by_decay(groups):
        roots: list[tuple[int | None, list[Storage]]] = []
        before = ""
        for dtype in reversed(list(dict.fromkeys(p.dtype for _, parameters in chosen for p in parameters))):
            earlier, roots = roots, []
            for layer, parameters in chosen:
                wanted = [parameter for parameter in parameters if parameter.dtype is dtype]
                if wanted:
                    state.tape.begin(Phase.OPTIMIZER, f"square roots, {name}, {dtype}", layer)
                    roots.append(
                        (layer, [Storage(parameter.nbytes, "_foreach_sqrt") for parameter in wanted])
                    )
            release(earlier, f"free square roots, {name}{before}")
            before = f", {dtype}"
        release(roots, f"free square roots, {name}{before}")


OPTIMIZER = Optimizer(moments, _real, _step)
