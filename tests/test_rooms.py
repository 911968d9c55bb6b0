"""A family, an optimizer and a loss are each one file, which nothing else has to know of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_specs import config

from memplan import Recipe, plan, rooms
from memplan.errors import MemplanError, UnknownName
from memplan.importers.hf import spec_from_config

FAMILY = '''
"""Llama without a norm before its MLP."""

from memplan.families import Family
from memplan.parts.config import COMMON, Config, full
from memplan.parts.layer import attention, mlp, residual
from memplan.parts.module import attention as projections
from memplan.parts.module import mlp as mlp_modules
from memplan.parts.module import norms


def _modules(spec, sparse):
    return {**projections(spec), **mlp_modules(spec), **norms(spec, "input_layernorm")}


def _layer(m, hidden, context):
    before = hidden
    hidden = m["input_layernorm"](hidden)
    hidden, _ = attention(m, hidden, context)
    hidden = residual(before, hidden)
    return residual(hidden, mlp(m, hidden, context))


FAMILY = Family(
    config=Config(
        architecture="ToyForCausalLM", defaults={**COMMON, "max_position_embeddings": 64}, layers=full
    ),
    modules=_modules,
    layer=_layer,
)
'''
OPTIMIZER = '''
"""Signs: one state of a byte a parameter."""

from memplan.optimizers import Optimizer
from memplan.shadow.tensor import uint8

OPTIMIZER = Optimizer(lambda shape, dtype, recipe, embedding: [(shape, uint8)], real=lambda *_: None)
'''
LOSS = '''
"""The mean of all logits."""

from memplan.losses import Loss
from memplan.shadow import ops


def _head(head, hidden, labels, router_logits, spec):
    logits = head(hidden)
    loss = logits
    while loss.shape:
        loss = ops.sum_last(loss)
        loss = ops.view(loss, loss.shape[:-1])
    return loss, logits


LOSS = Loss(_head, tiled=False)
'''


@pytest.fixture
def toys(tmp_path: Path) -> Iterator[None]:
    for room, text in (("families", FAMILY), ("optimizers", OPTIMIZER), ("losses", LOSS)):
        (tmp_path / room).mkdir()
        (tmp_path / room / "toy.py").write_text(text, encoding="utf-8")
    rooms.extend(tmp_path)
    yield
    rooms.forget(tmp_path)


@pytest.mark.usefixtures("toys")
def test_things_from_another_folder_are_planned_with() -> None:
    spec = spec_from_config(
        {**config("llama", 3), "architectures": ["ToyForCausalLM"], "model_type": "toy"}, "toy"
    )
    llama = spec_from_config(config("llama", 3), "llama")
    toy = plan(spec, Recipe(trainer="peft", mode="full", optimizer="toy", loss="toy", seq_len=16))
    usual = plan(llama, Recipe(trainer="peft", mode="full", optimizer="sgd", seq_len=16))
    hidden = 256
    assert toy.parameters.total == usual.parameters.total - 3 * hidden
    assert toy.static_bytes.weights < usual.static_bytes.weights
    assert 0 <= toy.static_bytes.optimizer_state - toy.parameters.total < 512 * 40  # a byte each, rounded
    assert toy.peak.tensor_bytes > sum(toy.static_bytes.model_dump().values())
    assert toy.fits[0].verdict == "fits"


def test_they_are_unknown_where_nobody_extends(tmp_path: Path) -> None:
    for options in ({"optimizer": "toy"}, {"loss": "toy"}):
        with pytest.raises(UnknownName, match="'toy'"):
            Recipe(trainer="peft", **options)
    assert "toy" not in rooms.names("families")


@pytest.mark.parametrize("name", ["__init__", "_bnb", "../losses/liger", "os", ""])
def test_only_things_are_found(name: str) -> None:
    with pytest.raises(UnknownName):
        rooms.thing("optimizers", name, "OPTIMIZER", "optimizer")


def test_a_file_that_defines_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "optimizers").mkdir()
    (tmp_path / "optimizers" / "empty.py").write_text("x = 1")
    (tmp_path / "optimizers" / "broken.py").write_text("import no_such_module")
    for _ in range(2):  # the second time changes nothing
        rooms.extend(str(tmp_path))
    try:
        with pytest.raises(MemplanError, match="the optimizer 'empty' defines no OPTIMIZER"):
            plan("llama-3.2-1b", Recipe(trainer="peft", optimizer="empty"))
        with pytest.raises(MemplanError, match=r"'broken' can't be imported.*no_such_module"):
            plan("llama-3.2-1b", Recipe(trainer="peft", optimizer="broken"))
    finally:
        rooms.forget(tmp_path)
    with pytest.raises(UnknownName):
        Recipe(trainer="peft", optimizer="empty")
    with pytest.raises(MemplanError, match="no folder"):
        rooms.extend(tmp_path / "nowhere")


def test_momentum_is_the_optimizers_own_matter() -> None:
    assert (
        plan(
            "llama-3.2-1b", Recipe(trainer="peft", optimizer="sgd", momentum=0.9)
        ).static_bytes.optimizer_state
        > 0
    )
    with pytest.raises(MemplanError, match="adafactor has no momentum"):
        plan("llama-3.2-1b", Recipe(trainer="peft", optimizer="adafactor", momentum=0.9))
