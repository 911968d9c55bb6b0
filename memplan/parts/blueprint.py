"""What modules a model has: names, kinds and shapes, exactly as transformers 5.23 builds them.

The same blueprint counts parameters, decides what LoRA targets and NF4 replace, and is what the
decoder's forward is played on. Names are relative to ``model.layers.N`` inside a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from memplan.asked.spec import ModelSpec
from memplan.shadow.tensor import Shape


@dataclass(frozen=True, slots=True)
class Module:
    """A leaf module. ``kind`` is linear, norm, embedding or raw (parameters that no class owns);
    ``parameters`` maps attribute names to shapes."""

    kind: str
    parameters: dict[str, Shape]

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(prod(shape) for shape in self.parameters.values())


def _linear(inputs: int, outputs: int, bias: bool = False) -> Module:
    shapes: dict[str, Shape] = {"weight": (outputs, inputs)}
    if bias:
        shapes["bias"] = (outputs,)
    return Module("linear", shapes)


def _norm(size: int) -> Module:
    return Module("norm", {"weight": (size,)})


def layer(spec: ModelSpec, sparse: bool) -> dict[str, Module]:
    """The modules of one decoder layer, in the library's order. ``sparse``: its MLP has experts."""
    return {**_attention(spec), **_mlp(spec, sparse), **_norms(spec)}


def _attention(spec: ModelSpec) -> dict[str, Module]:
    hidden = spec.hidden_size
    query = spec.num_attention_heads * spec.head_dim
    key = spec.num_key_value_heads * spec.head_dim
    bias = spec.attention_bias
    if spec.model_type == "phi3":
        return {
            "self_attn.o_proj": _linear(query, hidden),
            "self_attn.qkv_proj": _linear(hidden, query + 2 * key),
        }
    modules = {
        "self_attn.q_proj": _linear(hidden, query, bias),
        "self_attn.k_proj": _linear(hidden, key, bias),
        "self_attn.v_proj": _linear(hidden, key, bias),
        # Qwen2 has biases on q, k and v only (modeling_qwen2.py).
        "self_attn.o_proj": _linear(query, hidden, bias and spec.model_type != "qwen2"),
    }
    if spec.model_type in ("qwen3", "qwen3_moe", "gemma3_text"):
        modules["self_attn.q_norm"] = modules["self_attn.k_norm"] = _norm(spec.head_dim)
    if spec.model_type == "olmo2":
        modules["self_attn.q_norm"], modules["self_attn.k_norm"] = _norm(query), _norm(key)
    return modules


def _mlp(spec: ModelSpec, sparse: bool) -> dict[str, Module]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    if sparse:
        experts, width = spec.num_experts, spec.moe_intermediate_size
        modules = {
            "mlp.gate": Module("raw", {"weight": (experts, hidden)}),
            "mlp.experts": Module(
                "raw",
                {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)},
            ),
        }
        return dict(reversed(modules.items())) if spec.model_type == "qwen3_moe" else modules
    if spec.model_type == "phi3":
        return {"mlp.gate_up_proj": _linear(hidden, 2 * inner), "mlp.down_proj": _linear(inner, hidden)}
    return {
        "mlp.gate_proj": _linear(hidden, inner, spec.mlp_bias),
        "mlp.up_proj": _linear(hidden, inner, spec.mlp_bias),
        "mlp.down_proj": _linear(inner, hidden, spec.mlp_bias),
    }


def _norms(spec: ModelSpec) -> dict[str, Module]:
    names = ["input_layernorm", "post_attention_layernorm"]
    if spec.model_type in ("gemma2", "gemma3_text"):
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if spec.model_type == "olmo2":
        names = ["post_attention_layernorm", "post_feedforward_layernorm"]
    return {name: _norm(spec.hidden_size) for name in names}


def outside(spec: ModelSpec) -> dict[str, Module]:
    """The modules outside the layers. A tied ``lm_head`` owns no parameter."""
    modules = {
        "model.embed_tokens": Module("embedding", {"weight": (spec.vocab_size, spec.hidden_size)}),
        "model.norm": _norm(spec.hidden_size),
    }
    if not spec.tie_word_embeddings:
        modules["lm_head"] = _linear(spec.hidden_size, spec.vocab_size)
    return modules


def is_sparse(spec: ModelSpec, index: int) -> bool:
    """Whether layer ``index`` has experts."""
    return bool(spec.sparse_layers and spec.sparse_layers[index])


def layers(spec: ModelSpec) -> list[tuple[dict[str, Module], int]]:
    """Distinct layer blueprints and how many layers have each."""
    sparse = (
        sum(is_sparse(spec, index) for index in range(spec.num_hidden_layers)) if spec.sparse_layers else 0
    )
    found = [(layer(spec, False), spec.num_hidden_layers - sparse), (layer(spec, True), sparse)]
    return [(modules, count) for modules, count in found if count]


def count_parameters(spec: ModelSpec) -> int:
    """Parameters of the base model, tied weights counted once."""
    inside = sum(count * sum(module.count for module in modules.values()) for modules, count in layers(spec))
    return inside + sum(module.count for module in outside(spec).values())


def named_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every parameter's full name and shape, as ``model.named_parameters()`` lists them."""
    shapes: dict[str, Shape] = {}
    for index in range(spec.num_hidden_layers):
        for name, module in layer(spec, is_sparse(spec, index)).items():
            for attribute, shape in module.parameters.items():
                shapes[f"model.layers.{index}.{name}.{attribute}"] = shape
    for name, module in outside(spec).items():
        for attribute, shape in module.parameters.items():
            shapes[f"{name}.{attribute}"] = shape
    return shapes
