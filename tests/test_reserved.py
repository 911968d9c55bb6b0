"""A run on the simulated allocator: loading, first step, later step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_specs import SPECS, config

from memplan.asked.alloc_conf import AllocatorSettings
from memplan.asked.recipe import Recipe
from memplan.asked.spec import Quantization
from memplan.device.allocator import MIB
from memplan.device.playback import simulate
from memplan.importers.resolve import resolve
from memplan.planning import predicted
from memplan.predict.blueprint import named_buffers, named_shapes
from memplan.predict.loading import _natural, loading
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_long_tape, write_tape
from memplan.tape import Category, Part, Phase, Tape, replay, rounded, static_bytes


def tape_of(*setup: tuple[int, Category], step: list[int | str]) -> Tape:
    """A tape whose step allocates (MiB) and releases ("-2": the third storage of all)."""
    tape = Tape()
    tape.begin(Phase.SETUP, "weights", part=Part.LOADED)
    for size, category in setup:
        tape.alloc(size * MIB, "parameter", category)
    tape.begin(Phase.FORWARD, "forward")
    for event in step:
        if event == "step":
            tape.begin(Phase.OPTIMIZER, "update", part=Part.UPDATE)
        elif isinstance(event, str):
            tape.free(int(event[1:]))
        else:
            tape.alloc(event * MIB, "mm", Category.TEMPORARIES)
    tape.finish()
    return tape


def test_states_are_born_into_what_the_first_step_cached() -> None:
    tape = tape_of((30, Category.WEIGHTS), (20, Category.OPTIMIZER_STATE), step=[64, "-2", "step"])
    run = simulate(tape)
    # the state takes 20 of the 64 MiB that the step had, so that the next step needs 64 more
    assert (run.allocated, run.reserved) == ((30 + 20 + 64) * MIB, (30 + 64 + 64) * MIB)
    assert run.fragmentation == 44 * MIB
    assert [reserved // MIB for _, reserved in run.changes] == [94, 158]


def test_the_first_product_asks_for_its_workspace() -> None:
    tape = Tape()
    tape.begin(Phase.SETUP, "weights", part=Part.LOADED)
    tape.alloc(30 * MIB, "parameter", Category.WEIGHTS)
    tape.alloc(32 * MIB, "scratch", Category.TEMPORARIES, workspace=True)
    tape.begin(Phase.FORWARD, "forward")
    tape.alloc(64 * MIB, "mm", Category.TEMPORARIES)
    tape.multiply()
    tape.free(2)
    tape.finish()
    assert simulate(tape, capacity=(30 + 32 + 64) * MIB).ran_out is None
    ran_out = simulate(tape, capacity=100 * MIB).ran_out
    assert ran_out is not None
    assert (ran_out.stage, ran_out.phase, ran_out.operation) == ("first step", Phase.FORWARD, "mm")
    assert (ran_out.requested, ran_out.reserved) == (32 * MIB, (30 + 64) * MIB)


def test_what_a_step_replaces_the_next_one_finds() -> None:
    tape = tape_of((30, Category.WEIGHTS), (2, Category.OPTIMIZER_STATE), step=[4, "step", 2, "-1", "-2"])
    assert simulate(tape).ran_out is None


def test_a_run_that_ends_says_where() -> None:
    tape = tape_of((30, Category.WEIGHTS), (20, Category.OPTIMIZER_STATE), step=[64, "-2", "step"])
    ran_out = simulate(tape, capacity=100 * MIB).ran_out
    assert ran_out is not None
    assert (ran_out.stage, ran_out.phase, ran_out.operation) == ("later step", Phase.FORWARD, "mm")
    assert (ran_out.requested, ran_out.reserved) == (64 * MIB, 94 * MIB)
    first = simulate(tape, capacity=80 * MIB).ran_out
    assert first is not None
    assert first.stage == "first step"
    loading_ = simulate(tape, capacity=20 * MIB).ran_out
    assert loading_ is not None
    assert (loading_.stage, loading_.operation) == ("loading", "parameter")


def test_a_card_that_is_large_enough_changes_nothing() -> None:
    tape = tape_of((30, Category.WEIGHTS), (20, Category.OPTIMIZER_STATE), step=[64, "-2", "step"])
    assert simulate(tape, capacity=158 * MIB) == simulate(tape)


def steps_of(loading_: Tape, step: Tape) -> list[tuple[str, int]]:
    """A loading tape in words: what the step finds there, and what is only there for a while."""
    steps: list[tuple[str, int]] = []
    first = len(step.sizes)
    for segment in loading_.segments:
        if segment.part is Part.EMPTIED:
            steps.append(("empty_cache", 0))
        for event in loading_.events[segment.start : segment.stop]:
            index = event if event >= 0 else ~event
            if event < 0:
                steps.append(("drop", index - first))
            else:
                steps.append(("alloc", index) if index < first else ("scratch", loading_.sizes[index]))
    return steps


# -- real recipes ------------------------------------------------------------------------------------

OPTIONS = {
    "mode": ["full", "lora", "qlora"],
    "seq_len": [1, 130],
    "optimizer": ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adafactor", "sgd"],
    "gradient_accumulation_steps": [1, 2],
    "autocast": [False, True],
    "dtype": ["bfloat16", "float32"],
}


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(SPECS)),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
)
def test_every_storage_is_loaded_once_and_the_step_is_the_tape_s(
    family: str, options: dict[str, object]
) -> None:
    spec = SPECS[family](4)
    recipe = resolve_recipe(spec, Recipe(trainer="peft", **options))
    tape = write_long_tape(spec, recipe)
    loaded_by = loading(spec, recipe, tape)
    steps = steps_of(loaded_by, tape)
    resting = {
        event
        for segment in tape.segments
        if segment.part is Part.LOADED
        for event in tape.events[segment.start : segment.stop]
    }
    loaded = Counter(number for what, number in steps if what == "alloc")
    assert set(loaded) == resting
    assert set(loaded.values()) <= {1}
    scratch = sum(what == "scratch" for what, _ in steps)
    assert Counter(number for what, number in steps if what == "drop") == Counter(range(scratch))
    run = simulate(tape, loaded_by)
    peak = replay(tape).allocated_bytes
    tails = len(tape.sizes) * MIB  # each block may be charged up to 1 MiB that is not split off
    assert peak <= run.allocated <= peak + tails
    assert run.allocated <= run.reserved
    assert run.ran_out is None
    # where every rest is split off, blocks are tensors
    exact = simulate(tape, loaded_by, AllocatorSettings(expandable_segments=True))
    assert exact.allocated == peak


def test_a_70b_loads_as_from_pretrained_does() -> None:
    spec = resolve("llama-3.3-70b").spec
    recipe = resolve_recipe(spec, Recipe(trainer="peft"))
    tape = write_long_tape(spec, recipe)
    steps = steps_of(loading(spec, recipe, tape), tape)
    # the warm-up's one block: half a byte a quantised weight, two a byte of the rest, in 16 bits as loaded
    linear = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    rest = 2 * 128256 * 8192 + (2 * 80 + 1) * 8192
    assert steps[:2] == [("scratch", rounded(linear // 2 + 2 * rest)), ("drop", 0)]
    # lm_head comes first, then the embedding, then layers in the order of numbers
    first = [size for what, size in steps if what == "scratch"][1:4]
    assert first == [2 * 128256 * 8192, 2 * 128256 * 8192, 2 * 8192]  # the last: layer 0's input_layernorm
    # twice: by PEFT's preparation, and by the Trainer before it trains
    assert steps.count(("empty_cache", 0)) == 2
    without = resolve_recipe(spec, Recipe(trainer="peft", kbit_prep=False))
    tape = write_long_tape(spec, without)
    others = steps_of(loading(spec, without, tape), tape)
    assert others.count(("empty_cache", 0)) == 1
    assert others[-1] == ("empty_cache", 0)


@pytest.mark.parametrize("family", sorted(SPECS))
def test_the_warm_up_and_the_order_are_transformers_own(family: str) -> None:
    torch = pytest.importorskip("torch")
    import transformers
    from transformers import AutoConfig, BitsAndBytesConfig
    from transformers.core_model_loading import dot_natural_key
    from transformers.modeling_utils import get_total_byte_count, local_torch_dtype
    from transformers.quantizers import AutoHfQuantizer

    spec = SPECS[family](11)
    settings_ = AutoConfig.for_model(**{**config(family, 11), "pad_token_id": 0})
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    with local_torch_dtype(torch.bfloat16), torch.device("meta"):
        kind = getattr(transformers, config(family, 11)["architectures"][0])
        model = kind._from_config(settings_, dtype=torch.bfloat16)
        quantizer.preprocess_model(model, dtype=torch.bfloat16, device_map={"": 0}, checkpoint_files=None)
    names = list(model.state_dict())
    counted = get_total_byte_count(model, dict.fromkeys(names, torch.device("cuda", 0)), quantizer)
    recipe = resolve_recipe(spec, Recipe(trainer="peft"))
    tape = write_long_tape(spec, recipe)
    what, size = steps_of(loading(spec, recipe, tape), tape)[0]
    assert (what, size) == ("scratch", rounded(sum(counted.values())))
    loaded = [name for name in sorted(names, key=dot_natural_key) if name not in model.all_tied_weights_keys]
    assert loaded == sorted([*named_shapes(spec), *named_buffers(spec, 2)], key=_natural)


def test_a_small_card_bounds_the_warm_up() -> None:
    spec = resolve("llama-3.3-70b").spec
    recipe = resolve_recipe(spec, Recipe(trainer="peft"))
    tape = write_long_tape(spec, recipe)
    _, warm = steps_of(loading(spec, recipe, tape, 24 << 30), tape)[0]
    assert warm == rounded((24 << 30) - int(1.2 * (1 << 30)))


def test_full_and_lora_are_moved_in_the_order_of_modules() -> None:
    spec = SPECS["llama"](3)
    for mode in ("full", "lora"):
        recipe = resolve_recipe(spec, Recipe(trainer="peft", mode=mode))
        tape = write_long_tape(spec, recipe)
        *steps, last = steps_of(loading(spec, recipe, tape), tape)
        assert last == ("empty_cache", 0)
        assert [number for _, number in steps] == sorted(number for _, number in steps)
        assert {what for what, _ in steps} == {"alloc"}


@pytest.mark.parametrize("kbit_prep", [True, False])
def test_a_70b_is_simulated_in_less_than_a_second(kbit_prep: bool) -> None:
    from time import process_time

    spec = resolve("llama-3.3-70b").spec
    run = predicted.run(spec, resolve_recipe(spec, Recipe(trainer="peft", kbit_prep=kbit_prep)))
    start = process_time()
    assert run.free.reserved > run.free.allocated
    assert process_time() - start < 1


def test_loading_leaves_what_rests() -> None:
    spec = SPECS["llama"](6)
    recipe = resolve_recipe(spec, Recipe(trainer="peft"))
    long, played = write_long_tape(spec, recipe), write_tape(spec, recipe, folded=False)
    assert static_bytes(long) == static_bytes(played)


@pytest.mark.parametrize(
    ("model", "recipe", "reserved"),
    [
        # what plain scripts reserved on an emulated A100 (data/plain.json)
        ("llama-3.1-8b", {"seq_len": 2048}, 13_941_866_496),
        ("llama-3.1-8b", {"seq_len": 1024, "autocast": True}, 11_444_158_464),
        ("llama-3.2-3b", {"seq_len": 512}, 4_592_762_880),
        ("qwen3-8b", {"seq_len": 2048}, 15_380_512_768),
    ],
)
def test_a_workspace_comes_after_the_product(model: str, recipe: dict[str, object], reserved: int) -> None:
    spec = resolve(model).spec
    run = predicted.run(spec, resolve_recipe(spec, Recipe(trainer="peft", **recipe)))
    assert run.free.reserved == reserved


STORED = Quantization(quant_type="nf4", double_quant=True, compute_dtype="bfloat16")


@pytest.mark.parametrize(
    ("model", "recipe", "reserved"),
    [
        # the same of checkpoints that are in 4 bits already (data/plain.json)
        ("llama-3.1-8b", {"trainer": "peft", "r": 8, "seq_len": 1024}, 11_299_454_976),
        ("llama-3.2-1b", {"trainer": "trl", "device_map": None, "r": 16, "seq_len": 2048}, 1_616_904_192),
    ],
)
def test_a_checkpoint_in_4_bits_reserves_what_it_does_on_an_emulated_card(
    model: str, recipe: dict[str, object], reserved: int
) -> None:
    spec = resolve(model).spec.model_copy(update={"quantization": STORED})
    run = predicted.run(spec, resolve_recipe(spec, Recipe(**recipe)))
    assert run.free.reserved == reserved


@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_that_are_in_4_bits_come_as_they_are(double_quant: bool) -> None:
    stored = STORED.model_copy(update={"double_quant": double_quant})
    plain = SPECS["llama"](2)
    spec = plain.model_copy(update={"quantization": stored, "tie_word_embeddings": True})
    recipe = resolve_recipe(spec, Recipe(trainer="trl", mode="qlora", device_map=None))
    tape = write_long_tape(spec, recipe)
    steps = steps_of(loading(spec, recipe, tape), tape)
    warm, *told = (size for what, size in steps if what == "scratch" and size not in adapted(tape))
    assert warm > max(tape.sizes[i] for i, kind in enumerate(tape.categories) if kind is Category.WEIGHTS)
    assert set(told) == {512}  # JSON, one of each of seven linear layers
    assert len(told) == 7 * 2
    # in the order of their names, whichever comes first on the tape of the step
    names = [tape.modules[i] for what, i in steps if what == "alloc" and "down_proj." in tape.modules[i]]
    tensors = ["weight", "absmax", "nested_absmax", "nested_quant_map", "quant_map", "offset"]
    kept = [name for name in tensors if double_quant or name in ("weight", "absmax", "quant_map")]
    assert names[: len(kept)] == [f"mlp.down_proj.{name}" for name in kept]
    # quantising leaves a table on the card, which nobody makes here
    made = resolve_recipe(plain, Recipe(trainer="trl", mode="qlora", double_quant=double_quant))
    tables = [
        write_long_tape(one, how).modules.count("bitsandbytes")
        for one, how in ((spec, recipe), (plain, made))
    ]
    assert tables == [0, int(double_quant)]


def adapted(tape: Tape) -> set[int]:
    """Sizes that adapters have on their way to a step."""
    sizes = {
        size for size, kind in zip(tape.sizes, tape.categories, strict=True) if kind is Category.ADAPTERS
    }
    return sizes | {2 * size for size in sizes}


def test_adapters_come_in_16_bits_and_are_cast_afterwards() -> None:
    spec = SPECS["llama"](2)
    recipe = resolve_recipe(spec, Recipe(trainer="peft", r=64))
    tape = write_long_tape(spec, recipe)
    steps = steps_of(loading(spec, recipe, tape), tape)
    adapters = [i for i, category in enumerate(tape.categories) if category is Category.ADAPTERS]
    brought = steps[-3 * len(adapters) - 1 : -1]
    assert [size for what, size in brought[: len(adapters)]] == [tape.sizes[i] // 2 for i in adapters]
    assert [step for step in brought[len(adapters) :] if step[0] == "alloc"] == [
        ("alloc", i) for i in adapters
    ]


def test_a_model_smaller_than_two_segments_is_not_warmed_up_for() -> None:
    spec = SPECS["llama"](2)
    recipe = resolve_recipe(spec, Recipe(trainer="trl", mode="qlora"))
    assert recipe.device_map == "auto"
    steps = steps_of(loading(spec, recipe, tape := write_long_tape(spec, recipe)), tape)
    (probe, first), (dropped, _), (then, _) = steps[:3]
    assert (probe, first, dropped, then) == ("scratch", 512, "drop", "alloc")
