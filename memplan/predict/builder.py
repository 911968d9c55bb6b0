"""Modules from a blueprint and a recipe: what is quantised, upcast, frozen, adapted, trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from memplan import adapters, families, strategies, towers, weights
from memplan.asked.recipe import DTypeName, Mode, Recipe
from memplan.asked.spec import ModelSpec
from memplan.optimizers import Group
from memplan.parts.leaves import Base, Embedding, Linear, buffer, parameter
from memplan.parts.module import Module
from memplan.parts.norms import LayerNorm, RMSNorm
from memplan.predict import blueprint
from memplan.predict.fold import Played
from memplan.predict.parameters import adapts_experts, is_adapted
from memplan.predict.targets import is_saved
from memplan.predict.unlike import Standing
from memplan.shadow.images import Patches
from memplan.shadow.tensor import DTYPES, DType, Tensor, bfloat16, float32, state
from memplan.tape import Category, Part, Phase


@dataclass(slots=True)
class Model:
    """A played model: the modules of the played layers, ``outside`` those of its family outside of them, by
    full name, and its trainable parameters in the order of ``model.parameters()``, grouped by where they are;
    ``tables``: the embeddings' weights, the decoder's first; ``trained``: what is trained of each layer, as
    it computes with it. ``tower``: what it sees with, by name within that; ``stays``: what it keeps from step
    to step."""

    spec: ModelSpec
    recipe: Recipe
    layers: list[dict[str, Any]]
    outside: dict[str, Any]
    embedding: Embedding
    tables: list[Tensor]
    norm: RMSNorm
    head: Any
    buffers: list[Tensor]
    trainable: list[Group]
    trained: list[list[Tensor]]
    tower: dict[str, Any] = field(default_factory=dict)
    stays: dict[str, Tensor] = field(default_factory=dict)


class Builder:
    """Builds one model; ``dtype`` is the load dtype, ``rest_dtype`` that of what is not quantised."""

    def __init__(self, spec: ModelSpec, recipe: Recipe) -> None:
        self.spec, self.recipe = spec, recipe
        self.family = families.find(spec.model_type)
        self.dtype: DType = DTYPES[recipe.dtype.value]
        # prepare_model_for_kbit_training casts every parameter that is not 4-bit to fp32.
        self.rest_dtype = float32 if recipe.kbit_prep else self.dtype
        # of the copies that modules_to_save trains
        self.saved_dtype = bfloat16 if recipe.casts_adapters_back else self.rest_dtype
        self.full = recipe.mode is Mode.FULL
        self.quantised = weights.of(recipe)
        self.adapter = adapters.of(recipe)
        self.trainable: list[Tensor] = []
        self.tables: list[Tensor] = []
        self.buffers: list[Tensor] = []

    def rotary(self) -> None:
        """``inv_freq`` and ``original_inv_freq``, a pair for each rotary embedding."""
        kinds = sorted(set(self.spec.layer_types)) if self.family.rotates_by_layer else ["full_attention"]
        for kind in kinds:
            spec = self.spec.of(kind)
            width = int(spec.head_dim * spec.partial_rotary_factor) // 2
            # longrope makes its second table in the first step and keeps it
            for _ in range(2 + spec.longrope):
                self.buffers.append(buffer((width,), float32, self.rotary_emb, Category.WEIGHTS))

    @property
    def rotary_emb(self) -> str:
        """The module that has them."""
        return f"{blueprint.root(self.spec)}.rotary_emb"

    def tower(self) -> dict[str, Any]:
        """What the model sees with. In a batch without images none of it is run, nothing of it is updated."""
        spec = self.spec
        if spec.vision is None:
            return {}
        root = towers.find(spec.vision.kind).root
        made = {
            name.removeprefix(f"{root}."): self.module(name, module, name, LayerNorm)
            for name, module in blueprint.tower(spec).items()
        }
        width = spec.vision.hidden_size // spec.vision.num_heads // 4
        for _ in range(2):
            self.buffers.append(buffer((width,), float32, f"{root}.rotary_pos_emb", Category.WEIGHTS))
        if not self.recipe.images:
            self.trainable = []
        return made

    def weight(self, shape: tuple[int, ...], name: str, full_name: str | None = None) -> Tensor:
        """A weight that is not quantised. A module to save keeps the frozen original beside its copy
        (peft/utils/other.py, ModulesToSaveWrapper), which is what runs."""
        tensor = parameter(shape, self.rest_dtype, name, Category.WEIGHTS, self.full)
        if is_saved(self.recipe.modules_to_save, full_name or name):
            self.buffers.append(tensor)
            tensor = parameter(shape, self.saved_dtype, name, Category.ADAPTERS, True)
        if tensor.requires_grad:
            self.trainable.append(tensor)
        return tensor

    def module(
        self, name: str, definition: Module, full_name: str, norm: Callable[..., RMSNorm] | None = None
    ) -> Any:
        """A leaf; ``norm``: the class of its norms, the family's unless given."""
        shapes = definition.parameters
        if definition.kind in ("norm", "conv"):
            kinds: dict[str, Any] = {"norm": norm or self.family.norm, "conv": Patches}
            parameters = [
                self.weight(shape, name if attribute == "weight" else f"{name}.{attribute}", full_name)
                for attribute, shape in shapes.items()
            ]
            return self.leaf(name, kinds[definition.kind](name, *parameters))
        if definition.kind == "raw":
            return self.raw(name, definition)
        if definition.kind == "embedding":
            return self.embedding(name, shapes["weight"])
        if definition.kind == "buffer":
            return buffer(definition.buffers[""], self.dtype, name, Category.WEIGHTS)
        return self.linear(name, shapes, full_name)

    def embedding(self, name: str, shape: tuple[int, ...], hook: bool = False) -> Embedding:
        """``hook``: its output is made to require a gradient."""
        table = self.weight(shape, name)
        self.tables.append(table)
        scale = None
        if self.family.scaled_embedding:
            # a buffer, which the copy of a module to save has as well
            for _ in range(1 + is_saved(self.recipe.modules_to_save, name)):
                scale = buffer((), self.dtype, f"{name}.embed_scale", Category.WEIGHTS)
                self.buffers.append(scale)
        return Embedding(name, table, scale, hook)

    def leaf(self, name: str, module: Any) -> Any:
        """A module as a strategy has it called."""
        return module if state.spread is None else state.spread.leaf(name, module)

    def raw(self, name: str, definition: Module) -> dict[str, Any]:
        """A router's or the experts' parameters, adapted by ``all-linear``. PEFT doubles the rank where two
        projections are fused in one parameter (peft/utils/transformers_weight_conversion.py)."""
        made: dict[str, Any] = {
            attribute: self.weight(shape, f"{name}.{attribute}")
            for attribute, shape in definition.parameters.items()
        }
        recipe = self.recipe
        if adapts_experts(self.spec, recipe):
            assert self.adapter.parameter is not None, "refused by resolve_recipe"
            for attribute, weight in made.items():
                rank = 2 * recipe.r if attribute == "gate_up_proj" else recipe.r
                adapter = self.adapter.parameter(weight, name, rank, self.adapter_dtype(weight.dtype))
                made[attribute] = adapter
                self.trainable += [adapter.down, adapter.up]
        for attribute, shape in definition.buffers.items():
            made[attribute] = buffer(shape, float32, f"{name}.{attribute}", Category.WEIGHTS)
        return made

    def linear(self, name: str, shapes: dict[str, tuple[int, ...]], full_name: str) -> Any:
        base: Base
        if self.quantised is not None and not full_name.endswith("lm_head"):
            base = self.quantised.linear(name, shapes, self.recipe, self.dtype)
        else:
            weight = self.weight(shapes["weight"], name, full_name)
            bias = self.weight(shapes["bias"], name, full_name) if "bias" in shapes else None
            base = Linear(name, weight, bias)
        return self.adapted(base, full_name)

    def adapter_dtype(self, base: DType) -> DType:
        """fp32, or the dtype of what is adapted (peft/tuners/tuners_utils.py, cast_adapter_dtype and
        _move_adapter_to_device_of_base_layer), or bf16 where the trainer casts all of them."""
        if self.recipe.casts_adapters_back:
            return bfloat16
        return float32 if self.recipe.adapter_dtype is DTypeName.FLOAT32 else base

    def adapted(self, base: Base, full_name: str) -> Any:
        """A linear module with its adapter, if it is a target."""
        recipe = self.recipe
        base = self.leaf(base.name, base)
        if recipe.mode is Mode.FULL or not is_adapted(self.spec, recipe.target_modules, full_name):
            return base
        adapter = self.adapter.around(base, recipe, self.adapter_dtype(base.compute))
        self.trainable += adapter.trainable()
        return self.leaf(f"{base.name}.adapter", adapter)

    def build(self, played: Played | Standing) -> Model:
        """Write the static part of the tape and return the model."""
        spec, recipe, tape = self.spec, self.recipe, state.tape
        outside = blueprint.outside(spec)
        groups: list[Group] = []
        spread = state.spread

        def begin(part: strategies.Part, times: int = 1) -> None:
            if spread is not None:
                spread.times = times
                spread.begin(part)

        def close(layer: int | None, repeat: int = 1) -> None:
            if self.trainable:
                updated = self.trainable if spread is None else [*map(spread.updated, self.trainable)]
                groups.append(Group(layer, repeat, updated))
                self.trainable = []

        tape.begin(Phase.SETUP, "weights", part=Part.LOADED)
        tower = self.tower()
        close(None)
        root = blueprint.root(spec)
        begin(strategies.HEAD if spec.tie_word_embeddings else strategies.EMBEDDING)
        name = f"{root}.embed_tokens"
        before = len(self.buffers)
        hook = recipe.mode is not Mode.FULL and bool(recipe.gradient_checkpointing)
        embedding = self.embedding(name, outside[name].parameters["weight"], hook)
        # of a module to save, which came first
        original = self.buffers[before] if is_saved(recipe.modules_to_save, name) else embedding.weight
        close(None)
        layers, trained = [], []
        for index, repeat in played.repeats:
            tape.begin(Phase.SETUP, "layer weights", index, Part.LOADED)
            begin(index, repeat)
            prefix = f"{blueprint.layers_of(spec)}{index}."
            definition = blueprint.layer(spec, index)
            layers.append(
                {name: self.module(name, module, prefix + name) for name, module in definition.items()}
            )
            trained.append([*self.trainable])
            close(index, repeat)
        tape.begin(Phase.SETUP, "weights", part=Part.LOADED)
        begin(strategies.NORM)
        self.rotary()
        if self.quantised is not None and spec.quantization is None:  # which quantising leaves
            self.buffers += self.quantised.shared(recipe)
        norm = self.module(f"{root}.norm", outside[f"{root}.norm"], f"{root}.norm")
        others = {name: self.module(name, module, name) for name, module in self.family.outside(spec).items()}
        begin(strategies.HEAD)
        head: Any
        if spec.tie_word_embeddings:
            # one tensor under two names; as a module to save each gets a copy of its own
            if is_saved(recipe.modules_to_save, "lm_head"):
                copy = parameter(original.shape, self.saved_dtype, "lm_head", Category.ADAPTERS, True)
                self.trainable.append(copy)
                head = Linear("lm_head", copy, None)
            else:
                head = self.adapted(Linear("lm_head", original, None), "lm_head")
        else:
            head = self.module("lm_head", outside["lm_head"], "lm_head")
        close(None)
        tables = sorted(self.tables, key=lambda one: one is not embedding.weight)
        return Model(
            spec, recipe, layers, others, embedding, tables, norm, head, self.buffers, groups, trained, tower
        )
