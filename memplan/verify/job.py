"""What is to be run, as the parent process hands it to its child; and what the plan says of it. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from memplan import attention, libraries, losses, optimizers
from memplan.asked.recipe import Recipe
from memplan.asked.spec import ModelSpec
from memplan.cuda.card import Card
from memplan.errors import MemplanError, shown
from memplan.tape import Tape
from memplan.verify import ranks
from memplan.verify.measurement import Device, Measurement, Model, Run

if TYPE_CHECKING:
    from memplan.device.playback import Reserved


_MOST_GIB = 1 << 20  # a PiB


class Job(BaseModel):
    """One run. ``predicted_bytes`` is the peak of allocated bytes that the plan says; a run that the device
    has no room for is refused unless ``anyway``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["cuda", "cpu"]
    model: Model
    recipe: Recipe
    run: Run
    predicted_bytes: int
    anyway: bool = False


def make_job(
    model: str,
    recipe: Recipe,
    run: Run,
    *,
    device: Literal["cuda", "cpu"] = "cuda",
    layers: int | None = None,
    weights: str | None = None,
    anyway: bool = False,
) -> Job:
    """A run of a model by alias, Hub id or path. Raises MemplanError for what can't be planned or run."""
    from memplan.importers.resolve import resolve_config
    from memplan.predict.parameters import resolve_recipe

    for option, name in (("--weights", weights), ("--text", run.text)):
        if name is not None and not _is_text(name):  # what a measurement could not hold
            raise MemplanError(f"{option} is {shown(name)}, but the name must be UTF-8 text")
    found = resolve_config(model)
    config = found.config if layers is None else cut(found.config, layers, found.name)
    what = Model(
        name=found.name,
        hub_id=found.hub_id,
        layers=layers,
        weights=weights or "random",
        config=config,
    )
    resolved = resolve_recipe(spec_of(what), recipe)
    _runnable(resolved, device, run.loop)
    # a CPU counts as an A100 does, all but cuBLAS's workspaces, which here make no difference
    return Job(
        device=device,
        model=what,
        recipe=resolved,
        run=run,
        predicted_bytes=peak_bytes(what, resolved, looped=in_a_trainer(run)),
        anyway=anyway,
    )


def recipe_of(loop: str, options: Mapping[str, Any]) -> Recipe:
    """A recipe of whoever trains in that loop: TRL's SFTTrainer, or the Hugging Face Trainer, as which
    memplan's own does. Raises MemplanError where no run of that engine is verified."""
    ranks.check_engine(options.get("parallel"), options.get("gpus", 1))
    return Recipe(**{"trainer": "trl" if loop == "sft" else "peft", **options})


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _runnable(recipe: Recipe, device: str, loop: str) -> None:
    ranks.check(recipe, device, loop)
    loss = losses.find(recipe.loss)
    if loss.tiled and not (loop == "sft" and loss.sft):
        if loop != "memplan":
            raise MemplanError(
                f"the loss {recipe.loss!r} is trained with memplan's own loop: use --loop memplan"
            )
        if device == "cpu":
            raise MemplanError(
                f"the loss {recipe.loss!r} runs Triton kernels, which need a GPU: use --device cuda, "
                "or hold the plan against a trace (memplan trace)"
            )
        libraries.require(loss.library, doing="verifying")
    elif loss.attach is not losses.unpatched and not loss.tiled and loop != "memplan":
        raise MemplanError(
            f"the loss {recipe.loss!r} is no trainer's of today: it is trained with memplan's own loop, "
            "--loop memplan"
        )
    if device == "cpu":
        if attention.of(recipe).package:
            raise MemplanError(f"{recipe.attn} runs on CUDA only: use --attn sdpa")
        if optimizers.find(recipe.optimizer).paged:
            raise MemplanError(
                f"{recipe.optimizer} pages between a card and its host, so it needs --device cuda"
            )


def cut(config: dict[str, Any], layers: int, name: str) -> dict[str, Any]:
    """A configuration of the first ``layers`` layers: all else as it is, lists by layer shortened."""
    there = config.get("num_hidden_layers")
    if type(there) is not int:
        raise MemplanError(f"{name} has no num_hidden_layers, so it can't be cut: leave out --layers")
    if not 1 <= layers <= there:
        raise MemplanError(f"{name} has {there} layers, so --layers must be from 1 to {there}")
    shorter = {
        key: value[:layers] if isinstance(value, list) and len(value) == there else value
        for key, value in config.items()
    }
    return {**shorter, "num_hidden_layers": layers}


