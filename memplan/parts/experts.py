"""Mixture of experts as transformers runs it on a card: one grouped product for all experts
(transformers/integrations/moe.py, grouped_mm_experts_forward, 5.23; models/mixtral and qwen3_moe).

Every token is copied once for each expert that it is sent to, so sizes do not depend on the routing.
N tokens, K experts a token, S = N·K rows, X experts. cub's scratch for sorting S indices is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memplan.asked.spec import ModelSpec
from memplan.cuda.products import padded_columns
from memplan.parts.context import Leaves
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, save_output, unpack
from memplan.shadow.indexing import by_rows
from memplan.shadow.matmul import linear
from memplan.shadow.tensor import (
    DType,
    Shape,
    Tensor,
    contiguous_strides,
    empty,
    float32,
    int32,
    int64,
    state,
)
from memplan.tape import Phase

# The router's logits, and weights and numbers of each token's experts, by its weight, which an adapter makes
# when it is read, and hidden states [N, E].
Weight = Callable[[], Tensor]
Route = Callable[[Weight, Tensor, ModelSpec], tuple[Tensor, Tensor, Tensor]]


def one_by_one(name: str) -> str:
    """The first name that a checkpoint has of a parameter: experts lie one by one in it."""
    name = name.replace(".experts.gate_up_proj", ".experts.0.gate_proj.weight")
    return name.replace(".experts.down_proj", ".experts.0.down_proj.weight")


def sparse_mlp(
    m: Leaves, hidden_states: Tensor, spec: ModelSpec, route: Route, captured: list[Tensor] | None = None
) -> Tensor:
    """``MixtralSparseMoeBlock``, ``Qwen3MoeSparseMoeBlock``."""
    shape = hidden_states.shape
    hidden_states = ops.view(hidden_states, (shape[0] * shape[1], shape[2]))
    router_logits, top_k_weights, top_k_index = gate_forward(
        m["mlp.gate"]["weight"], hidden_states, spec, route
    )
    capture(router_logits, captured)
    hidden_states = experts_forward(m["mlp.experts"], hidden_states, top_k_index, top_k_weights, spec)
    return ops.view(hidden_states, shape)


def capture(router_logits: Tensor, captured: list[Tensor] | None) -> None:
    """Put a router's logits to those that transformers' hooks collect, if they do
    (utils/output_capturing.py), which is not when the layer is recomputed."""
    if captured is not None and state.tape.segments[-1].phase is Phase.FORWARD:
        captured.append(router_logits)


def gate_forward(
    weight: Any, hidden_states: Tensor, spec: ModelSpec, route: Route
) -> tuple[Tensor, Tensor, Tensor]:
    """The router, through its adapter if it has one."""
    if isinstance(weight, Tensor):
        state.tape.module = "mlp.gate"
        return route(lambda: weight, hidden_states, spec)
    update = weight.activate()
    return route(lambda: weight.fold(update), hidden_states, spec)


def experts_forward(
    weights: dict[str, Any],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    spec: ModelSpec,
) -> Tensor:
    """The experts, through their adapters: the outer wrapper is that of ``down_proj``."""
    gate_up, down = weights["gate_up_proj"], weights["down_proj"]
    if isinstance(gate_up, Tensor):
        state.tape.module = "mlp.experts"
        if state.spread is not None:
            gate_up, down = state.spread.stacked(gate_up), state.spread.stacked(down)
        return grouped(lambda: gate_up, lambda: down, hidden_states, top_k_index, top_k_weights, spec)
    down_factors = down.activate()
    gate_up_factors = gate_up.activate()
    # parametrize.cached(): a folded stack lives until the experts are done
    cached: list[Tensor] = []

    def fold(adapter: Any, factors: Any) -> Tensor:
        cached.append(adapter.fold(factors))
        return cached[-1]

    return grouped(
        lambda: fold(gate_up, gate_up_factors),
        lambda: fold(down, down_factors),
        hidden_states,
        top_k_index,
        top_k_weights,
        spec,
    )


def chosen(router_probs: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Weights and numbers of each token's experts."""
    values, indices = top_k(router_probs, spec.num_experts_per_tok)
    if spec.norm_topk_prob:
        values = normalize_(values, ops.sum_last(values))
    return values, indices


