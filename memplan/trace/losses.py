"""The fused losses: TRL's head and Liger-Kernel's fused linear cross entropy, their own code on fake tensors.

Both multiply hidden states and the head's weight tile by tile and never make all logits. What stands in:

- Triton kernels, which read and write what they are given and allocate nothing: a launch does nothing;
- questions of that code about the device (``x.device.type == "cuda"``), which get CUDA's answer.

Sources: trl 1.16 kernels/chunked_logprob.py, trainer/utils.py ``add_fused_lm_head``, trainer/sft_trainer.py
``SFTTrainer.compute_loss``; liger-kernel 0.8.5 ops/fused_linear_cross_entropy.py and
transformers/monkey_patch.py.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from memplan.asked.recipe import Loss
from memplan.cuda.card import Card
from memplan.errors import TraceError

# Values that the code asks for, by the function that asks: no label is masked.
ANSWERS = {
    "fused_linear_cross_entropy_forward": 1,  # how many labels count
    "fused_linear_cross_entropy_backward": False,  # whether the loss's gradient is 1
    "compute_loss": 1,  # of SFTTrainer: what it logs
    "_fused_forward": True,  # of TRL's head: which labels count
}


def attach(model: nn.Module, loss: Loss) -> None:
    """Patch a model, PEFT's around it or not, as its user's trainer does. Raises TraceError if it can't."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if loss is Loss.CHUNKED:
        _add_trl_head(base)
    elif loss is Loss.LIGER:
        _add_liger(base)


def _add_trl_head(base: Any) -> None:
    """As ``SFTTrainer.__init__``."""
    from trl.trainer.utils import add_fused_lm_head

    config = base.config.get_text_config()
    if hasattr(config, "router_aux_loss_coef"):
        config.output_router_logits = aux_loss_enabled(config)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))


def aux_loss_enabled(config: Any) -> bool:
    """Whether SFTTrainer adds a mixture of experts' load-balancing loss: where the config weighs it."""
    return hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0) != 0.0


def _add_liger(base: Any) -> None:
    """As ``apply_liger_kernel`` of transformers' Trainer, with the loss alone."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind, forward = type(base), type(base).forward
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(base.config.model_type)
    if apply is not None:
        kernels = {name for name in inspect.signature(apply).parameters if name != "model"}
        with suppress(NotImplementedError):  # Granite's, of a kernel that it has not got
            apply(model=base, **{name: name == "fused_linear_cross_entropy" for name in kernels})
    if kind.forward is not forward:  # of some families it patches the class, which others may use
        base.forward = MethodType(kind.forward, base)
        kind.forward = forward
    if "forward" not in vars(base):
        raise TraceError(
            f"Liger-Kernel has no fused loss for models of the type {base.config.model_type!r}: "
            "use the standard loss"
        )


def loss_of(model: nn.Module, run: Callable[..., Any], batch: dict[str, torch.Tensor], loss: Loss) -> Any:
    """The loss that the trainer takes from ``run``, the model's forward as it was prepared."""
    if loss is Loss.CHUNKED:
        from trl.trainer.sft_trainer import SFTTrainer

        return SFTTrainer.compute_loss(_sft_trainer(model), run, dict(batch))
    outputs = run(**batch)
    return outputs.loss


def _sft_trainer(model: nn.Module) -> Any:
    """What ``SFTTrainer.compute_loss`` reads of its trainer: one process, the default loss."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    return SimpleNamespace(
        model=model,
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=True),
        accelerator=SimpleNamespace(parallelism_config=None, gather_for_metrics=lambda tensor: tensor),
        compute_loss_func=None,
        label_smoother=None,
        aux_loss_enabled=aux_loss_enabled(config),
        router_aux_loss_coef=getattr(config, "router_aux_loss_coef", 0.0),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


class _Launch:
    """A Triton kernel: ``kernel[grid](...)`` works in place and allocates nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._run

    def _run(self, *args: Any, **kwargs: Any) -> None:
        return None


class _OnCuda(ast.NodeTransformer):
    """Answers ``x.device.type == "cuda"`` and ``!=`` as on CUDA."""

    answered = 0

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        question = ast.unparse(node)
        for sign, answer in (("==", True), ("!=", False)):
            if question.endswith(f".device.type {sign} 'cuda'"):
                self.answered += 1
                return ast.Constant(answer)
        return node


@functools.cache
def on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, from its own source, with its questions about the device answered."""
    transformer = _OnCuda()
    tree = transformer.visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
    if not transformer.answered:
        raise TraceError(
            f"{function.__module__}.{function.__name__} asks nothing about the device any more, so this "
            "version of the library is not the one that memplan knows"
        )
    code = compile(ast.fix_missing_locations(tree), inspect.getsourcefile(function) or "", "exec")
    scope: dict[str, Any] = {}
    exec(code, function.__globals__, scope)
    made: Callable[..., Any] = scope[function.__name__]
    return made


@contextmanager
def in_force(loss: Loss, card: Card) -> Iterator[None]:
    """The stand-ins of a loss while the context lasts."""
    with ExitStack() as stack:
        patches: list[tuple[Any, str, Any]] = []
        if loss is Loss.CHUNKED:
            from trl.kernels import chunked_logprob
            from trl.trainer import utils

            patches += [(module, "_use_triton", _always) for module in (chunked_logprob, utils)]
            patches += [
                (chunked_logprob, name, _Launch()) for name in ("_forward_kernel", "_backward_kernel")
            ]
            patches += [(chunked_logprob, "_addmm_fp32", on_cuda(chunked_logprob._addmm_fp32))]
            patches += [
                (chunked_logprob, "triton", SimpleNamespace(cdiv=_ceiling))
            ]  # it comes with CUDA's torch
        elif loss is Loss.LIGER:
            module = _liger_module()
            kernels = ("liger_cross_entropy_kernel", "element_mul_kernel")
            patches += [(module, name, _Launch()) for name in kernels]
            patches += [
                (module, name, on_cuda(getattr(module, name)))
                for name in ("_can_use_mm_out", "fused_linear_cross_entropy_forward")
            ]
            dtype = torch.get_autocast_dtype
            patches += [
                (torch, "get_autocast_dtype", lambda device: dtype("cpu")),
                (torch.cuda, "get_device_capability", lambda device=None: card.capability),
            ]
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement, create=True))
        yield


def _liger_module() -> ModuleType:
    import importlib

    return importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")


def _always(_device: object) -> bool:
    return True


def _ceiling(number: int, divisor: int) -> int:
    return -(-number // divisor)
