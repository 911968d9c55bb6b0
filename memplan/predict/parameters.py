"""A recipe made definite for a model, and the parameters that it counts."""

from __future__ import annotations

import re
from functools import lru_cache

from memplan import adapters, families, optimizers, stacks, strategies, towers
from memplan.asked.options import TARGET_PRESETS
from memplan.asked.recipe import ZERO, Batches, DTypeName, Mode, QuantType, Recipe
from memplan.asked.spec import ModelSpec
from memplan.errors import RecipeError
from memplan.predict import blueprint, targets


def resolve_recipe(spec: ModelSpec, recipe: Recipe) -> Recipe:
    """``recipe.resolved()`` with what depends on the model, checked against it. Raises RecipeError."""
    recipe = _as_stored(spec, recipe)
    attn = families.find(spec.model_type).attention(recipe.attn)
    resolved = recipe.model_copy(update={"attn": attn}).resolved()
    if recipe.momentum and not optimizers.find(recipe.optimizer).momentum:
        raise RecipeError(f"{recipe.optimizer} has no momentum: leave it out, or use the optimizer sgd")
    if resolved.parallel is not None:
        check_several(spec)
    if resolved.images:
        _check_images(spec, resolved)
    if resolved.dtype is DTypeName.FLOAT16 and not families.find(spec.model_type).float16:
        raise RecipeError(
            f"{spec.architecture} in float16 is not planned, for transformers keeps its norms in float32 "
            "then: give --dtype bfloat16"
        )
    if resolved.loss == "liger" and not families.find(spec.model_type).liger:
        raise RecipeError(
            f"Liger-Kernel has no fused loss for {spec.architecture} that runs with transformers 5.23: use "
            "the standard loss"
        )
    away = resolved.parallel == "fsdp2" and resolved.offload is not None and resolved.mode is not Mode.FULL
    if away and resolved.loss == "chunked" and not spec.tie_word_embeddings:
        raise RecipeError(
            "TRL's fused loss (1.16) fails with adapters whose base FSDP2 keeps on the host, but where the "
            "output layer is the embedding: it gathers what NCCL can't send; use --trainer peft, or leave "
            "out --offload"
        )
    if resolved.parallel == "zero3" and spec.model_type == "mixtral":
        # its router comes before its experts, which is the order in which their gradients are summed
        raise RecipeError("Mixtral under ZeRO-3 is not planned: use --parallel zero2 or fsdp2")
    told_apart = stacks.find(resolved.trainer).packed
    if resolved.batches is Batches.PACKED and told_apart and "linear_attention" in spec.layer_types:
        raise RecipeError(
            f"{spec.architecture} can't keep packed sequences apart without flash-linear-attention and "
            "causal-conv1d, which memplan doesn't play: give --batches full or padded"
        )
    if resolved.mode is not Mode.FULL:
        _check_experts(spec, resolved)
        _check_tower(spec, resolved)
        targets.check(resolved, _adapted(spec, resolved), _linear_shapes(spec), _names(spec))
    strategy = strategies.of(resolved)
    if strategy is not None and strategy.check is not None:
        strategy.check(spec, resolved, () if resolved.mode is Mode.FULL else _adapted(spec, resolved))
    return resolved


def _check_images(spec: ModelSpec, recipe: Recipe) -> None:
    """What can't be planned with images."""
    if spec.vision is None:
        raise RecipeError(
            f"{spec.name} is planned without a vision tower, so images are no part of its batch: leave out "
            "images"
        )
    towers.pictures(spec.vision, recipe)
    tower = blueprint.tower(spec)
    adapted = recipe.mode is not Mode.FULL and any(name in tower for name in _adapted(spec, recipe))
    if adapted and recipe.use_reentrant:
        raise RecipeError(
            "adapters in a vision tower get no gradient under reentrant checkpointing, for nothing that goes "
            "into its blocks wants one: give --no-use-reentrant, or --target-modules attention"
        )


def _check_tower(spec: ModelSpec, recipe: Recipe) -> None:
    """Refuse adapters on what of a tower is no linear layer."""
    if recipe.target_modules in TARGET_PRESETS:
        return
    for name, module in blueprint.tower(spec).items():
        if module.kind in ("conv", "embedding") and targets.is_target(recipe.target_modules, name):
            raise RecipeError(
                f"target_modules names {name}, and adapters on the patches and positions of a tower are not "
                "planned: leave it out, or give a regular expression that passes it by"
            )


def check_several(spec: ModelSpec) -> None:
    """Raise RecipeError for a family whose step was never compared on several GPUs."""
    if not families.find(spec.model_type).several:
        raise RecipeError(
            f"{spec.architecture} on several GPUs is not planned: `memplan dry-run --gpu 8xh100 -- COMMAND` "
            "runs your own program on them"
        )


