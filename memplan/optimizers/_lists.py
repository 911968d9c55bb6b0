"""Lists of parameters and of what is made for each, as the libraries go through them."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.optimizers import Group
from memplan.shadow.autograd import AccumulateGrad
from memplan.shadow.tensor import Storage, Tensor, state
from memplan.tape import Phase


def gradient(parameter: Tensor) -> Tensor | None:
    node = parameter.node
    return node.grad if isinstance(node, AccumulateGrad) else None


def release(lists: list[tuple[int | None, list[Storage]]], name: str) -> None:
    """Drop lists of storages group by group, in segments of their own."""
    for layer, storages in lists:
        state.tape.begin(Phase.OPTIMIZER, name, layer)
        storages.clear()


def by_decay(groups: list[Group]) -> Iterator[tuple[str, list[tuple[int | None, list[Tensor]]]]]:
    """The Trainer's two parameter groups: norms and biases are not decayed."""
    for name, wanted in (("decayed", True), ("not decayed", False)):
        chosen = [(group.layer, [p for p in group.parameters if _decays(p) is wanted]) for group in groups]
        yield name, [(layer, parameters) for layer, parameters in chosen if parameters]


_DECAYED_VECTORS = (
    "lora_magnitude_vector",
    "self_attn.sinks",
    "router.scale",
    "_expert_scale",
    "A_log",
    ".norm1",  # of towers
    ".norm2",
)


def _decays(parameter: Tensor) -> bool:
    """Told by names (transformers/trainer.py, get_decay_parameter_names, 5.23): of the vectors these
    alone have none that exempts them, of what else there is only experts' biases and Cohere's norms over
    heads have one."""
    name = "" if parameter.storage is None else state.tape.modules[parameter.storage.index]
    if len(parameter.shape) > 1 or parameter.storage is None:
        return not name.endswith(("_bias", "_norm"))
    return name.endswith(_DECAYED_VECTORS)
