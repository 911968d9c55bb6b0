"""Tensor parallel as transformers sets it up when a model is loaded with ``tp_plan="auto"``
(transformers 5.23 distributed/tensor_parallel.py, distributed/mixin.py; torch/distributed/tensor, 2.13).

Each rank keeps a part of every matrix, as a DTensor: rows of queries, keys, values, gate and up, whose
outputs are its heads and its part of the MLP (``colwise``); columns of the projections behind them, whose
outputs are summed over the ranks (``rowwise``); rows of the embedding, a part of the vocabulary, whose
outputs are summed, too (``embedding_rowwise``); and rows of the output layer, whose logits are gathered on
all (``colwise_gather_output``). Of experts, which share parameters, gate and up are divided by rows and the
projections behind them by columns, and sums are made in place (``moe_tp_experts``). Norms and routers are
whole on each, and so are hidden states, logits and the batch.

Sums are made into new tensors (``_functional_collectives.all_reduce``), forward behind what is rowwise,
backward in front of what is colwise. The gradient of the embedding is that of the whole vocabulary on each
rank; the optimizer takes this rank's part of it, in a tensor that is there while it runs. Where the output
layer has the embedding's weight, that part is added to its gradient before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import gcd, prod
from typing import Any

from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.foreach import partial_norms
from memplan.errors import RecipeError
from memplan.optimizers import Group
from memplan.optimizers._lists import gradient, release
from memplan.parts.leaves import Base, Embedding, embedding_backward
from memplan.parts.loop import Loop
from memplan.shadow import ops
from memplan.shadow.autograd import Node, attach, require_grad
from memplan.shadow.spread import Spread
from memplan.shadow.tensor import (
    DType,
    Shape,
    Storage,
    Tensor,
    bool_,
    category,
    empty,
    float32,
    int64,
    state,
    uint8,
)
from memplan.strategies import HEAD, Part, Strategy
from memplan.tape import Category, Phase

COLWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWWISE = ("o_proj", "down_proj")
_EMBEDDING = "model.embed_tokens"


class Tp(Spread):
    """A step on one rank; all of them are alike."""

    def __init__(self, recipe: Recipe, rank: int | None = None) -> None:
        super().__init__(recipe.gpus, rank)
        self.vocabulary: Tensor | None = None  # what the optimizer updates of the embedding
        self.table: Tensor | None = None  # what is computed with
        self.tied = False
        self.groups: list[Group] = []
        self.clips, self.optimizer = bool(recipe.max_grad_norm), recipe.optimizer

    # -- what rests --------------------------------------------------------------------------------------

    def begin(self, part: Part) -> None:
        """The embedding comes as the output layer where that has its weight."""
        self.tied |= part == HEAD and self.table is None

    def parameter(self, shape: Shape, dtype: DType, kind: Category, trainable: bool) -> Tensor | None:
        """This rank's part. Of an embedding whose gradient stays whole, what is computed with says the whole
        shape and has the part's memory."""
        name = state.tape.module
        if _divided_by(name) is None:
            return None
        # PEFT makes adapters as the layer's own part is
        local = shape if kind is Category.ADAPTERS else part_of(name, shape, self.world)
        with category(kind):
            part = empty(local, dtype, "parameter")
        if trainable:
            require_grad(part, parameter=True)
        if name != _EMBEDDING:
            return part
        self.vocabulary = self.table = part
        if self.tied:
            return part
        self.table = Tensor(shape, dtype, part.storage)
        if trainable:
            require_grad(self.table, parameter=True)
            part.node = self.table.node
        return self.table

    def updated(self, parameter: Tensor) -> Tensor:
        """Its part of the embedding."""
        if parameter is self.table:
            assert self.vocabulary is not None
            return self.vocabulary
        return parameter

    # -- forward -----------------------------------------------------------------------------------------

    def leaf(self, name: str, module: Any) -> Any:
        """With hooks around it."""
        short = name.rpartition(".")[2]
        if short in COLWISE:
            return _Colwise(module)
        return _Rowwise(module) if short in ROWWISE else module

    def module(self, name: str, run: Callable[..., Any], x: Tensor | None, *rest: Any) -> Any:
        """PEFT hooks the second matrix of an adapter around what is colwise as that itself."""
        before, _, last = name.rpartition(".")
        if last == "lora_B" and before.rpartition(".")[2] in COLWISE:
            assert x is not None
            x = _replicated(x)
        return run(x, *rest)

    def stacked(self, weights: Tensor) -> Tensor:
        """``_use_local_dtensor_params``: ``to_local`` before anything else, behind which gradients wait until
        all of the experts' are there."""
        if not ops.tracked(weights):
            return weights
        node = Node(_passed_on, weights)
        node.python = True
        out = weights.detach()
        attach(node, out)
        return out

    def embed(self, run: Any, ids: Tensor) -> Tensor:
        """``EmbeddingParallel``: ids outside of this rank's part are masked (``_MaskPartial``)."""
        embedding: Embedding = run
        state.tape.module = _EMBEDDING
        below, above = (empty(ids.shape, bool_, "compare") for _ in range(2))
        mask = empty(ids.shape, bool_, "bitwise_or")
        del below, above
        cloned = empty(ids.shape, int64, "clone")
        masked = empty(ids.shape, int64, "sub")
        del cloned
        weight = embedding.weight
        backward = _tied_backward if self.tied else embedding_backward
        node = Node(backward, weight) if ops.tracked(weight) else None
        shape = (*ids.shape, weight.shape[1])
        partial = empty(shape, weight.dtype, "embedding")
        del masked
        del mask
        out = empty(shape, weight.dtype, "all_reduce")
        if node is not None:
            node.saved = ids
            node.context = (weight.shape[0] * self.world, weight.shape[1]) if self.tied else weight.shape
            attach(node, out)
        out = embedding.finished(out)
        del partial
        return out

    def head(self, head: Any) -> Any:
        """Gathers its logits."""
        return _Head(head, self.world)

    # -- the step ----------------------------------------------------------------------------------------

    def rest(self, groups: list[Group]) -> None:
        """What is clipped."""
        self.groups = groups

    def clip(self, loop: Loop[Tensor] | None) -> bool:
        """``Trainer._mixed_mesh_grad_norm`` (transformers 5.23 trainer.py): a norm of all that is divided and
        one of the rest, in the order of parameters."""
        tape = state.tape
        tape.begin(Phase.OPTIMIZER, "norms")
        if loop is not None:
            loop.clipping()
        tape.module = "clip_grad_norm_"
        with category(Category.TEMPORARIES):
            kinds = dict.fromkeys(map(_is_divided, _parameters(self.groups)))
            norms = [self._norm(divided) for divided in kinds]
            tape.begin(Phase.OPTIMIZER, "total norm")
            stacked = empty((len(norms),), norms[0].dtype, "stack")
            total = empty((), stacked.dtype, "linalg_vector_norm")
            del stacked
            for _ in kinds if self.clips else ():
                raised = empty((), float32, "add")
                inverse = empty((), float32, "reciprocal")
                coefficient = empty((), float32, "mul")
                del raised, inverse
                clamped = empty((), float32, "clamp")
                del coefficient, clamped
        if loop is not None:
            loop.clipped(total)
        return True

    def _norm(self, divided: bool) -> Tensor:
        """``get_total_norm`` of the gradients of what is divided, or of what is not."""
        tape = state.tape
        chosen = [
            (group, [one for one in group.parameters if _is_divided(one) is divided]) for group in self.groups
        ]
        chosen = [(group, parameters) for group, parameters in chosen if parameters]
        first = chosen[0][1][0]
        name = "divided" if divided else "whole"
        tape.begin(Phase.OPTIMIZER, f"partial norms, {name}")
        count = sum(group.repeat * len(parameters) for group, parameters in chosen)
        longest = max(prod(self._gradient(one)) for _, parameters in chosen for one in parameters)
        partial = empty((partial_norms(count, longest),), uint8, "_foreach_norm")
        norms: list[tuple[int | None, list[Storage]]] = []
        for group, parameters in chosen:
            tape.begin(Phase.OPTIMIZER, f"norms, {name}", group.layer)
            made = [Storage(first.dtype.itemsize, "_foreach_norm") for _ in parameters]
            norms.append((group.layer, made))
        tape.begin(Phase.OPTIMIZER, f"norms, {name}, done")
        del partial
        # the norm of a gradient that is whole is made one of the parts that the others are of
        whole = empty((), first.dtype, "partition") if divided and self._whole() else None
        stacked = empty((count,), first.dtype, "stack")
        del whole
        if divided:  # _NormPartial: squares are summed over the ranks
            squares = empty(stacked.shape, stacked.dtype, "pow")
            summed = empty(stacked.shape, stacked.dtype, "all_reduce")
            everywhere = empty(stacked.shape, stacked.dtype, "pow")
            del squares, summed
            total = empty((), first.dtype, "linalg_vector_norm")
            del everywhere
        else:
            total = empty((), first.dtype, "linalg_vector_norm")
        del stacked
        release(norms, f"free norms, {name}")
        return total

    def _whole(self) -> bool:
        """Whether this rank has all of the embedding's gradient."""
        part = self.vocabulary
        return part is not None and part is not self.table and gradient(part) is not None

    def _gradient(self, parameter: Tensor) -> Shape:
        """The shape of its gradient."""
        whole = self.table if parameter is self.vocabulary else parameter
        assert whole is not None
        return whole.shape

    def stepping(self) -> list[Tensor]:
        """This rank's part of the embedding's gradient: for as long as its one kernel runs, or for each
        operation on lists that reads it, once or twice, before AdamW's roots are taken."""
        part = self.vocabulary
        if part is None or not self._whole():
            return []
        state.tape.module = _EMBEDDING
        if self.optimizer != "adamw_torch":
            return [empty(part.shape, part.dtype, "clone")]
        for reads in (1, 2):  # _foreach_lerp_, _foreach_addcmul_
            copies = [empty(part.shape, part.dtype, "clone") for _ in range(reads)]
            del copies
        return []


