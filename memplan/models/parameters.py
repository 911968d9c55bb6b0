"""A recipe made definite for a model, and the parameters that it counts."""

from __future__ import annotations

from functools import lru_cache

from memplan.errors import RecipeError
from memplan.models import blueprint, targets
from memplan.recipe import Attention, Mode, Recipe
from memplan.spec import ModelSpec


def resolve_recipe(spec: ModelSpec, recipe: Recipe) -> Recipe:
    """``recipe.resolved()`` with what depends on the model, checked against it. Raises RecipeError."""
    attn = recipe.attn
    if spec.model_type == "gemma2":
        # transformers refuses SDPA for it: soft-capping has no place in the fused kernels.
        if attn is Attention.SDPA:
            raise RecipeError(
                "Gemma 2 has no sdpa attention in transformers, for it caps its attention logits; use --attn eager"
            )
        attn = attn or Attention.EAGER
    resolved = recipe.model_copy(update={"attn": attn}).resolved()
    if resolved.mode is not Mode.FULL:
        targets.check(resolved, _adapted(spec, resolved), _linear_shapes(spec), _names(spec))
    return resolved


@lru_cache(maxsize=64)
def _adapted_by(spec: ModelSpec, target_modules: str | tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {
        name: shape for name, shape in _linear_shapes(spec).items() if targets.is_target(target_modules, name)
    }


def _adapted(spec: ModelSpec, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Full names and shapes of the linear modules that get an adapter."""
    return _adapted_by(spec, recipe.target_modules)


def _linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Full names and shapes of the linear modules of every layer, and of the head."""
    kinds = {
        sparse: [
            (name, module.parameters["weight"])
            for name, module in blueprint.layer(spec, sparse).items()
            if module.kind == "linear"
        ]
        for sparse in ((False, True) if spec.num_experts else (False,))
    }
    shapes = {
        f"model.layers.{index}.{name}": shape
        for index in range(spec.num_hidden_layers)
        for name, shape in kinds[blueprint.is_sparse(spec, index)]
    }
    shapes["lm_head"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def _names(spec: ModelSpec) -> list[str]:
    return ["lm_head", *blueprint.outside(spec), *blueprint.layer(spec, bool(spec.num_experts))]


def count(spec: ModelSpec, recipe: Recipe) -> tuple[int, int, int]:
    """Parameters of the base model, of the adapters, and the trainable ones."""
    base = blueprint.count_parameters(spec)
    if recipe.mode is Mode.FULL:
        return base, 0, base
    adapted = _adapted(spec, recipe)
    adapters = recipe.r * sum(map(sum, adapted.values()))
    if recipe.use_dora:
        adapters += sum(shape[0] for shape in adapted.values())
    return base, adapters, adapters
