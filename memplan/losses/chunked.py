"""TRL's fused head: log-probabilities tile by tile, and SFTTrainer's loss of them.

Sources (trl 1.16): trainer/utils.py ``add_fused_lm_head``, kernels/chunked_logprob.py
``ChunkedLogProbFunction``, trainer/sft_trainer.py ``SFTTrainer.compute_loss``. The Triton kernels that fold a
tile into the running sums work in place. N tokens whose label counts: all but the last of each sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.libraries import Library
from memplan.losses import Labels, Loss, Patch, StandIns
from memplan.parts.experts import top_k
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, save, save_output, split_sum, unpack
from memplan.shadow.indexing import by_mask, masked_scatter
from memplan.shadow.tensor import DType, Tensor, bool_, empty, float32, int32, int64, state

TOKEN_CHUNK = 4096  # TOKEN_CHUNK_SIZE
VOCABULARY_CHUNK = 32_768  # _CHUNKED_LOGPROB_CHUNK_SIZE


class Output(NamedTuple):
    """``FusedCausalLMOutput``."""

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor
    label_mask: Tensor
    aux_loss: Tensor | None
    items: Tensor | None  # of the labels


def _head(
    head: Any, hidden: Tensor, labels: Labels, router_logits: list[Tensor] | None, spec: ModelSpec
) -> tuple[Output, None]:
    state.tape.module = "loss"
    return fused_head(hidden, head.weight, labels, router_logits, spec), None


def fused_head(
    hidden: Tensor, weight: Tensor, labels: Labels, router_logits: list[Tensor] | None, spec: ModelSpec
) -> Output:
    """``_fused_forward`` after the decoder; ``router_logits`` where the load-balancing loss is added."""
    hidden_states = _all_but_last(hidden)
    mask = empty((labels.shape[0], labels.shape[1] - 1), bool_, "ne")
    counted = labels.counted
    per_token = _log_probabilities(
        by_mask(hidden_states, mask, counted), weight, by_mask(labels, mask, counted)
    )
    log_probs, entropy, is_top1 = (masked_scatter(mask, x) for x in per_token)
    del per_token
    loss = ops.divide(ops.neg(_total(log_probs)), _count(mask))
    aux_loss = None
    if router_logits is not None:
        aux_loss = load_balancing_loss(router_logits, labels, spec)
        loss = ops.add(loss, ops.scale(aux_loss))
        router_logits.clear()
    return Output(loss, log_probs, entropy, is_top1, mask, aux_loss, labels.items)


def sft_loss(output: Output) -> Tensor:
    """``compute_loss``: the loss once more, and what is logged."""
    per_token_loss = ops.neg(output.log_probs)
    num_tokens = ops.count(output.label_mask.shape) if output.items is None else output.items
    total = _total(per_token_loss)
    loss = ops.divide(total, empty((), int64, "clamp"))
    del total
    weighted_aux_loss = None if output.aux_loss is None else ops.scale(output.aux_loss)
    if output.items is not None:
        loss = ops.scale(loss)  # by the number of processes
    if weighted_aux_loss is not None:
        loss = ops.add(loss, ops.scale(weighted_aux_loss, "div"))
    num_valid = _gathered(ops.count(output.label_mask.shape))
    entropy_sum = _gathered(empty((), float32, "sum"))
    num_correct = _gathered(ops.count(output.is_top1.shape))
    for _ in range(2):
        positive = empty((), bool_, "gt")
        del positive
        quotient = empty((), float32, "div")
        del quotient
    total = _gathered(empty((), int64, "sum"))  # of the attention mask
    del total
    if weighted_aux_loss is not None:
        mean = empty((), float32, "mean")
        del mean
    del num_tokens, num_valid, entropy_sum, num_correct
    return loss


def load_balancing_loss(router_logits: list[Tensor], labels: Labels, spec: ModelSpec) -> Tensor:
    """``load_balancing_loss_func``, with a mask or without (transformers/models/mixtral/modeling_mixtral.py,
    5.23). T tokens, X experts."""
    experts, tokens = (spec.num_experts,), labels.shape[0] * labels.shape[1]
    chosen = tokens * spec.num_experts_per_tok
    tokens_per_expert_sum = empty(experts, float32, "zeros")
    router_prob_sum = empty(experts, float32, "zeros")
    total_rows: Tensor | None = None
    flat_mask = empty((tokens,), float32, "_to_copy") if labels.masked else None
    for layer_gate in router_logits:
        dtype = layer_gate.dtype if state.autocast is None else float32
        routing_weights_TX = ops.softmax(layer_gate, dtype)
        _values, _selected_experts = top_k(routing_weights_TX, spec.num_experts_per_tok)
        if flat_mask is None:
            histc_input = empty((chosen,), int32, "_to_copy")
            counts = empty(experts, int32, "histc")
            del histc_input
        else:
            counts = empty(experts, float32, "zeros")
            repeated = empty((chosen,), float32, "clone")
            del repeated
        tokens_per_expert_sum = ops.add(tokens_per_expert_sum, counts)
        del counts
        router_prob_sum = ops.add(router_prob_sum, _sum_tokens(_masked(routing_weights_TX, flat_mask)))
        if flat_mask is not None:
            rows = empty((), float32, "sum")
            total_rows = ops.pointwise("add", rows, total_rows)
            del rows
    tokens_per_expert = ops.pointwise("div", tokens_per_expert_sum)
    router_prob_per_expert = (
        ops.scale(router_prob_sum, "div") if total_rows is None else ops.divide(router_prob_sum, total_rows)
    )
    weighted = ops.mul(tokens_per_expert, ops.view(router_prob_per_expert, (1, *experts)))
    overall_loss = _total(weighted)
    del weighted
    return ops.scale(overall_loss)


def _masked(routing_weights_TX: Tensor, flat_mask: Tensor | None) -> Tensor:
    """``routing_weights.float() * flat_mask.unsqueeze(-1)``."""
    wide = ops.to(routing_weights_TX, float32)
    return wide if flat_mask is None else ops.mul(wide, ops.view(flat_mask, (flat_mask.shape[0], 1)))


def _sum_tokens(x: Tensor) -> Tensor:
    """``x.sum(dim=0)``."""
    node = Node(ops._expand_backward, x) if ops.tracked(x) else None
    out = empty(x.shape[1:], x.dtype, "sum")
    split_sum(x.shape)
    if node is not None:
        attach(node, out)
    return out


def _all_but_last(hidden: Tensor) -> Tensor:
    """``last_hidden_state[:, :-1]``."""
    batch, length, width = hidden.shape
    return ops.narrow(hidden, (batch, length - 1, width))


def _total(x: Tensor) -> Tensor:
    """``x.sum()``."""
    node = Node(ops._expand_backward, x) if ops.tracked(x) else None
    out = empty((), x.dtype, "sum")
    if node is not None:
        attach(node, out)
    return out


def _count(mask: Tensor) -> Tensor:
    """``mask.sum().clamp(min=1)``."""
    count = ops.count(mask.shape)
    clamped = empty((), int64, "clamp")
    del count
    return clamped


def _gathered(own: Tensor) -> Tensor:
    """``gather_for_metrics(x.sum()).sum()``, of the ``own`` sum (accelerate 1.15 utils/operations.py,
    ``_gpu_gather_one``)."""
    if state.spread is None:
        return empty((), own.dtype, "sum")
    row = empty((1,), own.dtype, "clone")
    every = empty((state.spread.world,), own.dtype, "gather")
    del row
    del own
    total = empty((), every.dtype, "sum")
    del every
    return total


def _log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forward: log-probabilities, entropy, whether the target comes first."""
    shape = (hidden.shape[0],)
    dtype = state.autocast or hidden.dtype
    node = Node(_log_probabilities_backward, hidden, weight) if ops.tracked(hidden, weight) else None
    running = [empty(shape, float32, "full" if i in (0, 5) else "zeros") for i in range(7)]
    _buffers = _tiles(hidden, weight, dtype, keep_rows=False)
    log_sums = empty(shape, float32, "log")
    log_z = empty(shape, float32, "add")
    del log_sums
    log_probs = empty(shape, float32, "sub")
    mean = empty(shape, float32, "div")
    entropy = empty(shape, float32, "sub")
    del mean
    at_least = empty(shape, bool_, "ge")
    above = empty(shape, bool_, "gt")
    is_top1 = empty(shape, bool_, "bitwise_and")
    del at_least, above, running
    if node is not None:
        node.saved = [save(hidden), save(weight), save(targets), save_output(log_z), save_output(entropy)]
        node.context = dtype
        attach(node, log_probs)
    return log_probs, entropy, is_top1