def _parameters(groups: list[Group]) -> Iterator[Tensor]:
    return (parameter for group in groups for parameter in group.parameters)


def _is_divided(parameter: Tensor) -> bool:
    assert parameter.storage is not None
    return _divided_by(state.tape.modules[parameter.storage.index]) is not None


def part_of(name: str, shape: Shape, world: int) -> Shape:
    """The shape of a rank's part of a parameter, by the name of that or of its module."""
    by = _divided_by(name.removesuffix(".weight").removesuffix(".bias"))
    axis = {"rows": max(len(shape) - 2, 0), "columns": len(shape) - 1}.get(by or "")
    return tuple(size // world if at == axis else size for at, size in enumerate(shape))


def _divided_by(name: str) -> str | None:
    """Whether a module's matrices are divided by rows or columns; of experts all of them are alike."""
    if name in (_EMBEDDING, "lm_head"):
        return "rows"
    *_, module, last = ("", *name.split("."))
    if last in (*COLWISE, "gate_up_proj") or (last == "lora_B" and module in COLWISE):
        return "rows"
    return "columns" if last in ROWWISE else None


class _Hooked(Base):
    """A linear layer with hooks around it."""

    __slots__ = ("base",)

    def __init__(self, base: Base) -> None:
        self.base = base
        self.name, self.shape, self.bias = base.name, base.shape, base.bias

    @property
    def compute(self) -> DType:
        return self.base.compute

    def dense(self) -> Tensor:
        return self.base.dense()


class _Colwise(_Hooked):
    """``ColwiseParallel``: what it is given is whole on each rank, its output this rank's part."""

    def __call__(self, x: Tensor) -> Tensor:
        state.tape.module = self.name
        return self.base(_replicated(x))


class _Rowwise(_Hooked):
    """``RowwiseParallel``: it is given this rank's part, and its outputs are summed."""

    def __call__(self, x: Tensor) -> Tensor:
        return _reduced(self.base(x))


class _Head:
    """The output layer."""

    def __init__(self, head: Any, world: int) -> None:
        self._head, self._world = head, world

    @property
    def weight(self) -> Tensor:
        """All of it (TRL 1.16 trainer/utils.py, ``add_fused_lm_head``: ``full_tensor``)."""
        own: Tensor = self._head.weight
        node = Node(_sliced, own) if ops.tracked(own) else None
        with category(Category.COMMUNICATION):
            whole = empty((own.shape[0] * self._world, own.shape[1]), own.dtype, "full_tensor")
        if node is not None:
            node.context = own.shape
            attach(node, whole)
        return whole

    def __call__(self, hidden: Tensor) -> Tensor:
        state.tape.module = "lm_head"
        own: Tensor = self._head(_replicated(hidden))
        node = Node(_sliced, own) if ops.tracked(own) else None
        shape = (*own.shape[:-1], own.shape[-1] * self._world)
        gathered = empty(shape, own.dtype, "all_gather_into_tensor")
        logits = empty(shape, own.dtype, "cat")
        del gathered
        if node is not None:
            node.context = own.shape
            attach(node, logits)
        return logits


def _tied_backward(node: Node, grad: Tensor) -> Any:
    """The whole gradient, of which this rank's part is added to the output layer's; it is there until that is
    done."""
    edge = node.edges[0]
    assert edge is not None
    (node.context,) = embedding_backward(node, grad)
    shape, dtype = edge[0].meta[edge[1]]
    return (empty(shape, dtype, "clone"),)


def _replicated(x: Tensor) -> Tensor:
    """``DTensor.from_local`` of what is whole, whose gradient is a sum over the ranks."""
    if x.node is None or not state.grad:
        return x
    node = Node(_summed, x)
    node.python = True
    out = x.detach()
    attach(node, out)
    return out


def _summed(node: Node, grad: Tensor) -> Any:
    return (empty(grad.shape, grad.dtype, "all_reduce"),)


def _reduced(x: Tensor) -> Tensor:
    """``redistribute`` of a sum that is not made yet, which without gradients is made in place."""
    if not state.grad:
        return x
    node = Node(_passed_on, x) if ops.tracked(x) else None
    out = empty(x.shape, x.dtype, "all_reduce")
    if node is not None:
        node.python = True
        attach(node, out)
    return out


def _passed_on(node: Node, grad: Tensor) -> Any:
    return (grad,)


def _sliced(node: Node, grad: Tensor) -> Any:
    """``Shard._replicate_to_shard``: this rank's part of the gradient, as a copy. The engine does not add
    into a DTensor, nor into what is viewed."""
    return (empty(node.context, grad.dtype, "clone").viewed(node.context),)


# those that were compared
_FAMILIES = {
    "gemma2": "Gemma 2",
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 MoE",
}
_RUN = "`memplan dry-run --gpu 4xh100 -- torchrun --nproc-per-node 4 SCRIPT` runs a rank of your own program"


def worlds(spec: ModelSpec) -> list[int]:
    """Numbers of ranks that divide heads, the MLP's width and the vocabulary alike."""
    layers = spec.sparse_layers or (False,)
    inner = {spec.moe_intermediate_size if sparse else spec.intermediate_size for sparse in layers}
    most = gcd(spec.num_attention_heads, spec.num_key_value_heads, spec.vocab_size, *inner)
    return [world for world in range(2, most + 1) if most % world == 0]


def _check(spec: ModelSpec, recipe: Recipe, adapted: Iterable[str]) -> None:
    """Raise RecipeError for what was not compared, and for what the libraries can't do."""
    behind = spec.attention_bias and spec.model_type != "qwen2"  # where o_proj has one, too
    if spec.model_type not in _FAMILIES or spec.mlp_bias or behind:
        names = ", ".join(_FAMILIES.values())
        raise RecipeError(
            f"tensor parallel of {spec.name} is not planned, that of {names} without biases behind attention "
            f"and MLP is: {_RUN}"
        )
    fit = worlds(spec)
    if recipe.gpus not in fit:
        divide = f"{' or '.join(map(str, fit))} do" if fit else "no number does"
        raise RecipeError(
            f"{recipe.gpus} GPUs do not divide {spec.name}'s {spec.num_attention_heads} heads, "
            f"{spec.num_key_value_heads} of keys and values, {spec.intermediate_size} of the MLP and "
            f"{spec.vocab_size} of the vocabulary alike, which tensor parallel is planned for: {divide}"
        )
    summed = sorted({name.rpartition(".")[2] for name in adapted} - {*COLWISE})
    if summed:
        fine = COLWISE[:3] if spec.num_experts else COLWISE  # PEFT adapts experts in one, or not at all
        raise RecipeError(
            f"PEFT's adapters on {' and '.join(summed)} fail under transformers' tensor parallel (0.21 and "
            f"5.23): give --target-modules {','.join(fine)} or fewer of them, or --parallel fsdp2"
        )


STRATEGY = Strategy(Tp, part=part_of, worlds=worlds, check=_check)
