"""Spec + recipe -> Plan: the public heart of memplan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from memplan.recipe import Recipe
from memplan.spec import ModelSpec
from memplan.tape import Category, Peak, Point, Tape, replay, static_bytes, timeline

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelInfo(_Record):
    """Which model the plan is for. ``note`` says how a name was resolved when that needs saying."""

    name: str
    hub_id: str | None
    architecture: str
    note: str | None = None


class ParameterCounts(_Record):
    """Parameters (tied weights counted once), adapters included in both counts."""

    total: int
    trainable: int


class StaticBytes(_Record):
    """Bytes that are there before a steady-state step begins."""

    weights: int
    quantization_state: int
    adapters: int
    optimizer_state: int


class CategoryBytes(_Record):
    """Bytes by category; adds up to the peak."""

    weights: int
    quantization_state: int
    adapters: int
    gradients: int
    optimizer_state: int
    activations: int
    logits_and_loss: int
    temporaries: int


class PeakInfo(_Record):
    """The peak of allocated bytes: how much, when, in which operation, and whose bytes."""

    allocated_bytes: int
    phase: Literal["forward", "backward", "optimizer"]
    operation: str
    module: str
    layer: int | None
    by_category: CategoryBytes


class Summary(_Record):
    """The four categories that people know. Quantisation state counts as weights, gradients as
    optimizer state, logits and temporaries as activations. Adds up to the peak."""

    weights: int
    lora_parameters: int
    optimizer_state: int
    activations: int


class Fit(_Record):
    """One card. ``needed_bytes`` is allocated peak + allocator slack + context, an estimate;
    ``total_bytes`` is what PyTorch can see of the card; ``headroom_bytes`` is their difference."""

    gpu: str
    total_bytes: int
    needed_bytes: int
    headroom_bytes: int
    verdict: Literal["fits", "tight", "does not fit"]


class Plan(_Record):
    """The answer. All byte fields are bytes of device memory."""

    schema_version: int = SCHEMA_VERSION
    memplan_version: str
    provenance: Literal["predicted", "traced", "measured"] = "predicted"
    model: ModelInfo
    parameters: ParameterCounts
    recipe: Recipe
    static_bytes: StaticBytes
    peak: PeakInfo
    summary: Summary
    fits: tuple[Fit, ...] = Field(default=())

    _tape: Tape | None = PrivateAttr(default=None)

    def timeline(self) -> Iterator[Point]:
        """Live bytes by category after every event of the step (see :class:`memplan.tape.Point`)."""
        assert self._tape is not None, "a plan read from JSON has no tape: call plan() again"
        return timeline(self._tape)


def plan(
    model: str | Path | ModelSpec,
    recipe: Recipe | None = None,
    *,
    gpus: Iterable[str] | None = None,
) -> Plan:
    """Predict the memory of one steady-state training step.

    ``model`` is an alias (``llama-70b``), a Hub id, a path to a config.json or its folder, or a spec.
    ``gpus`` are names of cards to judge (default: a representative set).
    Raises MemplanError (UnknownName, SpecError, RecipeError, UnsupportedArchitecture).
    """
    raise NotImplementedError