def _log_probabilities_backward(node: Node, grad: Tensor) -> Any:
    """All of its names live until it returns."""
    hidden, weight, *_rest = [unpack(saved) for saved in node.saved]
    grad_hidden = empty(hidden.shape, float32, "zeros") if node.edges[0] else None
    grad_weight = empty(weight.shape, float32, "zeros") if node.edges[1] else None
    _buffers = _tiles(hidden, weight, node.context, keep_rows=True)
    return (
        None if grad_hidden is None else ops.to(grad_hidden, hidden.dtype),
        None if grad_weight is None else ops.to(grad_weight, weight.dtype),
    )


def _tiles(hidden: Tensor, weight: Tensor, dtype: DType, *, keep_rows: bool) -> list[Tensor | None]:
    """The buffer of one tile of logits, and copies of its tokens and of its rows of the weight where dtypes
    differ. Returns what is left in names at the end: backward has one for the rows, forward has not."""
    tokens, width = hidden.shape
    vocabulary = weight.shape[0]
    buffer = empty((min(tokens, TOKEN_CHUNK), VOCABULARY_CHUNK), dtype, "empty")
    hidden_chunk = rows = None
    for start in range(0, tokens, TOKEN_CHUNK):
        if hidden.dtype is not dtype:
            hidden_chunk = empty((min(TOKEN_CHUNK, tokens - start), width), dtype, "_to_copy")
        for row in range(0, vocabulary, VOCABULARY_CHUNK):
            if weight.dtype is not dtype:
                rows = empty((min(VOCABULARY_CHUNK, vocabulary - row), width), dtype, "_to_copy")
            state.tape.multiply()
            if not keep_rows:
                rows = None
    return [buffer, hidden_chunk, rows]


