"""DeepSeek V2 and V2-Lite: latent attention that is rotated as complex numbers, and experts that a softmax
chooses (transformers 5.23, models/deepseek_v2)."""

from __future__ import annotations

from typing import Any

from memplan.asked.fields import Fields
from memplan.asked.spec import ModelSpec
from memplan.errors import shown
from memplan.families import Family
from memplan.parts import deepseek_moe, latent
from memplan.parts.config import COMMON, Config, full
from memplan.parts.context import Context, Leaves
from memplan.parts.experts import Weight, one_by_one, top_k
from memplan.parts.layer import residual
from memplan.parts.module import Modules, mlp, norms
from memplan.shadow import ops
from memplan.shadow.complex import multiply, view_as_complex, view_as_real
from memplan.shadow.tensor import Tensor, complex64, empty, float32

_METHODS = ("greedy", "group_limited_greedy")


def _more(fields: Fields, layers: int) -> dict[str, Any]:
    dense = fields.size("first_k_dense_replace", least=0)
    found = deepseek_moe.numbers(fields, deepseek_moe.from_the(dense, layers), "num_experts")
    method = fields.get("topk_method")
    if method not in _METHODS:
        fields.fail(f"topk_method is {shown(method)}, but it must be one of {', '.join(_METHODS)}")
    grouped = method == "group_limited_greedy"
    return {
        **found,
        **latent.sizes(fields),
        **(deepseek_moe.groups(fields, found["num_experts"], 1) if grouped else {"n_group": 0}),
    }


def _modules(spec: ModelSpec, sparse: bool) -> Modules:
    inner = deepseek_moe.modules(spec, corrected=False) if sparse else mlp(spec)
    return {**latent.projections(spec), **inner, **norms(spec)}


def _freqs_cis(spec: ModelSpec, length: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """``DeepseekV2RotaryEmbedding.forward``: one complex table [1, S, D / 2], not two."""
    width = int(spec.head_dim * spec.partial_rotary_factor)
    position = empty((1, length, 1), float32, "_to_copy")
    freqs = empty((1, length, width // 2), float32, "mul")
    del position
    ones = ops.pointwise("ones_like", freqs)
    freqs_cis = empty(freqs.shape, complex64, "polar")
    del ones
    freqs_cis = ops.pointwise("mul", freqs_cis)
    return freqs_cis, freqs_cis


def _rotate(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """``apply_rotary_emb``."""
    xq, xk = _as_complex(q), _as_complex(k)
    batch, length, width = context.cos_BSD.shape
    freqs_cis = ops.view(context.cos_BSD, (batch, 1, length, width))
    xq_out = ops.to(_as_real(multiply(xq, freqs_cis)), q.dtype)
    xk_out = ops.to(_as_real(multiply(xk, freqs_cis)), k.dtype)
    return xq_out, xk_out


def _as_complex(x: Tensor) -> Tensor:
    pairs = (*x.shape[:-1], x.shape[-1] // 2, 2)
    return view_as_complex(ops.reshape(ops.to(x, float32), pairs))


def _as_real(x: Tensor) -> Tensor:
    pairs = view_as_real(x)
    return ops.reshape(pairs, (*x.shape[:-1], 2 * x.shape[-1]))  # flatten


def _route(weight: Weight, hidden_states: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """``DeepseekV2TopkRouter.forward``. N tokens, X experts in G groups."""
    router_logits_NX = deepseek_moe.router_logits(weight, hidden_states)
    scores = ops.softmax(router_logits_NX, float32)
    if spec.n_group:
        tokens, groups = router_logits_NX.shape[0], spec.n_group
        by_group = ops.view(scores, (tokens, groups, spec.num_experts // groups))
        group_scores_NG = ops.view(ops.max_last(by_group), (tokens, groups))
        del by_group
        _group_idx = top_k(group_scores_NG, spec.topk_group)[1]
        _group_mask, score_mask = deepseek_moe.masks(group_scores_NG, spec)
        scores = ops.masked_fill(scores, deepseek_moe.outside(score_mask))
    topk_weights, topk_indices = top_k(scores, spec.num_experts_per_tok)
    topk_weights = ops.scale(topk_weights)
    return router_logits_NX, topk_weights, topk_indices


def _layer(m: Leaves, hidden: Tensor, context: Context) -> Tensor:
    """``DeepseekV2DecoderLayer.forward``."""
    before = hidden
    hidden = m["input_layernorm"](hidden)
    hidden, _ = latent.attention(m, hidden, context, _rotate)
    hidden = residual(before, hidden)
    before = hidden
    hidden = m["post_attention_layernorm"](hidden)
    hidden = deepseek_moe.forward(m, hidden, context.spec, _route)
    hidden = residual(before, hidden)
    return hidden


FAMILY = Family(
    config=Config(
        architecture="DeepseekV2ForCausalLM",
        defaults={
            **COMMON,
            "mlp_bias": False,
            "max_position_embeddings": 2048,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moe_intermediate_size": 1407,
            "num_experts_per_tok": None,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "n_group": None,
            "topk_group": None,
            "topk_method": "greedy",
            "first_k_dense_replace": 0,
        },
        nullable=("q_lora_rank", "num_key_value_heads", "n_group", "topk_group"),
        layers=full,
        experts=_more,
        heads_divide_hidden=True,
        head="qk_rope_head_dim",
    ),
    modules=_modules,
    layer=_layer,
    cos_sin=_freqs_cis,
    adapts_experts=True,
    several=False,
    liger=False,
    apart=one_by_one,
)