def cap(text: str) -> tuple[int, str]:
    """Bytes that the allocator may have, and what to call it: a card's usable bytes less those of a CUDA
    context, or a size such as 20GiB as it is. Raises UnknownName or MemplanError."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?GiB", text, re.IGNORECASE)
    if size is None:
        from memplan.asked.gpus import find_gpu
        from memplan.device.fit import context_of

        card = find_gpu(text)
        return card.visible_bytes - context_of(card.name), card.name
    gib = float(size[1])
    if gib > _MOST_GIB:
        raise MemplanError(f"--cap {shown(text)} is more than any card has; give at most {_MOST_GIB}GiB")
    nbytes = int(gib * 2**30)
    if nbytes < 1:
        raise MemplanError(f"--cap {shown(text)} leaves nothing")
    return nbytes, f"{size[1]} GiB"


def spec_of(model: Model) -> ModelSpec:
    """Raises SpecError or UnsupportedArchitecture."""
    from memplan.importers.hf import spec_from_config

    spec = spec_from_config(model.config, model.name, model.hub_id)
    return spec.model_copy(update={"quantization": None})  # the verifier quantises what it makes


def in_a_trainer(run: Run) -> bool:
    """Whether its steps are of a Trainer's loop: memplan's own keeps nothing beside them."""
    return run.loop != "memplan"


def peak_bytes(model: Model, recipe: Recipe, card: Card | None = None, *, looped: bool) -> int:
    """The predicted peak of allocated bytes; ``looped``: in a Trainer's loop."""
    from memplan.predict.step import write_tape
    from memplan.tape import replay

    return replay(write_tape(spec_of(model), recipe, card=card, looped=looped)).allocated_bytes


def gets_through(model: Model, recipe: Recipe, room: int) -> bool:
    """Whether the run is predicted to train where the allocator may have ``room`` bytes: simulated as the
    verifier makes its models, for the card of this machine if there is one."""
    from memplan.predict.step import write_long_tape

    resolved = recipe.resolved()
    tape = write_long_tape(spec_of(model), resolved, card=_card_here())
    return simulated(model, resolved, tape, limit=room).ran_out is None


def simulated(
    model: Model, recipe: Recipe, tape: Tape, *, capacity: int | None = None, limit: int | None = None
) -> Reserved:
    """What a run of the step ``tape`` reserves, from the making of the model on, as the verifier does it;
    ``capacity`` and ``limit`` as in :class:`memplan.device.allocator.Allocator`. Ranks that share a step get
    the model as a script does: from the host, where an engine does not want it on the card."""
    from memplan.asked.alloc_conf import parse_settings
    from memplan.device.playback import Simulation
    from memplan.predict.loading import loading, making

    several = recipe.gpus > 1
    bring = loading if several else making
    return Simulation(
        tape,
        bring(spec_of(model), recipe, tape),
        parse_settings(recipe.alloc_conf),
        capacity=capacity,
        limit=limit,
        several=several,
    ).trained


def _card_here() -> Card | None:
    from memplan.asked.gpus import load_gpus
    from memplan.device import driver

    here = driver.present()
    found = next((gpu.capability for gpu in load_gpus() if gpu.name in here), None)
    return None if found is None else Card(found)


def predicted_tape(measured: Measurement) -> Tape:
    """What the plan says of the step that was measured, for the device that it was measured on."""
    from memplan.predict.parameters import resolve_recipe
    from memplan.predict.step import write_tape

    spec = spec_of(measured.model)
    recipe = resolve_recipe(spec, measured.recipe)  # a file may say what does not suit its model
    card = replace(card_of(measured.device), cudnn_attention=measured.run.cudnn_attention)
    rank = measured.rank if recipe.gpus > 1 else None
    return write_tape(spec, recipe, card=card, looped=in_a_trainer(measured.run), folded=False, rank=rank)


def card_of(device: Device) -> Card:
    """The card as far as kernels ask; a CPU stands for the reference card."""
    return Card(device.capability) if device.capability else Card()