# -- TRL's own code --------------------------------------------------------------------------------------


def _attach(base: Any) -> None:
    """As ``SFTTrainer.__init__``."""
    from trl.trainer.utils import add_fused_lm_head

    config = base.config.get_text_config()
    if hasattr(config, "router_aux_loss_coef"):
        config.output_router_logits = aux_loss_enabled(config)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))


def aux_loss_enabled(config: Any) -> bool:
    """Whether SFTTrainer adds a mixture of experts' load-balancing loss: where the config weighs it."""
    return hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0) != 0.0


def _loss_of(model: Any, run: Callable[..., Any], batch: dict[str, Any]) -> Any:
    from trl.trainer.sft_trainer import SFTTrainer

    inputs = dict(batch)
    items = inputs.pop("num_items_in_batch", None)
    return SFTTrainer.compute_loss(_sft_trainer(model), run, inputs, num_items_in_batch=items)


def _sft_trainer(model: Any) -> Any:
    """What ``SFTTrainer.compute_loss`` reads of its trainer: one process, the default loss."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    return SimpleNamespace(
        model=model,
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=True),
        accelerator=SimpleNamespace(
            parallelism_config=None, gather_for_metrics=lambda tensor: tensor, num_processes=1
        ),
        get_tp_size=lambda: 1,
        current_gradient_accumulation_steps=1,
        compute_loss_func=None,
        label_smoother=None,
        aux_loss_enabled=aux_loss_enabled(config),
        router_aux_loss_coef=getattr(config, "router_aux_loss_coef", 0.0),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def _patches(stand_ins: StandIns, card: Card) -> list[Patch]:
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    return [
        *((module, "_use_triton", lambda device: True) for module in (chunked_logprob, utils)),
        *((chunked_logprob, name, stand_ins.launch()) for name in ("_forward_kernel", "_backward_kernel")),
        (chunked_logprob, "_addmm_fp32", stand_ins.on_cuda(chunked_logprob._addmm_fp32)),
        (chunked_logprob, "triton", SimpleNamespace(cdiv=_ceiling)),  # it comes with CUDA's torch
    ]


def _ceiling(number: int, divisor: int) -> int:
    return -(-number // divisor)


LOSS = Loss(
    _head,
    sft_loss,
    sft=True,
    library=Library("trl", "1.16", "trl"),
    attach=_attach,
    loss_of=_loss_of,
    patches=_patches,
    answers={"compute_loss": 1, "_fused_forward": True},  # what is logged; which labels count
)