def _as_stored(spec: ModelSpec, recipe: Recipe) -> Recipe:
    """The recipe with the settings that a checkpoint in 4 bits brings along: transformers keeps to them,
    whatever a script says."""
    stored = spec.quantization
    if spec.mxfp4 and recipe.mode is Mode.QLORA:
        raise RecipeError(
            f"{spec.name} holds its experts in MXFP4, which loading makes {recipe.dtype.value} of, and "
            "transformers takes no other quantisation beside it: give --mode lora or full"
        )
    if stored is None:
        return recipe
    if recipe.mode is not Mode.QLORA:
        way = "nothing trains them in full" if recipe.mode is Mode.FULL else "adapters on them are QLoRA"
        raise RecipeError(
            f"{spec.name} holds weights in 4 bits, and {way}: give --mode qlora, or the model that they were "
            "made of"
        )
    if spec.num_experts:
        raise RecipeError(
            f"{spec.name} holds experts in 4 bits, which memplan doesn't plan: `memplan dry-run -- COMMAND` "
            "runs your own program with them"
        )
    settings = {
        "quant_type": QuantType(stored.quant_type),
        "double_quant": stored.double_quant,
        "compute_dtype": DTypeName(stored.compute_dtype),
    }
    for field, value in settings.items():
        given = getattr(recipe, field)
        if field in recipe.model_fields_set and given is not None and given != value:
            told = getattr(value, "value", value)
            raise RecipeError(
                f"{spec.name} is quantised already, with {field} {told}, and transformers keeps to that: "
                f"leave {field} out"
            )
    return recipe.model_copy(update=settings)


def _check_experts(spec: ModelSpec, recipe: Recipe) -> None:
    """What PEFT's ParamWrapper, which adapts experts, can't do."""
    if not spec.num_experts:
        return
    if recipe.parallel == "zero3":  # in the one run of it a layer's experts were there for longer
        raise RecipeError(
            "adapters in a mixture of experts under ZeRO-3 are not planned: use --parallel zero2 or fsdp2"
        )
    if adapts_experts(spec, recipe):
        if recipe.parallel in (*ZERO, "fsdp"):
            whose = "FSDP1" if recipe.parallel == "fsdp" else "ZeRO"
            raise RecipeError(
                f"adapters on experts under {whose} are not planned: adapt attention only "
                "(--target-modules attention), or use --parallel ddp or fsdp2"
            )
        for option, wanted in (("lora_dropout", recipe.lora_dropout), ("use_dora", recipe.use_dora)):
            if wanted:
                raise RecipeError(
                    f"PEFT adapts experts without {option}; leave it out, or adapt attention only "
                    "(--target-modules attention)"
                )
    elif not isinstance(recipe.target_modules, str):
        fused = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"} & set(
            recipe.target_modules
        )
        known = families.find(spec.model_type).adapts_experts
        if not known:  # a shared expert's and a dense layer's are adapted by name
            fused = {name for name in fused if not _adapted_by(spec, (name,))}
        if fused:
            other = "use all-linear, which adapts them, or attention"
            if not known:
                other = "adapters on these are not planned: use attention"
            raise RecipeError(
                f"target_modules {sorted(fused)} name projections that transformers 5 fuses into experts; "
                f"{other}"
            )
    targets = recipe.target_modules
    if targets == "all-linear" or all(".self_attn." in n or n == "lm_head" for n in _adapted(spec, recipe)):
        return
    if (
        isinstance(targets, str) and families.find(spec.model_type).adapts_experts
    ):  # _resolve_string_target_modules
        raise RecipeError(
            "PEFT takes a pattern that matches outside attention for the names of all experts, which is not "
            "planned: use --target-modules all-linear or attention"
        )
    if not all(spec.sparse_layers):
        raise RecipeError(
            "adapters outside attention by name are not modelled for models that mix dense layers with "
            "layers of experts; use --target-modules all-linear or attention"
        )


