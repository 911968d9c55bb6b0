"""Qwen3-VL's: patches of two frames, positions between those of a learned grid, tokens of two by two
patches, and features of three blocks that go past the decoder's first layers (transformers 5.23,
models/qwen3_vl).

P patches and T tokens of all images, E the tower's width, H heads of D.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from memplan.asked.fields import MAX_LAYERS, Fields
from memplan.asked.spec import Vision
from memplan.errors import shown
from memplan.parts.context import Leaves
from memplan.parts.module import Module, Modules, linear, norm
from memplan.parts.rotary import rope
from memplan.shadow import ops
from memplan.shadow.images import join, split, unbind
from memplan.shadow.tensor import Tensor, empty, float32, no_grad, state
from memplan.towers import PLAIN, Features, Grid, Look, Pictures, Plain, Run, Tower, _qwen

# preprocessor_config.json of Qwen/Qwen3-VL-8B-Instruct: size.shortest_edge and longest_edge, in pixels
_LEAST, _MOST = 256 * 256, 4096 * 4096

_DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def _read(fields: Fields, hidden: int) -> Vision:
    fields = fields.inside(fields.config, _DEFAULTS)
    blocks, depth = fields.get("deepstack_visual_indexes"), fields.size("depth", most=MAX_LAYERS)
    if not isinstance(blocks, list) or not all(type(one) is int and 0 <= one < depth for one in blocks):
        fields.fail(
            f"deepstack_visual_indexes is {shown(blocks)}, but it must list blocks from 0 to {depth - 1}"
        )
    return Vision(
        kind="qwen3_vl",
        depth=depth,
        num_positions=fields.size("num_position_embeddings"),
        deepstack=tuple(blocks),
        temporal_patch_size=fields.size("temporal_patch_size", most=64),
        **_qwen.common(fields, hidden, "out_hidden_size"),
    )


# -- modules ------------------------------------------------------------------------------------------------


def _modules(vision: Vision) -> Modules:
    width, inner = vision.hidden_size, vision.intermediate_size
    kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    made: Modules = {
        "patch_embed.proj": Module("conv", {"weight": (width, vision.channels, *kernel), "bias": (width,)}),
        "pos_embed": Module("embedding", {"weight": (vision.num_positions, width)}),
    }
    for number in range(vision.depth):
        block = f"blocks.{number}"
        made[f"{block}.norm1"] = norm(width, bias=True)
        made[f"{block}.norm2"] = norm(width, bias=True)
        made[f"{block}.attn.qkv"] = linear(width, 3 * width, True)
        made[f"{block}.attn.proj"] = linear(width, width, True)
        made[f"{block}.mlp.linear_fc1"] = linear(width, inner, True)
        made[f"{block}.mlp.linear_fc2"] = linear(inner, width, True)
    made.update(_merger(vision, "merger", width))
    for number in range(len(vision.deepstack)):
        made.update(_merger(vision, f"deepstack_merger_list.{number}", width * vision.merge_size**2))
    return made


def _merger(vision: Vision, name: str, normed: int) -> Modules:
    wide = vision.hidden_size * vision.merge_size**2
    return {
        f"{name}.norm": norm(normed, bias=True),
        f"{name}.linear_fc1": linear(wide, wide, True),
        f"{name}.linear_fc2": linear(wide, vision.out_hidden_size, True),
    }


# -- forward ------------------------------------------------------------------------------------------------


class _Context(NamedTuple):
    """What each block is given beside hidden states."""

    attend: Look
    name: str
    seen: Pictures
    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor
    # what attention and checkpointing read of a decoder's
    spec: Plain = PLAIN
    mask: None = None
    causal: bool = False
    per_layer_input: None = None


def _forward(m: Leaves, fed: dict[str, Tensor], seen: Pictures, attend: Look, run: Run) -> Features:
    """``get_image_features``."""
    state.tape.module = TOWER.root
    pixels = ops.to(fed["pixel_values"], m["patch_embed.proj"].weight.dtype)
    hidden, tokens, deepstack = _visual(m, pixels, seen, attend, run)
    state.tape.module = "model"
    product = _qwen.image_sizes(seen)
    del product
    parts = split(tokens, 0, seen.number)
    stacked = [split(one, 0, seen.number) for one in deepstack]
    del pixels, tokens, deepstack
    return Features(parts, stacked, hidden)


def _visual(
    m: Leaves, pixels: Tensor, seen: Pictures, attend: Look, run: Run
) -> tuple[Tensor, Tensor, list[Tensor]]:
    interp_indices, interp_weights = _qwen.interpolation(seen)
    position_ids = _qwen.position_ids(seen)
    cu_seqlens = _qwen.cumulative_lengths(seen)
    hidden_states = m["patch_embed.proj"](pixels, seen.patches)
    looked_up = m["pos_embed"](interp_indices)
    state.tape.module = TOWER.root
    weights = ops.view(interp_weights, (*interp_weights.shape, 1))
    weighed = ops.mul(looked_up, weights)
    del looked_up
    pos_embeds = ops.sum_over(weighed, 1)
    del weighed
    hidden_states = ops.add(hidden_states, ops.to(pos_embeds, hidden_states.dtype))
    with no_grad():
        cos, sin = _rotary(seen, position_ids)
    deepstack = []
    for number in range(seen.vision.depth):
        block = f"blocks.{number}."
        leaves = {name.removeprefix(block): leaf for name, leaf in m.items() if name.startswith(block)}
        context = _Context(attend, f"{TOWER.root}.{block}", seen, cos, sin, cu_seqlens)
        hidden_states = run(_block, leaves, hidden_states, context)
        del context
        if number in seen.vision.deepstack:
            place = seen.vision.deepstack.index(number)
            deepstack.append(_merge(m, f"deepstack_merger_list.{place}", hidden_states, seen, late=True))
    merged = _merge(m, "merger", hidden_states, seen, late=False)
    del interp_indices, interp_weights, position_ids, cu_seqlens, pos_embeds, cos, sin
    return hidden_states, merged, deepstack


def _rotary(seen: Pictures, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """``Qwen3VLVisionRotaryEmbedding``: a quarter of each head's columns for rows, and one for columns."""
    head_dim = seen.vision.hidden_size // seen.vision.num_heads
    state.tape.module = f"{TOWER.root}.rotary_pos_emb"
    position = ops.pointwise("_to_copy", position_ids, dtype=float32)
    freqs = empty((seen.patches, 2, head_dim // 4), float32, "mul")
    del position
    cos = ops.scale(ops.pointwise("cos", freqs))
    sin = ops.scale(ops.pointwise("sin", freqs))
    cos = _recomposed(seen, head_dim)
    sin = _recomposed(seen, head_dim)
    del freqs
    return cos, sin


def _recomposed(seen: Pictures, head_dim: int) -> Tensor:
    """``recomposition_frequencies``."""
    half = empty((seen.patches, head_dim // 4 * 2), float32, "cat")
    out = empty((seen.patches, head_dim // 4 * 4), float32, "cat")
    del half
    return out


def _block(m: Leaves, hidden_states: Tensor, context: Any) -> Tensor:
    attended = _attention(m, m["norm1"](hidden_states), context)
    state.tape.module = context.name
    hidden_states = ops.add(hidden_states, attended)
    del attended
    inner = _mlp(m, m["norm2"](hidden_states), context)
    state.tape.module = context.name
    hidden_states = ops.add(hidden_states, inner)
    del inner
    return hidden_states


def _mlp(m: Leaves, x: Tensor, context: _Context) -> Tensor:
    out: Tensor = m["mlp.linear_fc2"](_activated(m["mlp.linear_fc1"](x), f"{context.name}mlp.act_fn"))
    return out


def _activated(x: Tensor, name: str) -> Tensor:
    state.tape.module = name
    return ops.activation("gelu", x)


def _attention(m: Leaves, x: Tensor, context: _Context) -> Tensor:
    vision, patches = context.seen.vision, context.seen.patches
    heads = vision.num_heads
    head_dim = vision.hidden_size // heads
    qkv = ops.reshape(m["attn.qkv"](x), (patches, 3, heads, head_dim))
    state.tape.module = f"{context.name}attn"
    query, key, value = unbind(ops.permute(qkv, (1, 0, 2, 3)))
    del qkv
    query, key = _rotate(query, key, context)
    query, key, value = (_heads_first(one) for one in (query, key, value))
    lengths = _qwen.lengths(context.seen)
    splits = [split(one, 2, context.seen.number) for one in (query, key, value)]
    attended = [context.attend(q, k, v, context)[0] for q, k, v in zip(*splits, strict=True)]
    output = join(attended, 1)
    output = ops.reshape(output, (patches, vision.hidden_size))
    out: Tensor = m["attn.proj"](output)
    del lengths
    return out


def _rotate(query: Tensor, key: Tensor, context: _Context) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb_vision``: in fp32."""
    dtypes = query.dtype, key.dtype
    query, key = ops.to(query, float32), ops.to(key, float32)
    shape = (context.cos.shape[0], 1, context.cos.shape[1])
    cos, sin = ops.view(context.cos, shape), ops.view(context.sin, shape)
    q_embed = rope(query, cos, sin)
    k_embed = rope(key, cos, sin)
    q_embed = ops.to(q_embed, dtypes[0])
    k_embed = ops.to(k_embed, dtypes[1])
    return q_embed, k_embed


def _heads_first(x: Tensor) -> Tensor:
    """[P, H, D] to [1, H, P, D]."""
    x = ops.transpose(x, 0, 1)
    return ops.view(x, (1, *x.shape))


def _merge(m: Leaves, name: str, x: Tensor, seen: Pictures, *, late: bool) -> Tensor:
    """Two by two patches side by side; ``late``: normed when they are."""
    vision = seen.vision
    shape = (seen.tokens, vision.hidden_size * vision.merge_size**2)
    x = m[f"{name}.norm"](ops.view(x, shape) if late else x)
    x = ops.view(x, shape)
    x = m[f"{name}.linear_fc2"](_activated(m[f"{name}.linear_fc1"](x), f"{TOWER.root}.{name}.act_fn"))
    return x


def _grid(vision: Vision, width: int, height: int) -> Grid:
    return _qwen.grid(width, height, vision.patch_size, vision.merge_size, _LEAST, _MOST)


TOWER = Tower(
    root="model.visual",
    read=_read,
    modules=_modules,
    grid=_grid,
    batch=_qwen.batch,
    forward=_forward,
)
