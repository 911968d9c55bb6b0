"""The architecture: what a Hugging Face ``config.json`` says, in one flat frozen record."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LayerKind = Literal["full_attention", "sliding_attention", "linear_attention"]
KVSharing = Literal["store", "reuse"] | None


class Quantization(BaseModel):
    """Weights that are stored in 4 bits of bitsandbytes already, and the settings that they bring along."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quant_type: Literal["nf4", "fp4"]
    double_quant: bool
    compute_dtype: Literal["bfloat16", "float16", "float32"]


class Vision(BaseModel):
    """A vision tower, in the words of :mod:`memplan.towers`, where ``kind`` is its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    depth: int = Field(gt=0, le=1 << 10)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    hidden_act: str
    channels: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    temporal_patch_size: int = Field(default=1, gt=0)
    merge_size: int = Field(gt=0)  # patches along each axis that become a token
    out_hidden_size: int = Field(gt=0)
    num_positions: int = Field(gt=0)
    deepstack: tuple[int, ...] = ()  # blocks whose hidden states go into the first decoder layers, too


class ModelSpec(BaseModel):
    """A decoder-only language model, and what it sees with. Names are those of transformers' configurations.

    ``layer_types``, ``sparse_layers`` and ``rotated_layers`` have one entry a layer. Sizes are counts of
    elements.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    hub_id: str | None = None
    architecture: str
    model_type: str
    published_parameters: int | None = None

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    global_head_dim: int | None = None  # of layers with full attention, where theirs is another
    num_global_key_value_heads: int | None = None  # of these
    attention_k_eq_v: bool = False  # and their keys are their values
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False  # of the output projection, where a family has that apart
    mlp_bias: bool = False
    hidden_act: str = "silu"
    partial_rotary_factor: float = 1.0
    longrope: bool = False  # keeps a second table of frequencies, for long sequences
    use_qk_norm: bool = False  # norms over each head of queries and keys, where a family leaves the choice
    attention_dropout: float = 0.0
    use_parallel_residual: bool = (
        False  # attention and MLP are side by side, where a family leaves the choice
    )
    resid_dropout: float = 0.0  # between a module and the residual
    residual_dropout: float = 0.0  # inside attention and MLP, at their end

    sliding_window: int | None = None
    layer_types: tuple[LayerKind, ...] = ()
    rotated_layers: tuple[bool, ...] = ()  # which turn queries and keys; empty: all of them
    num_kv_shared_layers: int = 0  # the last ones, which take keys and values from one before them
    use_double_wide_mlp: bool = False  # and have MLPs of twice the width
    reuses_kv: bool = False  # of such a layer, as `of` gives it
    hidden_size_per_layer_input: int = 0  # of embeddings that each layer has of its own
    vocab_size_per_layer_input: int = 0
    linear_key_heads: int = 0  # of layers with linear attention
    linear_value_heads: int = 0
    linear_key_dim: int = 0  # of each head
    linear_value_dim: int = 0
    linear_conv_kernel: int = 0  # tokens
    q_lora_rank: int = 0  # of latent attention (memplan.parts.latent): between queries' projections, if two
    kv_lora_rank: int = 0  # the latent itself
    qk_nope_head_dim: int = 0  # of each head beside head_dim, which is rotated
    v_head_dim: int = 0
    rope_interleave: bool = True  # neighbouring columns turn together
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    logits_scaling: float | None = None  # which logits are divided by
    logit_scale: float | None = None  # or multiplied

    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    shared_expert_intermediate_size: int = 0  # of what every token goes through beside its experts
    n_group: int = 1  # experts are chosen from some groups of them
    topk_group: int = 1
    router_aux_loss_coef: float = 0.0  # the weight of the load-balancing loss, where a trainer asks for it
    sparse_layers: tuple[bool, ...] = ()

    vision: Vision | None = None
    text_cache: bool = False  # its language model has a use_cache of its own, which trainers leave on

    quantization: Quantization | None = None
    mxfp4: bool = False  # its experts are published so, and loading unpacks them

    @property
    def qk_head_dim(self) -> int:
        """Of each head of queries and keys."""
        return self.qk_nope_head_dim + self.head_dim

    def of(self, kind: str, *, reuses_kv: bool = False) -> ModelSpec:
        """The same, as its layers of a kind of attention have it; ``reuses_kv``: those of them that take keys
        and values from another."""
        found = self
        if self.global_head_dim is not None:
            found = self._globally if kind == "full_attention" else self._locally
        return found._reusing if reuses_kv else found

    @cached_property
    def kv_sharing(self) -> tuple[KVSharing, ...]:
        """Of each layer, what it does with keys and values: the last of each kind before those that reuse
        some stores its own (transformers 5.23, ``kv_sharing_modes``)."""
        if not self.num_kv_shared_layers:
            return (None,) * self.num_hidden_layers
        own = self.layer_types[: -self.num_kv_shared_layers]
        last = {kind: index for index, kind in enumerate(own)}
        modes: list[KVSharing] = ["store" if last[kind] == index else None for index, kind in enumerate(own)]
        modes += ["reuse"] * self.num_kv_shared_layers
        return tuple(modes)

    @cached_property
    def _globally(self) -> ModelSpec:
        heads = self.num_global_key_value_heads or self.num_key_value_heads
        changes = {"head_dim": self.global_head_dim, "num_key_value_heads": heads, "global_head_dim": None}
        return self.model_copy(update=changes)

    @cached_property
    def _locally(self) -> ModelSpec:
        return self.model_copy(update={"attention_k_eq_v": False, "global_head_dim": None})

    @cached_property
    def _reusing(self) -> ModelSpec:
        wide = 2 if self.use_double_wide_mlp else 1
        return self.model_copy(update={"intermediate_size": wide * self.intermediate_size, "reuses_kv": True})

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is no multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        shared = self.num_global_key_value_heads
        if shared and self.num_attention_heads % shared:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is no multiple of "
                f"num_global_key_value_heads ({shared})"
            )
        if self.linear_key_heads and self.linear_value_heads % self.linear_key_heads:
            raise ValueError(
                f"linear_num_value_heads ({self.linear_value_heads}) is no multiple of "
                f"linear_num_key_heads ({self.linear_key_heads})"
            )
        if self.num_experts and not 0 < self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and "
                f"the number of experts ({self.num_experts})"
            )
        for name in ("layer_types", "sparse_layers", "rotated_layers"):
            length = len(getattr(self, name))
            if length not in (0, self.num_hidden_layers):
                raise ValueError(f"{name} has {length} entries for {self.num_hidden_layers} layers")
        return self
