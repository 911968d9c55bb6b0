"""The modules of a decoder layer: names, kinds and shapes, exactly as transformers 5.23 builds them.

Names are relative to ``model.layers.N``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from memplan.asked.spec import ModelSpec
from memplan.shadow.tensor import Shape


@dataclass(frozen=True, slots=True)
class Module:
    """A leaf module. ``kind`` is linear, norm, embedding, raw (parameters that no class owns) or buffer;
    ``parameters`` maps attribute names to shapes, ``buffers`` those of what is kept in fp32 beside them."""

    kind: str
    parameters: dict[str, Shape]
    buffers: dict[str, Shape] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(prod(shape) for shape in self.parameters.values())


Modules = dict[str, Module]


def linear(inputs: int, outputs: int, bias: bool = False) -> Module:
    shapes: dict[str, Shape] = {"weight": (outputs, inputs)}
    if bias:
        shapes["bias"] = (outputs,)
    return Module("linear", shapes)


def buffer(*shape: int) -> Module:
    """One that a layer itself has, in the model's dtype."""
    return Module("buffer", {}, {"": shape})


def norm(*shape: int, bias: bool = False) -> Module:
    return Module("norm", {"weight": shape, "bias": shape} if bias else {"weight": shape})


def widths(spec: ModelSpec) -> tuple[int, int]:
    """Of all queries together, and of all keys or values."""
    return spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim


def attention(spec: ModelSpec, *, output_bias: bool = True) -> Modules:
    """Projections apart; ``output_bias``: the last has a bias if the others do."""
    hidden, bias = spec.hidden_size, spec.attention_bias
    query, key = widths(spec)
    return {
        "self_attn.q_proj": linear(hidden, query, bias),
        "self_attn.k_proj": linear(hidden, key, bias),
        "self_attn.v_proj": linear(hidden, key, bias),
        "self_attn.o_proj": linear(query, hidden, bias and output_bias),
    }


def head_norms(query: int, key: int) -> Modules:
    return {"self_attn.q_norm": norm(query), "self_attn.k_norm": norm(key)}


def mlp(spec: ModelSpec, name: str = "mlp", inner: int | None = None) -> Modules:
    """A gated one, as wide as the specification says unless ``inner`` does."""
    hidden, inner = spec.hidden_size, inner or spec.intermediate_size
    return {
        f"{name}.gate_proj": linear(hidden, inner, spec.mlp_bias),
        f"{name}.up_proj": linear(hidden, inner, spec.mlp_bias),
        f"{name}.down_proj": linear(inner, hidden, spec.mlp_bias),
    }


def experts(spec: ModelSpec) -> Modules:
    """A router, and its experts in one stack."""
    hidden, count, width = spec.hidden_size, spec.num_experts, spec.moe_intermediate_size
    return {
        "mlp.gate": Module("raw", {"weight": (count, hidden)}),
        "mlp.experts": Module(
            "raw", {"gate_up_proj": (count, 2 * width, hidden), "down_proj": (count, hidden, width)}
        ),
    }


def norms(spec: ModelSpec, *names: str, bias: bool = False) -> Modules:
    names = names or ("input_layernorm", "post_attention_layernorm")
    return {name: norm(spec.hidden_size, bias=bias) for name in names}


def plain(spec: ModelSpec, sparse: bool) -> Modules:
    """A layer of Llama; ``sparse``: with experts in the place of its MLP."""
    return {**attention(spec), **(experts(spec) if sparse else mlp(spec)), **norms(spec)}
