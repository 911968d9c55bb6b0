"""Tapes compared: toys whose difference is known, plans, and plans against traces."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from small_specs import SPECS, config

from memplan.asked.recipe import Recipe
from memplan.predict.step import write_tape
from memplan.report.diff import markdown, show_diff
from memplan.tape import Category, Part, Phase, Tape, replay
from memplan.tape.diff import Diff, diff, kind_of
from memplan.tape.file import save

Run = Callable[..., Outcome]

KIB = 1024


def toy(step: str, *, setup: tuple[int, ...] = (1,), module: str = "mlp") -> Tape:
    """A tape in a tiny language: ``fwd:`` ``bwd:`` ``opt:`` begin a phase, ``L0:`` a layer; ``name=3``
    allocates 3 KiB, ``-name`` releases the newest of that name."""
    tape = Tape()
    tape.begin(Phase.SETUP, "weights", part=Part.LOADED)
    for size in setup:
        tape.alloc(size * KIB, "weight", Category.WEIGHTS)
    phase, held = Phase.FORWARD, {}
    for word in step.split():
        if word in ("fwd:", "bwd:", "opt:"):
            phase = {"fwd:": Phase.FORWARD, "bwd:": Phase.BACKWARD, "opt:": Phase.OPTIMIZER}[word]
            tape.begin(phase, "head")
        elif word.endswith(":"):
            tape.begin(phase, "layer", int(word[1:-1]))
        elif word.startswith("-"):
            tape.free(held[word[1:]].pop())
        else:
            name, size = word.split("=")
            tape.module = module
            held.setdefault(name, []).append(tape.alloc(int(size) * KIB, name, Category.ACTIVATIONS))
    tape.finish()
    return tape


STEP = "fwd: embed=4 L0: mm=2 mul=1 L1: mm=2 mul=1 bwd: loss=8 -loss L1: grad=3 -grad -mul -mm L0: -mul -mm"


def test_a_tape_equals_itself() -> None:
    found = diff(toy(STEP), toy(STEP))
    assert found.equal
    assert (found.first_difference, found.first_live_difference) == (None, None)
    assert (found.peak_only_a, found.peak_only_b, found.changes, found.renamed) == ((), (), (), ())


def test_another_size() -> None:
    found = diff(toy(STEP), toy(STEP.replace("L1: mm=2", "L1: mm=5")))
    assert not found.equal
    first = found.first_difference
    assert first and first.a and first.b
    assert (first.a.index, first.a.phase, first.a.layer, first.a.operation) == (3, Phase.FORWARD, 1, "mm")
    assert (first.a.size, first.b.size) == (2 * KIB, 5 * KIB)
    assert (first.a.live_bytes, first.b.live_bytes) == (10 * KIB, 13 * KIB)
    assert [(h.operation, h.size, h.count) for h in found.peak_only_a] == [("mm", 2 * KIB, 1)]
    assert [(h.operation, h.size, h.count) for h in found.peak_only_b] == [("mm", 5 * KIB, 1)]
    assert found.b.allocated_bytes - found.a.allocated_bytes == 3 * KIB
    assert [(c.operation, c.size_a, c.size_b, c.count, c.first_layer) for c in found.changes] == [
        ("mm", 2 * KIB, 5 * KIB, 1, 1)
    ]


def test_one_more_allocation() -> None:
    found = diff(toy(STEP), toy(STEP.replace("mul=1", "mul=1 dropout=1")))
    assert not found.equal
    assert found.first_difference and found.first_difference.a is None
    assert found.first_difference.b and found.first_difference.b.operation == "dropout"
    assert [(c.operation, c.size_a, c.size_b, c.count, c.first_layer) for c in found.changes] == [
        ("dropout", None, KIB, 2, 0)
    ]
    assert [(h.operation, h.count) for h in found.peak_only_b] == [("dropout", 2)]
    assert found.peak_only_a == ()


def test_a_layer_more() -> None:
    found = diff(toy(STEP), toy(STEP.replace("bwd:", "L2: mm=2 mul=1 bwd:")))
    assert {(c.operation, c.size_a, c.size_b, c.first_layer) for c in found.changes} == {
        ("mm", None, 2 * KIB, 2),
        ("mul", None, KIB, 2),
    }


def test_the_same_released_later() -> None:
    # equal sizes in equal order, but the loss lives on into the backward of layer 1
    later = toy(STEP.replace("-loss L1: grad=3", "L1: grad=3 -loss"))
    found = diff(toy(STEP), later)
    assert not found.equal
    assert found.first_difference is None
    assert found.first_live_difference and found.first_live_difference.a
    assert found.first_live_difference.a.operation == "grad"
    assert found.b.operation == "grad" and found.a.operation == "loss"


def test_names_alone_make_nothing_unequal() -> None:
    found = diff(toy(STEP, module="model.layers.0.mlp"), toy(STEP.replace("mul", "multiply"), module="mlp"))
    assert found.equal
    assert found.peak_only_a == found.peak_only_b == ()
    assert [(r.phase, r.operation_a, r.operation_b, r.count) for r in found.renamed] == [
        (Phase.FORWARD, "mul", "multiply", 2)
    ]


def test_setup_has_no_order() -> None:
    assert diff(toy(STEP, setup=(1, 2, 3)), toy(STEP, setup=(3, 1, 2))).equal
    found = diff(toy(STEP, setup=(1, 2, 3)), toy(STEP, setup=(1, 4, 3)))
    first = found.first_difference
    assert not found.equal
    assert first and first.a and first.b and first.a.phase is Phase.SETUP
    assert (first.a.index, first.a.size, first.b.size) == (1, 2 * KIB, 4 * KIB)


def test_other_phases() -> None:
    found = diff(toy(STEP), toy(STEP + " opt: state=1 -state"))
    assert not found.equal
    assert [(c.phase, c.operation, c.count) for c in found.changes] == [(Phase.OPTIMIZER, "state", 1)]


def test_nothing_but_setup() -> None:
    assert diff(toy(""), toy("")).equal
    assert not diff(toy(""), toy(STEP)).equal


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.base_layer", "self_attn.q_proj"),
        ("self_attn.q_proj.lora_A.default", "self_attn.q_proj"),
        ("mlp.experts.base_layer.base_layer", "mlp.experts"),
        ("transformer.h.11", ""),
        ("transformer.blocks.1.ffn.down_proj", "ffn.down_proj"),
        ("model.norm", "model.norm"),
        ("lm_head", "lm_head"),
        ("", ""),
    ],
)
def test_modules_are_known_by_their_place_in_the_layer(module: str, kind: str) -> None:
    assert kind_of(module) == kind


words = st.lists(
    st.tuples(st.sampled_from(["mm", "mul", "L0:", "L1:", "bwd:"]), st.integers(1, 4)), max_size=25
).map(lambda found: " ".join(["fwd:", *(w if w.endswith(":") else f"{w}={n}" for w, n in found)]))


@settings(max_examples=150, deadline=None)
@given(words, words)
def test_any_two_tapes(a: str, b: str) -> None:
    tape_a, tape_b = toy(a), toy(b)
    found, back = diff(tape_a, tape_b), diff(tape_b, tape_a)
    assert diff(tape_a, tape_a).equal
    assert found.equal == back.equal
    assert found.a == back.b
    if [tape_a.sizes[e] for e in tape_a.events] != [tape_b.sizes[e] for e in tape_b.events]:
        assert not found.equal
    # what only one holds at its peak is what their peaks differ by
    only = sum(h.nbytes for h in found.peak_only_b) - sum(h.nbytes for h in found.peak_only_a)
    assert only == found.b.allocated_bytes - found.a.allocated_bytes
    # nothing is lost in lining up
    more = sum(c.count * ((c.size_b is not None) - (c.size_a is not None)) for c in found.changes)
    assert more == found.b.allocations - found.a.allocations


# -- plans -------------------------------------------------------------------------------------------------


def planned(layers: int = 3, *, folded: bool = False, **options: Any) -> Tape:
    return write_tape(
        SPECS["llama"](layers), Recipe(trainer="peft", seq_len=64, **options).resolved(), folded=folded
    )


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_a_folded_plan_equals_the_unfolded(mode: str) -> None:
    found = diff(planned(12, mode=mode, folded=True), planned(12, mode=mode))
    assert found.equal
    assert (found.first_live_difference, found.peak_only_a, found.peak_only_b) == (None, (), ())


def test_the_diff_names_the_tensor_that_an_option_brings() -> None:
    found = diff(planned(mode="lora"), planned(mode="lora", lora_dropout=0.1))
    assert not found.equal
    assert found.first_difference and found.first_difference.a is None and found.first_difference.b
    assert found.first_difference.b.operation == "native_dropout"
    assert found.first_difference.b.module == "self_attn.q_proj"
    assert {change.operation for change in found.changes} == {"native_dropout", "native_dropout_backward"}
    assert {held.operation for held in found.peak_only_b} == {"native_dropout"}

    found = diff(planned(mode="lora", r=8), planned(mode="lora", r=16))
    assert found.first_difference and found.first_difference.a and found.first_difference.b
    assert found.first_difference.a.phase is Phase.SETUP
    assert found.first_difference.a.module == "self_attn.q_proj.lora_A"
    assert (found.first_difference.a.size, found.first_difference.b.size) == (8 * 256 * 4, 16 * 256 * 4)


def test_seventy_billion_take_seconds() -> None:
    import time

    from memplan.planning.predicted import predicted_tape

    a, b = (
        predicted_tape("llama-70b"),
        predicted_tape("llama-70b", Recipe(trainer="peft", r=16, seq_len=1024)),
    )
    start = time.process_time()
    assert not diff(a, b).equal
    assert time.process_time() - start < 10


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """axolotl's, of a model of two layers."""
    (tmp_path / "config.json").write_text(json.dumps(config("llama", 2)))
    lines = {"base_model": str(tmp_path), "adapter": "lora", "lora_r": 4, "lora_target_linear": True}
    lines |= {"sequence_len": 64, "micro_batch_size": 2, "bf16": True, "optimizer": "adamw_torch"}
    (tmp_path / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return tmp_path / "run.yaml"


@pytest.mark.filterwarnings("default")
def test_a_trainers_file_is_planned_and_traced(run_file: Path, memplan: Run) -> None:
    pytest.importorskip("peft")
    outcome = memplan("diff", f"plan:{run_file}", f"trace:{run_file}", "--json")
    assert (outcome.status, json.loads(outcome.out)["equal"]) == (0, True)
    other = memplan("diff", f"plan:{run_file}", f"plan:{run_file.parent}", "--r", "4")
    assert other.status == 1  # the file says more than a rank


def test_what_is_no_tape_is_told_what_its_plan_is_called(run_file: Path, memplan: Run) -> None:
    for name in ("llama3:8b", str(run_file)):
        outcome = memplan("diff", name, "plan:qwen3:8b")
        assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert f" is plan:{name}" in outcome.err


# -- plans against traces ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_a_plan_equals_its_trace(mode: str) -> None:
    found = diff(planned(mode=mode), traced(mode=mode))
    assert found.equal
    assert (found.a.provenance, found.b.provenance) == ("predicted", "traced")
    assert (found.first_difference, found.changes, found.peak_only_a, found.peak_only_b) == (None, (), (), ())


@pytest.mark.filterwarnings("default")
def test_a_plan_is_not_the_trace_of_another_recipe() -> None:
    found = diff(planned(mode="lora"), traced(mode="lora", lora_dropout=0.1))
    assert not found.equal
    assert found.first_difference and found.first_difference.b
    assert found.first_difference.b.operation == "native_dropout"
    assert "q_proj" in found.first_difference.b.module


def traced(**options: Any) -> Tape:
    pytest.importorskip("torch")
    for package in ("transformers", "peft", "bitsandbytes", "accelerate"):
        pytest.importorskip(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from memplan.trace import trace
    return trace(config("llama", 3), Recipe(trainer="peft", seq_len=64, **options))


# -- reports -----------------------------------------------------------------------------------------------


def example() -> Diff:
    return diff(
        toy(STEP, module="mlp.up_proj"),
        toy(STEP.replace("L1: mm=2", "L1: mm=5").replace("grad", "gradient"), setup=(2,)),
    )


@pytest.mark.parametrize("name", ["diff", "diff-equal"])
def test_terminal(name: str, golden: Callable[[str, str], None]) -> None:
    found = example() if name == "diff" else diff(toy(STEP), toy(STEP))
    console = Console(width=80, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        show_diff(found, ("a.json", "plan:llama-8b"), console)
    golden(f"{name}.txt", capture.get())
    assert all(len(line) <= 80 for line in capture.get().splitlines())


def test_markdown(golden: Callable[[str, str], None]) -> None:
    golden("diff.md", markdown(example(), ("a.json", "plan:llama-8b")))


def test_names_stay_text_in_markdown() -> None:
    hostile = "a|b\n# `c` <script>\u2028</script>"
    plain, text = (markdown(example(), (name, name)) for name in ("name", hostile))
    assert len(text.splitlines()) == len(plain.splitlines())
    name = "a\\|b␊# \\`c\\` &lt;script>\ufffd&lt;/script>"
    assert f"| tape | {name} | {name} |" in text.splitlines()


def test_long_lists_are_cut() -> None:
    a, b = planned(mode="lora"), planned(mode="lora", r=16, lora_dropout=0.1)
    found = diff(a, b)
    assert len(found.changes) > 12
    assert f"and {len(found.changes) - 12} more" in markdown(found, ("a", "b"))


# -- the command -------------------------------------------------------------------------------------------

SMALL = "llama-3.2-1b"


def test_status_0_for_equal_and_1_for_different(memplan: Run, tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json.gz"
    save(toy(STEP), one)
    save(toy(STEP.replace("mm=2", "mm=3")), other)
    same = memplan("diff", one, one)
    assert (same.status, same.err) == (0, "")
    assert same.out.startswith("Equal: ")
    different = memplan("diff", one, other)
    assert (different.status, different.err) == (1, "")
    assert different.out.startswith("Different: B peaks 2,048 bytes above A.\n")
    assert memplan("diff", one, other, "--markdown").out.startswith("**Different: ")
    document = json.loads(memplan("diff", one, other, "--json").out)
    assert document["equal"] is False
    assert document["schema_version"] == 1
    assert document["tapes"] == [str(one), str(other)]
    assert document["first_difference"]["b"]["operation"] == "mm"
    assert document["peak_only_b"][0] == {
        "category": "activations", "operation": "mm", "module": "mlp", "size": 3 * KIB, "count": 2,
    }  # fmt: skip


def test_plans_are_run_with_the_options(memplan: Run, tmp_path: Path) -> None:
    path = tmp_path / "tape.json.gz"
    memplan(SMALL, "--mode", "lora", "--r", "4", "--tape", path)
    assert memplan("diff", path, f"plan:{SMALL}", "--mode", "lora", "--r", "4").status == 0
    outcome = memplan("diff", f"plan:{SMALL}", path, "--mode", "lora", "--r", "8", "--json")
    assert outcome.status == 1
    assert json.loads(outcome.out)["first_difference"]["a"]["module"] == "self_attn.q_proj.lora_A"


BAD_QUESTIONS = {
    "one tape": (["plan:llama-8b"], "B"),
    "unknown model": (["plan:lama-70b", "plan:llama-70b"], "llama-70b"),
    "no file": (["no.json", "plan:llama-8b"], "no.json"),
    "no model": (["plan:", "plan:llama-8b"], "empty"),
    "options for files": (["a.json", "b.json", "--r", "8"], "plan:MODEL"),
    "two formats": (["plan:llama-8b", "plan:llama-8b", "--json", "--markdown"], "not allowed"),
    "bad rank": (["plan:llama-8b", "plan:llama-8b", "--r", "0"], "r"),
}


@pytest.mark.parametrize("question", BAD_QUESTIONS)
def test_a_bad_question_has_status_2(question: str, memplan: Run) -> None:
    arguments, fragment = BAD_QUESTIONS[question]
    outcome = memplan("diff", *arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert fragment in outcome.err and outcome.err.count("\n") == 1


def test_equal_means_equal_peaks() -> None:
    for mode in ("full", "qlora"):
        tape = planned(mode=mode)
        assert diff(tape, tape).a.allocated_bytes == replay(tape).allocated_bytes


def test_tapes_that_have_nothing_in_common_are_lined_up_in_time() -> None:
    """What is compared pair by pair goes in pieces, however long the tapes are."""

    def strange(size: int) -> Tape:
        tape = Tape()
        tape.begin(Phase.SETUP, "weights", part=Part.LOADED)
        for number in range(20_000):
            tape.alloc(size + 512 * number, "weight", Category.WEIGHTS)
        for number in range(20_000):
            tape.begin(Phase.FORWARD, "layer", number % 2)
            tape.free(tape.alloc(size + 512 * number, "mm", Category.ACTIVATIONS))
        tape.finish()
        return tape

    began = time.monotonic()
    found = diff(strange(1 << 20), strange(1 << 30))
    assert not found.equal
    assert time.monotonic() - began < 20
