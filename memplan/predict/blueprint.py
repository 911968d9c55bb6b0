"""What modules a model has, of all its layers and outside of them.

The same blueprint counts parameters, decides what LoRA targets and NF4 replace, and is what the
decoder's forward is played on. Names are relative to ``model.layers.N`` inside a layer (:func:`root`).
"""

from __future__ import annotations

from collections import Counter
from math import prod

from memplan import families, towers
from memplan.asked.spec import ModelSpec
from memplan.parts.module import Module, linear, norm
from memplan.shadow.tensor import Shape


def root(spec: ModelSpec) -> str:
    """The decoder's name in the model."""
    return families.find(spec.model_type).root


def layers_of(spec: ModelSpec) -> str:
    """What the names of all layers begin with."""
    return f"{root(spec)}.layers."


def layer(spec: ModelSpec, index: int) -> dict[str, Module]:
    """The modules of decoder layer ``index``, in the library's order."""
    return _layer(spec, *_kind(spec, index))


def _layer(spec: ModelSpec, sparse: bool, kind: str, reuses_kv: bool) -> dict[str, Module]:
    family = families.find(spec.model_type)
    modules = family.modules
    if kind == "linear_attention":
        assert family.linear_modules is not None, "a layer of linear attention in a family without any"
        modules = family.linear_modules
    return modules(spec.of(kind, reuses_kv=reuses_kv), sparse)


def _kind(spec: ModelSpec, index: int) -> tuple[bool, str, bool]:
    """What layers' modules differ by: whether there are experts, the kind of attention where that tells
    them apart, and whether keys and values are another layer's."""
    kind = spec.layer_types[index] if spec.layer_types else "full_attention"
    alike = kind != "linear_attention" and spec.global_head_dim is None
    return is_sparse(spec, index), "full_attention" if alike else kind, spec.kv_sharing[index] == "reuse"


def outside(spec: ModelSpec) -> dict[str, Module]:
    """The modules outside the layers, a tower's first. A tied ``lm_head`` owns no parameter."""
    family = families.find(spec.model_type)
    modules = tower(spec)
    modules[f"{family.root}.embed_tokens"] = Module(
        "embedding", {"weight": (spec.vocab_size, spec.hidden_size)}
    )
    modules[f"{family.root}.norm"] = norm(spec.hidden_size, bias=family.norm_bias)
    modules.update(family.outside(spec))
    if not spec.tie_word_embeddings:
        modules["lm_head"] = linear(spec.hidden_size, spec.vocab_size)
    return modules


def tower(spec: ModelSpec) -> dict[str, Module]:
    """The modules of what the model sees with."""
    if spec.vision is None:
        return {}
    found = towers.find(spec.vision.kind)
    return {f"{found.root}.{name}": module for name, module in found.modules(spec.vision).items()}


def is_sparse(spec: ModelSpec, index: int) -> bool:
    """Whether layer ``index`` has experts."""
    return bool(spec.sparse_layers and spec.sparse_layers[index])


def is_linear(spec: ModelSpec, index: int) -> bool:
    """Whether layer ``index`` has linear attention."""
    return bool(spec.layer_types) and spec.layer_types[index] == "linear_attention"


def layers(spec: ModelSpec) -> list[tuple[dict[str, Module], int]]:
    """Distinct layer blueprints and how many layers have each."""
    times = Counter(_kind(spec, index) for index in range(spec.num_hidden_layers))
    return [(_layer(spec, *kind), count) for kind, count in sorted(times.items())]


def count_parameters(spec: ModelSpec) -> int:
    """Parameters of the base model, tied weights counted once."""
    inside = sum(count * sum(module.count for module in modules.values()) for modules, count in layers(spec))
    return inside + sum(module.count for module in outside(spec).values())


def named_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every parameter's full name and shape, as ``model.named_parameters()`` lists them."""
    shapes: dict[str, Shape] = {}
    for index in range(spec.num_hidden_layers):
        for name, module in layer(spec, index).items():
            for attribute, shape in module.parameters.items():
                shapes[f"{layers_of(spec)}{index}.{name}.{attribute}"] = shape
    for name, module in outside(spec).items():
        for attribute, shape in module.parameters.items():
            shapes[f"{name}.{attribute}"] = shape
    return shapes


def named_buffers(spec: ModelSpec, itemsize: int) -> dict[str, int]:
    """Full names and bytes of the buffers that a checkpoint holds beside the parameters: in fp32, or as wide
    as a number of the model's dtype is."""
    found = {}
    for index in range(spec.num_hidden_layers):
        for name, module in layer(spec, index).items():
            width = itemsize if module.kind == "buffer" else 4
            for attribute, shape in module.buffers.items():
                full_name = f"{layers_of(spec)}{index}.{name}.{attribute}".removesuffix(".")
                found[full_name] = width * prod(shape)
    return found
