"""Images of a traced batch: their tensors, and the values that a step's shapes depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memplan import families, towers
from memplan.asked.recipe import Recipe
from memplan.asked.spec import Vision
from memplan.errors import TraceError
from memplan.trace.known import Known


@dataclass(frozen=True, slots=True)
class Images:
    """The images of a batch of sequences of a length; ``token``: an image's in the vocabulary."""

    pictures: towers.Pictures
    length: int
    token: int

    def batch(self, made: dict[str, torch.Tensor], known: Known) -> dict[str, torch.Tensor]:
        """A batch with them. What says where they lie is known."""
        seen = self.pictures
        ids = [self.token * mark for mark in towers.places(seen, self.length)]
        known.tell(made["input_ids"], _host([ids] * seen.sequences))
        known.tell(made["attention_mask"], _host([[1] * self.length] * seen.sequences))
        for name, fed in towers.find(seen.vision.kind).batch(seen, self.length).items():
            made[name] = torch.zeros(fed.shape, dtype=getattr(torch, fed.dtype))
            if fed.value is not None:
                known.tell(made[name], _host(fed.value))
        return made

    def after_a_step(self, model: nn.Module) -> list[torch.Tensor]:
        """What a model keeps from step to step, put there."""
        kept = []
        for name, shape in families.find(self.pictures.vision.kind).stays(self.pictures.sequences).items():
            owner = next(module for module in model.modules() if hasattr(module, name))
            setattr(owner, name, torch.zeros(shape, dtype=torch.int64))
            kept.append(getattr(owner, name))
        return kept


def _host(value: Any) -> torch.Tensor:
    """A tensor with values."""
    with torch._C._DisableTorchDispatch():
        return torch.tensor(value, dtype=torch.int64)


def pictures_of(model: Any, recipe: Recipe) -> Images | None:
    """The images that a recipe has for a model. Raises TraceError for one that memplan knows no tower of."""
    if not recipe.images:
        return None
    vision = _vision(model)
    pictures = None if vision is None else towers.pictures(vision, recipe)
    if pictures is None:
        raise TraceError(f"memplan knows no vision tower of {type(model).__name__}: leave out images")
    return Images(pictures, recipe.seq_len, int(getattr(model.config, "image_token_id", 1)))


def unseen(model: Any, recipe: Recipe) -> set[nn.Parameter]:
    """The parameters of a tower that a batch of text passes by."""
    vision = None if recipe.images else _vision(model)
    if vision is None:
        return set()
    root = towers.find(vision.kind).root
    return {one for name, one in model.named_parameters() if name.startswith(f"{root}.")}


def _vision(model: Any) -> Vision | None:
    config = model.config.to_dict()
    return towers.read(str(config.get("model_type")), config, type(model).__name__)
