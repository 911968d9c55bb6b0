"""What is simulated many times over is what is simulated once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_specs import SPECS

from memplan.asked.alloc_conf import parse_settings
from memplan.asked.gpus import find_gpu
from memplan.asked.recipe import Recipe
from memplan.device import fit
from memplan.device.allocator import MIB, SMALL, Allocator, Block
from memplan.device.plain import PlainPool, units
from memplan.device.rerun import Rerun, can_rerun
from memplan.importers.resolve import resolve
from memplan.planning import predicted
from memplan.planning.long_tapes import LongTapes
from memplan.planning.runs import Runs
from memplan.predict.loading import loading
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_long_tape

REQUESTS = {
    True: st.integers(0, SMALL),
    False: st.integers(SMALL + 1, 80 * MIB) | st.sampled_from([20 * MIB, 10 * MIB, 2 * MIB, 21 * MIB]),
}
OPTIONS = {
    "mode": ["full", "lora", "qlora"],
    "gradient_checkpointing": [True, False],
    "optimizer": ["adamw_torch", "adamw_torch_fused", "adafactor", "paged_adamw_8bit"],
    "trainer": ["peft", "trl"],
    "attn": ["sdpa", "eager"],
}


@pytest.mark.parametrize("small", [True, False])
@given(st.data())
def test_a_plain_pool_reserves_what_the_allocator_does(small: bool, data: st.DataObject) -> None:
    sizes: list[int] = []
    live: dict[int, Block] = {}
    allocator, pool = Allocator(), PlainPool(small, 20 * MIB)
    for _ in range(data.draw(st.integers(1, 4))):
        events = []
        there = set(live)
        for fate in data.draw(st.lists(st.integers(0, 5), max_size=40)):
            if fate > 2 and there:
                gone = data.draw(st.sampled_from(sorted(there)))
                there.remove(gone)
                events.append(~gone)
            else:
                there.add(len(sizes))
                events.append(len(sizes))
                sizes.append(data.draw(REQUESTS[small]))
        allocator.play(events, sizes, live)
        pool.play(events, [units(size) for size in sizes])
        assert pool.reserved * 512 == allocator.reserved
        before, pool = pool, pool.copy()
        held = before.reserved
        pool.empty()
        allocator.empty_cache()
        assert pool.reserved * 512 == allocator.reserved
        assert before.reserved == held


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(SPECS)),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3000)), min_size=1, max_size=4),
)
def test_a_run_of_other_sizes_is_the_run_itself(
    family: str, options: dict[str, object], points: list[tuple[int, int]]
) -> None:
    spec = SPECS[family](5)
    if family in ("gemma2", "gpt_oss"):
        options = {**options, "attn": "eager"}  # which have no other
    recipe = resolve_recipe(spec, Recipe(**options))
    tapes = LongTapes(spec, recipe)
    for batch, length in points:
        asked = recipe.model_copy(update={"batch_size": batch, "seq_len": length})
        once = write_long_tape(spec, asked, looped=True)
        step = tapes.of(batch, length)
        assert step.tape == once
        rerun = Rerun(step.long, step.kinds, loading(spec, recipe, step.long), parse_settings(""))
        if rerun.suits(step.sizes):
            run = predicted.run(spec, asked)
            assert list(rerun.play(step.sizes)) == [run.begun.reserved, run.free.reserved]


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(["llama-3.2-1b", "qwen2.5-0.5b", "gemma-3-1b"]),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
    st.sampled_from(
        ["", "expandable_segments:True", "roundup_power2_divisions:4", "per_process_memory_fraction:0.5"]
    ),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5000)), min_size=2, max_size=4),
)
def test_runs_exceed_a_card_as_each_of_them_alone(
    model: str, options: dict[str, object], conf: str, points: list[tuple[int, int]]
) -> None:
    spec, gpu = resolve(model).spec, find_gpu("t4")
    recipe = resolve_recipe(spec, Recipe(**options, alloc_conf=conf))
    assert can_rerun(parse_settings(conf)) is not conf.startswith(("expandable", "roundup"))
    runs = Runs(spec, recipe, gpu, None)
    for batch, length in points:
        asked = recipe.model_copy(update={"batch_size": batch, "seq_len": length})
        alone = fit.excess(gpu, predicted.run(spec, asked))
        assert runs.excess(runs.step(batch, length)) == alone


def test_a_row_of_a_table_is_written_out_once() -> None:
    spec = resolve("llama-3.1-8b").spec
    tapes = LongTapes(spec, resolve_recipe(spec, Recipe(mode="lora", gradient_checkpointing=True)))
    long = tapes.of(1, 20_000).long
    assert all(tapes.of(*point).long is long for point in ((1, 19_999), (2, 12_345), (8, 5_001), (1, 20_001)))


def test_a_run_whose_storages_take_each_other_s_place_by_size_is_played_anew_where_sizes_meet() -> None:
    spec = SPECS["llama"](3)
    recipe = resolve_recipe(spec, Recipe(mode="full", optimizer="adafactor"))
    tapes = LongTapes(spec, recipe)
    step = tapes.of(2, 200)
    rerun = Rerun(step.long, step.kinds, loading(spec, recipe, step.long), parse_settings(""))
    assert rerun.suits(step.sizes)
    assert not rerun.suits([512] * len(step.sizes))
