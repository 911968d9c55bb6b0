"""What a Trainer's loop keeps on the card beside the step: by name, while it is there, and nowhere else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from small_specs import SPECS, config

from memplan import Recipe, plan
from memplan.device.playback import simulate
from memplan.parts import loop
from memplan.planning import predicted
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_long_tape, write_tape
from memplan.tape import Phase, Tape, replay
from memplan.tape.file import save
from memplan.tape.writer import sound

DATA = Path(__file__).parent.parent / "data"
ROWS = {row["name"]: row for row in json.loads((DATA / "plain.json").read_text(encoding="utf-8"))["rows"]}
SPEC = SPECS["llama"](2)

Run = Callable[..., Outcome]


def recipe(**options: Any) -> Recipe:
    return resolve_recipe(SPEC, Recipe(**{"trainer": "peft", "mode": "lora", "seq_len": 64, **options}))


def tape(**options: Any) -> Tape:
    found = write_tape(SPEC, recipe(**options), looped=True, folded=False)
    sound(found)
    return found


def at_peak(found: Tape) -> Counter[tuple[str, str]]:
    """Modules and operations of what is there at the peak, and how often."""
    live: set[int] = set()
    now = best = 0
    there: set[int] = set()
    for event, delta in zip(found.events, found.deltas, strict=True):
        now += delta
        live ^= {event if event >= 0 else ~event}
        if now > best:
            best, there = now, set(live)
    assert best == replay(found).allocated_bytes
    return Counter((found.modules[storage], found.operations[storage]) for storage in there)


def waiting(found: Tape) -> list[int]:
    """Bytes of the blocks of batches that wait."""
    pairs = zip(found.sizes, found.operations, strict=True)
    return [size for size, operation in pairs if operation == loop.WAITING]


def deaths(found: Tape, name: str) -> list[Phase | None]:
    """In which phases storages of a name die; None: in none."""
    of = [index for index, operation in enumerate(found.operations) if operation == name]
    phases = {
        event: segment.phase
        for segment in found.segments
        for event in found.events[segment.start : segment.stop]
    }
    return [phases.get(~index) for index in of]


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, ()),
        ({"trainer": "trl", "gradient_accumulation_steps": 2}, ()),
        ({"trainer": "llama_factory"}, ()),
        ({"trainer": "axolotl", "attn": "sdpa"}, ("_tkps_trainable_acc",)),
        ({"dtype": "float16", "autocast": True}, ("_scale", "_growth_tracker")),
    ],
    ids=str,
)
def test_each_number_is_at_the_peak_by_its_name(options: dict[str, Any], more: tuple[str, ...]) -> None:
    found, bare = tape(**options), write_tape(SPEC, recipe(**options), folded=False)
    named = {name: count for (module, name), count in at_peak(found).items() if module == loop.MODULE}
    wanted = {"_tr_loss", "grad_norm", "num_items_in_batch", *more}
    # the loss of a backward pass that is there is the one before from the second pass of a step on
    first = options.get("gradient_accumulation_steps", 1) == 1
    assert named == dict.fromkeys([*wanted, *(("tr_loss_step",) if first else ())], 1)
    assert not {loop.MODULE} & set(bare.modules)
    assert loop.WAITING not in bare.operations
    others = at_peak(found) - at_peak(bare)
    for number in (*wanted, "tr_loss_step"):
        del others[loop.MODULE, number]
    assert others.pop(("", loop.WAITING), 0) == found.operations.count(loop.WAITING)
    # beside them the loss: a sum divided by labels, in TRL multiplied, and divided once more by accelerate,
    # unless the peak is before that
    made = {"div": 2, **({"mul": 1} if "_scale" in more else {})} if first else {"mul": 1}
    assert others == {("loss", operation): count for operation, count in made.items()}


def test_numbers_are_there_as_long_as_the_loop_names_them() -> None:
    found = tape(gradient_accumulation_steps=2)
    for name, phases in {
        "_tr_loss": [None],
        "num_items_in_batch": [None],
        "tr_loss_step": [Phase.BACKWARD],
        "grad_norm": [Phase.OPTIMIZER],
        loop.WAITING: [None] * 3,
    }.items():
        assert deaths(found, name) == phases, name
    assert None in deaths(found, "linalg_vector_norm")  # this step's norm, and its last loss
    assert None not in deaths(write_tape(SPEC, recipe(), folded=False), "linalg_vector_norm")
    assert sum(found.deltas) == sum(tape(gradient_accumulation_steps=2, max_grad_norm=0).deltas)


@pytest.mark.parametrize("count", [1, 2, 16, 128, 1000])
def test_all_batches_of_a_step_are_there(count: int) -> None:
    found = tape(gradient_accumulation_steps=count, batch_size=2, seq_len=100)
    blocks = waiting(found)
    assert sum(blocks) == 3 * (count - 1) * 2048  # 2 × 100 × 8 bytes: four blocks each
    assert len(blocks) <= 3 * 257
    twice = tape(gradient_accumulation_steps=2, batch_size=2, seq_len=100)
    assert len(found.events) <= len(twice.events) + 3 * 257


def test_packed_batches_wait_with_what_the_collator_adds() -> None:
    options = {"trainer": "trl", "batches": "packed", "seq_len": 256, "gradient_accumulation_steps": 2}
    assert Counter(waiting(tape(**options))) == {
        2048: 3,
        512: 2,
        1024: 1,
    }  # ids, labels, positions; cu_seq_lens; seq_idx


def test_batches_of_lengths_that_differ_are_all_there_anyhow() -> None:
    lengths = [[20, 30], [64, 64]]
    found = write_tape(
        SPEC, recipe(gradient_accumulation_steps=2), lengths=lengths, looped=True, folded=False
    )
    assert loop.WAITING not in found.operations
    assert found.operations.count("batch") == 6


def test_the_first_step_makes_what_later_ones_find() -> None:
    long = write_long_tape(SPEC, recipe(gradient_accumulation_steps=2), looped=True)
    run = simulate(long)
    assert run.allocated == replay(long).allocated_bytes
    assert run.after_step <= run.reserved


@pytest.mark.parametrize(
    "name",
    [
        "llama-1b-qlora-plain",  # accumulates
        "smollm2-lora-128",  # its peak is where the loss is divided
        "smollm2-lora-128-on-card",
        "qwen2.5-0.5b-full-fp32",
        "qwen2.5-0.5b-lora-fp16",
        "trl-qwen3-1.7b-lora",
        "llama-1b-full-adafactor",
        "llama-1b-lora-liger",
    ],
)
def test_plain_scripts_take_what_is_planned_to_the_byte(name: str) -> None:
    row = ROWS[name]
    found = plan(row["model"], Recipe(**row["recipe"]), gpus=[]).allocator
    assert (found.allocated_bytes, found.reserved_bytes) == (
        row["steps"][1]["allocated"],
        row["reserved"]["emulated"],
    )


def test_a_step_measured_in_the_trainer_on_a_gpu_is_planned_to_the_byte() -> None:
    from memplan.verify.compare import compare
    from memplan.verify.measurement import read

    (path,) = (DATA / "measurements").glob("*_NVIDIA-H200_llama-3.2-1b_qlora_af02d182.json")
    measured = read(path)
    assert measured.run.loop == "trainer"
    assert (compare(measured).allocated.error, compare(measured).reserved.error) == (0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"trainer": "trl", "gradient_accumulation_steps": 2, "batch_size": 2},
        {"trainer": "axolotl", "attn": "sdpa", "mode": "qlora"},
        {"mode": "full", "max_grad_norm": 0.0},
        {"dtype": "float16", "autocast": True},
        {"loss": "shifted", "batch_size": 2},
        {"trainer": "trl", "batches": "packed", "batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_a_trace_keeps_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from memplan.planning.traced import trace_plan
    from memplan.tape.diff import diff

    path = tmp_path / "config.json"
    path.write_text(json.dumps(config("llama", 2)), encoding="utf-8")
    asked = Recipe(**{"trainer": "peft", "mode": "lora", "seq_len": 64, **options})
    answer, traced = trace_plan(path, asked, gpus=[])
    found = diff(predicted.predicted_tape(path, asked), traced)
    assert found.equal, found.changes
    assert not found.peak_only_a
    assert answer.peak.tensor_bytes == plan(path, asked, gpus=[]).peak.tensor_bytes


@pytest.mark.parametrize(
    ("provenance", "looped"), [("measured", False), ("measured", True), ("emulated", True)]
)
def test_a_diff_shows_no_loop_where_there_is_none(
    provenance: str, looped: bool, memplan: Run, tmp_path: Path
) -> None:
    model, other = tmp_path / "config.json", tmp_path / "other.json"
    model.write_text(json.dumps(config("llama", 2)), encoding="utf-8")
    found = write_tape(SPEC, recipe(), looped=looped, folded=False)
    save(replace(found, provenance=provenance), other)
    options = ("--trainer", "peft", "--mode", "lora", "--seq-len", "64")
    assert memplan("diff", f"plan:{model}", str(other), *options).status == 0
