"""Every writer's tape is sound, and all that reads tapes takes it: one contract for the package's writers and
for one that is not in it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
from small_specs import SPECS, config

from memplan import Recipe
from memplan.device.playback import simulate
from memplan.planning import predicted
from memplan.planning.cards import judged
from memplan.planning.plan import plan_from_tape
from memplan.planning.records import ModelInfo, ParameterCounts
from memplan.predict.evaluation import write_evaluation
from memplan.predict.loading import loading
from memplan.predict.step import write_long_tape
from memplan.report.html import page
from memplan.report.perfetto import trace_json
from memplan.tape import Category, Part, Phase, Tape, replay
from memplan.tape.file import decode, encode
from memplan.tape.writer import Writer, sound

RECIPE = Recipe(trainer="peft", mode="qlora", seq_len=16, optimizer="adamw_torch").resolved()


def tell(writer: Writer) -> None:
    """A step as somebody else might tell of it: two layers, with names that nobody here knows."""
    mib = 1 << 20
    writer.begin(Phase.SETUP, "what I loaded", part=Part.LOADED)
    writer.module = "table"
    weights = [writer.alloc(6 * mib, "tensor", Category.WEIGHTS) for _ in range(2)]
    writer.begin(Phase.SETUP, "what I keep", part=Part.RESTING)
    states = [writer.alloc(12 * mib, "moment", Category.OPTIMIZER_STATE) for _ in weights]
    for _ in range(2):
        writer.alloc(8 * mib, "scratch of products", Category.TEMPORARIES, workspace=True)
    kept = []
    for layer in range(2):
        writer.begin(Phase.FORWARD, "there", layer)
        writer.module = f"block {layer}"
        kept.append(writer.alloc(40 * mib, "product", Category.ACTIVATIONS))
        writer.multiply()
    for layer in (1, 0):
        writer.begin(Phase.BACKWARD, "and back", layer)
        gradient = writer.alloc(6 * mib, "product", Category.GRADIENTS)
        writer.multiply()
        writer.free(kept.pop())
        writer.free(gradient)
    writer.begin(Phase.OPTIMIZER, "the end", part=Part.UPDATE)
    writer.free(writer.alloc(len(states) * mib, "root", Category.TEMPORARIES))
    writer.finish()


def told() -> Tape:
    tape = Tape(provenance="measured")
    tell(tape)
    return tape


def traced() -> Tape:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("torch", "transformers", "peft", "bitsandbytes"):
            pytest.importorskip(package)
        from memplan.trace import trace

    return trace(config("llama", 2), RECIPE)


def trained() -> Tape:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        from memplan.verify.host import Host, recorded

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    host = Host()
    with host.environment():

        def step(recorder: object) -> None:
            recorder.begin(Phase.FORWARD, "forward")  # type: ignore[attr-defined]
            loss = model(torch.ones(4, 64)).square().mean()
            recorder.begin(Phase.BACKWARD, "backward")  # type: ignore[attr-defined]
            loss.backward()
            recorder.begin(Phase.OPTIMIZER, "step", part=Part.UPDATE)  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):
            with recorded(host.card, model, optimizer, ()) as recorder:
                step(recorder)
    return recorder.tape


WRITERS: dict[str, Callable[[], Tape]] = {
    "predicted": lambda: write_long_tape(SPECS["llama"](2), RECIPE),
    "traced": traced,
    "trained on a CPU": trained,
    "somebody else": told,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_tapes_are_sound_and_everything_reads_them(writer: str) -> None:
    tape = WRITERS[writer]()
    sound(tape)
    again, _ = decode(encode(tape), "a tape")
    assert again == replace(tape, module="")
    run = simulate(tape)
    assert run.ran_out is None
    assert replay(tape).allocated_bytes <= run.allocated <= run.reserved
    assert json.loads(trace_json(tape, "a tape"))["traceEvents"]

    model = ModelInfo(name="mine", hub_id=None, architecture="MyModel")
    plan = plan_from_tape(tape, model, ParameterCounts(total=1, trainable=1), RECIPE, judged(["a100", "t4"]))
    assert plan.peak.tensor_bytes == replay(tape).allocated_bytes
    assert [fit.verdict for fit in plan.fits] == ["fits", "fits"]
    assert "MyModel" in page(plan, tape, {})


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_loading_and_evaluations_are_tapes_too(mode: str) -> None:
    spec, recipe = SPECS["llama"](2), Recipe(trainer="peft", mode=mode, seq_len=16).resolved()
    step = write_long_tape(spec, recipe)
    loaded = loading(spec, recipe, step)
    left = {event for event in loaded.events if event >= 0} - {~event for event in loaded.events if event < 0}
    assert all(storage < len(step.sizes) for storage in left)  # nothing that was there for a while stays
    assert loaded.sizes[: len(step.sizes)] == step.sizes
    sound(write_evaluation(spec, recipe, 2, folded=False))


def test_the_allocator_reads_marks_and_no_names() -> None:
    """With every name changed the run reserves the same."""
    run = predicted.run(
        SPECS["llama"](3), Recipe(trainer="peft", mode="lora", seq_len=64, optimizer="adamw_torch").resolved()
    )
    tape, loaded = run.tape, run.loading(None)
    before = simulate(tape, loaded)
    for one in (tape, loaded):
        assert one is not None
        one.operations = ["x"] * len(one.sizes)
        one.modules = ["y"] * len(one.sizes)
        for segment in one.segments:
            segment.name = "z"
    assert simulate(tape, loaded) == before


def test_what_is_not_sound_is_said() -> None:
    tape = told()
    tape.events.append(~0)
    tape.deltas.append(0)
    sound(tape)  # a weight may be dropped at the end
    tape.events.append(~0)
    tape.deltas.append(0)
    with pytest.raises(AssertionError, match="not alive"):
        sound(tape)
