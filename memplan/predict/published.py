"""What a published checkpoint holds otherwise than as the model's parameters: quantised already, packed, or
expert by expert, and what loading makes of that (transformers 5.23, core_model_loading.py,
conversion_mapping.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from memplan import families
from memplan.asked.recipe import DTypeName
from memplan.asked.spec import ModelSpec
from memplan.predict import blueprint, mxfp4
from memplan.shadow.tensor import DTYPES, Shape
from memplan.weights import LoadStep, Temporary


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint. ``stored``: it has weights quantised by bitsandbytes; ``packed``: experts in MXFP4;
    ``apart``: the first name that it has of a parameter, where its experts lie one by one; ``buffers``: bytes
    of those that it holds, by full name."""

    stored: bool = False
    packed: bool = False
    apart: Callable[[str], str] | None = None
    buffers: Mapping[str, int] = field(default_factory=dict)

    def first(self, name: str) -> str:
        """The name under which a parameter begins in it, which decides when it is loaded."""
        if self.packed:
            return mxfp4.published(name)
        return name if self.apart is None else self.apart(name)

    def arriving(
        self, name: str, shape: Shape, itemsize: int, arrives: LoadStep, temporary: Temporary
    ) -> Iterator[LoadStep]:
        """The steps in which a parameter comes, the one in which it ``arrives`` among them."""
        if self.packed and mxfp4.is_packed(name):
            return mxfp4.unpacked(shape, itemsize, arrives, temporary)
        if self.apart is not None and self.first(name) != name and len(shape) == _STACKED:
            return _merged(shape, 1 + name.endswith("gate_up_proj"), itemsize, arrives, temporary)
        return iter((arrives,))


PLAIN = Published()


def of(spec: ModelSpec, dtype: DTypeName) -> Published:
    """That of a model, loaded in a dtype."""
    return Published(
        stored=spec.quantization is not None,
        packed=spec.mxfp4,
        apart=families.find(spec.model_type).apart,
        buffers=blueprint.named_buffers(spec, DTYPES[dtype.value].itemsize),
    )


def like(config: Mapping[str, Any], *, stored: bool, packed: bool) -> Published:
    """That of a model by its configuration, as far as its family is known."""
    model_type = config.get("model_type")
    known = model_type in families.names()
    apart = families.find(str(model_type)).apart if known else None
    return Published(stored=stored, packed=packed, apart=apart)


_STACKED = 3  # axes of experts that lie in one parameter


def _merged(
    shape: Shape, fused: int, itemsize: int, arrives: LoadStep, temporary: Temporary
) -> Iterator[LoadStep]:
    """All experts of a layer are there one by one before they are stacked (``MergeModulelist``); where a
    parameter is of two projections, each is, and then both are laid together (``Concatenate``)."""
    experts, *rest = shape
    one = prod(rest) // fused * itemsize
    taken = [[temporary(one) for _ in range(experts)] for _ in range(fused)]
    for projection in taken:
        yield from (take for take, _ in projection)
    stacks = []
    for projection in taken:
        if fused == 1:
            yield arrives
        else:
            take, stack = temporary(experts * one)
            stacks.append(stack)
            yield take
        yield from (("drop", number) for _, number in projection)
    if stacks:
        yield arrives
        yield from (("drop", stack) for stack in stacks)