def adapts_experts(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether routers and experts get adapters."""
    wanted = recipe.mode is not Mode.FULL and recipe.target_modules == "all-linear"
    return wanted and families.find(spec.model_type).adapts_experts


def is_adapted(spec: ModelSpec, wanted: str | tuple[str, ...], full_name: str) -> bool:
    """Whether a linear module gets an adapter. Of a mixture of experts PEFT takes ``all-linear`` apart into
    names, and hands those that experts have to their stacked parameters: a dense MLP and a shared expert,
    whose names are the same, are passed over (peft/utils/transformers_weight_conversion.py, 0.21)."""
    if wanted == "all-linear" and families.find(spec.model_type).adapts_experts:
        return full_name.rpartition(".")[2] not in (*_OF_EXPERTS, "lm_head")
    return targets.is_target(wanted, full_name)


_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")


@lru_cache(maxsize=64)
def _adapted_by(spec: ModelSpec, target_modules: str | tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {
        name: shape for name, shape in _linear_shapes(spec).items() if is_adapted(spec, target_modules, name)
    }


def unmatched(spec: ModelSpec, recipe: Recipe) -> list[str]:
    """The names among the targets that match no linear module; PEFT passes them over without a word."""
    wanted = recipe.target_modules
    if recipe.mode is Mode.FULL or isinstance(wanted, str):
        return []
    return [name for name in wanted if not _adapted_by(spec, (name,))]


def _adapted(spec: ModelSpec, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Full names and shapes of the linear modules that get an adapter."""
    return _adapted_by(spec, recipe.target_modules)


def _linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Full names and shapes of the linear modules of every layer, and of the head."""
    shapes = {
        f"{blueprint.layers_of(spec)}{index}.{name}": module.parameters["weight"]
        for index in range(spec.num_hidden_layers)
        for name, module in blueprint.layer(spec, index).items()
        if module.kind == "linear"
    }
    tower = blueprint.tower(spec).items()
    shapes.update({name: module.parameters["weight"] for name, module in tower if module.kind == "linear"})
    shapes["lm_head"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def _names(spec: ModelSpec) -> dict[str, str]:
    """Kinds of all modules by name; layers' names are relative."""
    parts = [blueprint.outside(spec), *(modules for modules, _ in blueprint.layers(spec))]
    names = {name: module.kind for part in parts for name, module in part.items()}
    return {**names, "lm_head": "head"}


def adapted_by_layer(spec: ModelSpec, recipe: Recipe) -> list[frozenset[str]] | None:
    """The adapted modules of each layer, where the targets can tell layers apart (a pattern, a number)."""
    wanted = recipe.target_modules
    names = (wanted,) if isinstance(wanted, str) else wanted
    if recipe.mode is Mode.FULL or wanted in TARGET_PRESETS or not any(map(_DIGIT_OR_PATTERN.search, names)):
        return None
    layers: list[set[str]] = [set() for _ in range(spec.num_hidden_layers)]
    for name in _adapted(spec, recipe):
        if name.startswith(blueprint.layers_of(spec)):
            index, _, module = name.removeprefix(blueprint.layers_of(spec)).partition(".")
            layers[int(index)].add(module)
    return [frozenset(names) for names in layers]


_DIGIT_OR_PATTERN = re.compile(r"\d|[^\w.]")


def count(spec: ModelSpec, recipe: Recipe) -> tuple[int, int, int]:
    """Parameters of the base model, of the adapters, and the trainable ones."""
    base = blueprint.count_parameters(spec)
    if recipe.mode is Mode.FULL:
        return base, 0, base
    adapted = _adapted(spec, recipe)
    around = adapters.of(recipe).count
    trained = sum(around(shape, recipe) for shape in adapted.values())
    trained += _saved(spec, recipe) + _expert_adapters(spec, recipe)
    return base, trained, trained


def _expert_adapters(spec: ModelSpec, recipe: Recipe) -> int:
    """Parameters of the adapters on routers and experts (memplan.predict.builder, Builder.raw)."""
    if not adapts_experts(spec, recipe):
        return 0
    total = 0
    for modules, times in blueprint.layers(spec):
        for module in modules.values():
            for attribute, shape in module.parameters.items() if module.kind == "raw" else ():
                experts, outputs, inputs = (1, *shape) if len(shape) == 2 else shape
                rank = 2 * recipe.r if attribute == "gate_up_proj" else recipe.r
                total += times * experts * rank * (outputs + inputs)
    return total


def _saved(spec: ModelSpec, recipe: Recipe) -> int:
    """Parameters of the copies that modules_to_save trains."""
    if not recipe.modules_to_save:
        return 0
    saved = sum(
        times * sum(module.count for name, module in modules.items() if _is_saved(recipe, name))
        for modules, times in blueprint.layers(spec)
    )
    outside = {
        "lm_head": blueprint.outside(spec)[f"{blueprint.root(spec)}.embed_tokens"],
        **blueprint.outside(spec),
    }
    return saved + sum(module.count for name, module in outside.items() if _is_saved(recipe, name))


def _is_saved(recipe: Recipe, name: str) -> bool:
    return targets.is_saved(recipe.modules_to_save, name)