def by_softmax(weight: Weight, hidden_states: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """``Qwen3MoeTopKRouter.forward``: a softmax over all experts."""
    logits = router_logits(weight, hidden_states)
    router_probs = ops.softmax(logits, float32)
    values, indices = chosen(router_probs, spec)
    values = ops.to(values, logits.dtype)
    return logits, values, indices


def router_logits(weight: Weight, hidden_states: Tensor) -> Tensor:
    hidden_states = ops.view(hidden_states, hidden_states.shape)  # reshape(-1, hidden_dim), a node of its own
    return linear(hidden_states, weight())


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    node = Node(_top_k_backward, x) if ops.tracked(x) else None
    values = empty(shape, x.dtype, "topk")
    indices = empty(shape, int64, "topk")
    if node is not None:
        node.saved = save_output(indices)
        node.context = x.shape
        attach(node, values)
    return values, indices


def _top_k_backward(node: Node, grad: Tensor) -> Any:
    indices = unpack(node.saved)
    out = empty(node.context, grad.dtype, "new_zeros")  # and scattered into in place
    del indices
    return (out,)


def normalize_(values: Tensor, total: Tensor) -> Tensor:
    """``values /= total``: in place, so the original is cloned for backward."""
    if not ops.tracked(values, total):
        return values
    node = Node(_normalize_backward, values, total)
    original = empty(values.shape, values.dtype, "clone")
    node.saved = save(original), save(total)
    divided = values.detach()
    attach(node, divided)
    return divided


def _normalize_backward(node: Node, grad: Tensor) -> Any:
    original, total = (unpack(saved) for saved in node.saved)
    # other: -grad * ((self / other) / other)
    once = ops.pointwise("div", original, total)
    twice = ops.pointwise("div", once, total)
    negative = ops.pointwise("neg", grad)
    for_total = ops.pointwise("mul", negative, twice)
    del once, twice, negative
    for_values = ops.pointwise("div", grad, total)
    return for_values, for_total


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = ops.chunk_last(gate_up)
    return ops.mul(ops.activation("silu", gate), up)


def grouped(
    gate_up: Callable[[], Tensor],
    down: Callable[[], Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    spec: ModelSpec,
    *,
    gate: Callable[[Tensor], Tensor] = _gate,
    biases: tuple[Tensor, Tensor] | None = None,
    transposed: bool = False,
) -> Tensor:
    """grouped_mm_experts_forward. ``transposed``: weights are [X, in, out], not [X, out, in]; ``biases`` [X,
    out], of which every row gets its expert's."""
    tokens, width = hidden_states.shape
    k = spec.num_experts_per_tok
    rows = tokens * k
    sample_weights = ops.view(top_k_weights, (rows,))
    expert_ids_g = empty((rows,), int64, "sort")
    perm = empty((rows,), int64, "sort")
    selected = by_rows(hidden_states, empty((rows,), int64, "floor_divide"))
    sample_weights_g = by_rows(sample_weights, perm)
    histc_input = empty((rows,), int32, "_to_copy")
    tokens_per_expert = empty((spec.num_experts,), int32, "histc")
    offsets = empty((spec.num_experts,), int32, "cumsum")
    selected_biases = None if biases is None else by_rows(biases[0], expert_ids_g)
    proj_out = _grouped_linear(selected, gate_up(), offsets, selected_biases, transposed)
    proj_out = gate(proj_out)
    selected_biases = None if biases is None else by_rows(biases[1], expert_ids_g)
    proj_out = _grouped_linear(proj_out, down(), offsets, selected_biases, transposed)
    weighted_out = ops.mul(proj_out, ops.view(sample_weights_g, (rows, 1)))
    inv_perm = empty((rows,), int64, "empty_like")
    positions = empty((rows,), int64, "arange")
    del positions
    weighted_out = by_rows(weighted_out, inv_perm)
    final = ops.to(_sum_experts(ops.view(weighted_out, (tokens, k, width))), hidden_states.dtype)
    del expert_ids_g, histc_input, tokens_per_expert, selected_biases
    return final


def _grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    out = _grouped_mm(x, weight, offsets, transposed)
    return out if bias is None else ops.add_(out, bias)


def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """``grouped_mm(x, weight.transpose(-2, -1), offs)``: x [S, in], weight [X, out, in] -> [S, out]; of a
    weight [X, in, out] as it is."""
    x = ops.to(x, weight.dtype)
    node = Node(_grouped_mm_backward, x, weight) if ops.tracked(x, weight) else None
    saved = None
    if node is not None:
        saved = (
            None if weight.node is None else save(x),
            None if x.node is None else save(weight),
            save(offsets),
        )
    out = _grouped((x.shape[0], weight.shape[2 if transposed else 1]), x.dtype)
    if node is not None:
        node.saved = saved
        node.context = x.shape, weight.shape
        attach(node, out)
    return out


def _grouped_mm_backward(node: Node, grad: Tensor) -> Any:
    x, weight, offsets = (None if saved is None else unpack(saved) for saved in node.saved)
    x_shape, weight_shape = node.context
    for_weight = None if x is None else _grouped(weight_shape, grad.dtype)
    for_x = None if weight is None else _grouped(x_shape, grad.dtype)
    del offsets
    return for_x, None if for_weight is None else for_weight.viewed(weight_shape)


def _grouped(shape: Shape, dtype: DType) -> Tensor:
    """What a grouped product is written into, whose rows are padded."""
    columns = padded_columns(shape[-1], dtype.itemsize)
    out = empty((*shape[:-1], columns), dtype, "_grouped_mm")
    return out if columns == shape[-1] else Tensor(shape, dtype, out.storage, contiguous_strides(out.shape))


def _sum_experts(x: Tensor) -> Tensor:
    """``x.sum(dim=1)``, which autocast makes in fp32 (ATen/autocast_mode.h, AT_FORALL_FP32_SET_OPT_DTYPE)."""
    node = Node(_sum_experts_backward, x) if ops.tracked(x) else None
    dtype = x.dtype if state.autocast is None else float32
    out = empty((x.shape[0], x.shape[2]), dtype, "sum")
    if node is not None:
        node.context = x.shape
        attach(node, out)
    return out


def _sum_experts_backward(node: Node, grad: Tensor) -> Any:
    tokens, _, width = node.context
    return (ops.expanded(grad.viewed((tokens, 1, width)), node.context),)
