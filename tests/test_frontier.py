"""The frontier: polynomials against played steps, and the edge that is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from small_specs import SPECS

from memplan.asked.gpus import Gpu, find_gpu
from memplan.asked.recipe import Recipe
from memplan.device.fit import judge
from memplan.errors import MemplanError
from memplan.importers.resolve import resolve
from memplan.planning import predicted
from memplan.planning.frontier import _NEAR, Peaks, _last_not_above_zero, at_most, frontier, largest
from memplan.predict.parameters import resolve_recipe

Run = Callable[..., Outcome]

OPTIONS = {
    "mode": ["full", "lora", "qlora"],
    "gradient_checkpointing": [True, False],
    "optimizer": ["adamw_torch", "adamw_torch_fused", "adafactor"],
    "dtype": ["bfloat16", "float32"],
    "autocast": [False, True],
}
MODELS = [
    "llama-3.2-1b",
    "qwen2.5-0.5b",
    "mistral-7b-v0.1",
    "phi-4-mini",
    "olmo-2-1b",
    "qwen3-0.6b",
    "gemma-3-1b",
]


def peaks(model: str, gpu: str = "h200", **options: object) -> Peaks:
    spec = resolve(model).spec
    return Peaks(spec, resolve_recipe(spec, Recipe(trainer="peft", **options)), find_gpu(gpu))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MODELS),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6000)), min_size=1, max_size=4),
    st.sampled_from(["h200", "t4"]),
)
def test_a_polynomial_is_what_is_played(
    model: str, options: dict[str, object], points: list[tuple[int, int]], gpu: str
) -> None:
    known = peaks(model, gpu, **options)
    for batch, length in points:
        over = known.allocated(batch, length) - known.played(batch, length)
        assert 0 <= over < _NEAR, (batch, length)


def test_a_mask_that_all_sequences_share_is_in_the_polynomial() -> None:
    # where attention is not fused it makes a causal mask of its own, without a batch
    known = peaks(
        "mistral-7b-v0.1", "t4", mode="lora", optimizer="adamw_bnb_8bit", max_grad_norm=0.0,
        gradient_checkpointing=True, autocast=True,
    )  # fmt: skip
    assert 0 <= known.allocated(9, 2430) - known.played(9, 2430) < _NEAR
    assert [sized is not None for sized in known._sized.values()] == [True]


def test_polynomials_are_used_where_they_save_time() -> None:
    known = peaks("llama-3.3-70b", mode="qlora")
    assert known.allocated(1, 4096) == known.played(1, 4096)
    assert known.allocated(3, 5001) == known.played(3, 5001)
    assert [sized is not None for sized in known._sized.values()] == [True]


@given(
    st.integers(0, 3000).flatmap(
        lambda last: st.tuples(
            st.just(last), st.integers(0, last), st.integers(1, max(last, 1)), st.integers(1, 99)
        )
    )
)
def test_the_edge_is_found(case: tuple[int, int, int, int]) -> None:
    last, edge, hint, slope = case

    def excess(value: int) -> int:
        assert 1 <= value <= last
        return (value - edge) * slope + max(value - edge - 40, 0) ** 2 - (value <= edge)

    assert _last_not_above_zero(excess, last, hint) == edge


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=200), st.integers(1, 300))
def test_of_any_function_an_edge_is_found(values: list[int], hint: int) -> None:
    found = _last_not_above_zero(lambda value: values[value - 1], len(values), hint)
    assert found == 0 or values[found - 1] <= 0
    assert found == len(values) or values[found] > 0


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-3-1b"]),
    st.sampled_from(["full", "lora", "qlora"]),
    st.booleans(),
    st.sampled_from(["t4", "4090", "a6000"]),
    st.integers(1, 4),
)
def test_what_is_found_has_room_and_the_next_has_not(
    model: str, mode: str, checkpointing: bool, gpu: str, batch: int
) -> None:
    known = peaks(model, gpu, mode=mode, gradient_checkpointing=checkpointing)
    length = at_most(known, "seq_len", batch)
    assert length == 0 or known.played(batch, length) <= known.room
    assert length == known.longest or known.played(batch, length + 1) > known.room
    assert at_most(known, "seq_len", batch + 1) <= length or length == known.longest
    if length:
        assert at_most(known, "batch_size", length) >= batch


def verdict(model: str, recipe: Recipe, gpu: Gpu, **fields: int) -> str:
    spec = resolve(model).spec
    asked = resolve_recipe(spec, recipe).model_copy(update=fields)
    return judge(gpu, predicted.run(spec, asked)).verdict


@pytest.mark.parametrize(
    ("model", "options", "what", "other"),
    [
        ("llama-3.2-1b", {"mode": "full"}, "seq_len", 2),
        ("llama-3.2-1b", {"mode": "qlora"}, "batch_size", 512),
        ("llama-3.1-8b", {"mode": "lora", "gradient_checkpointing": True}, "seq_len", 1),
    ],
)
def test_the_largest_fits_and_the_next_does_not(
    model: str, options: dict[str, object], what: str, other: int
) -> None:
    recipe, gpu = Recipe(trainer="peft", **options), find_gpu("4090")
    found = largest(peaks(model, "4090", **options), what, other)  # type: ignore[arg-type]
    kept = "batch_size" if what == "seq_len" else "seq_len"
    assert verdict(model, recipe, gpu, **{what: found, kept: other}) == "fits"
    assert verdict(model, recipe, gpu, **{what: found + 1, kept: other}) != "fits"
    bound = at_most(peaks(model, "4090", **options), what, other)  # type: ignore[arg-type]
    assert found <= bound


def test_more_than_a_minute_of_simulation_is_refused() -> None:
    spec = resolve("llama-3.1-405b").spec
    with pytest.raises(MemplanError, match=r"100 points of 126 layers are too many .* ask for 79 at most"):
        frontier(spec, [Recipe(trainer="peft")], find_gpu("h100"), range(1, 101), simulated=True)


def test_exact_cells_fit() -> None:
    spec, gpu = SPECS["llama"](4), find_gpu("t4")
    recipe = Recipe(trainer="peft", mode="lora", attn="eager")
    quick = frontier(spec, [recipe], gpu, [1, 2], simulated=False)
    exact = frontier(spec, [recipe], gpu, [1, 2])
    for bound, found in zip(quick.rows[0].cells, exact.rows[0].cells, strict=True):
        assert found.seq_len is not None
        assert bound.seq_len is not None
        assert found.seq_len <= bound.seq_len


def test_the_model_s_own_limit_is_told() -> None:
    spec = SPECS["llama"](2)
    table = frontier(spec, [Recipe(trainer="peft", mode="qlora")], find_gpu("b200"), [1])
    cell = table.rows[0].cells[0]
    assert (cell.seq_len, cell.capped) == (spec.max_position_embeddings, True)


# -- on the command line -----------------------------------------------------------------------------


def test_the_table(memplan: Run) -> None:
    result = memplan("frontier", "llama-3.2-1b", "--gpu", "4090", "--batch-sizes", "1,8", "--modes", "lora")
    assert result.status == 0
    assert "lora  ckpt adamw_torch_fused" in result.out
    assert max(map(len, result.out.splitlines())) <= 80
    as_json = json.loads(
        memplan(
            "frontier", "llama-3.2-1b", "--gpu", "4090", "--batch-sizes", "1,8", "--optimizers",
            "adamw_torch_fused,adamw_8bit", "--no-exact", "--json",
        ).out
    )  # fmt: skip
    assert [cell["batch_size"] for cell in as_json["rows"][0]["cells"]] == [1, 8]
    assert len(as_json["rows"]) == 3 * 2 * 2
    assert as_json["simulated"] is False


def test_two_views_of_one_question_show_one_number(memplan: Run) -> None:
    asked = ("llama-3.2-1b", "--gpu", "t4", "--gradient-checkpointing")
    table = json.loads(memplan("frontier", *asked, "--batch-sizes", "4", "--modes", "lora", "--json").out)
    (row,) = table["rows"]
    (cell,) = row["cells"]
    one = memplan("fit", *asked, "--mode", "lora", "--batch-size", "4", "--maximize", "seq-len", "--json")
    assert table["simulated"] is True
    assert cell["seq_len"] == json.loads(one.out)["recipe"]["seq_len"]


def test_processes_find_what_one_does() -> None:
    asked = (
        SPECS["llama"](4),
        [Recipe(trainer="peft", mode="lora"), Recipe(trainer="peft", mode="full")],
        find_gpu("t4"),
        [1, 3],
    )
    assert frontier(*asked, workers=2) == frontier(*asked)


def test_one_mode_may_be_asked_for_as_elsewhere(memplan: Run) -> None:
    command = ("frontier", "llama-3.2-1b", "--gpu", "4090", "--batch-sizes", "1")
    one = memplan(*command, "--mode", "qlora")
    assert one.status == 0
    assert one.out == memplan(*command, "--modes", "qlora").out


def test_a_table_that_is_too_wide_gets_through_on_below(memplan: Run) -> None:
    batches = ",".join(map(str, range(1, 16)))
    command = ("frontier", "llama-3.2-1b", "--gpu", "4090", "--batch-sizes", batches, "--modes", "lora")
    result = memplan(*command, "--no-exact")
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line for line in lines if line.startswith("  recipe")]
    assert " ".join(heads).replace("recipe", "").split() == [*batches.split(","), "tokens"]
    assert sum(line.startswith("  lora  ckpt adamw_torch_fused  ") for line in lines) == len(heads) > 1


def test_where_the_search_ends_is_told_from_the_model_s_limit(memplan: Run, tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "max_position_embeddings": 10**8,
    }
    for positions, told in ((10**8, "* the model's own limit, or 1,048,576 tokens"), (4096, "own limit\n")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
        table = memplan("frontier", str(tmp_path), "--gpu", "a6000", "--modes", "lora", "--batch-sizes", "1")
        assert told in table.out


def test_a_share_of_the_card_bounds_the_frontier() -> None:
    half = peaks("llama-3.2-1b", "4090", mode="lora", alloc_conf="per_process_memory_fraction:0.5")
    assert half.room == find_gpu("4090").visible_bytes // 2
    assert at_most(half, "seq_len", 1) < at_most(peaks("llama-3.2-1b", "4090", mode="lora"), "seq_len", 1)


def test_maximize(memplan: Run) -> None:
    result = memplan(
        "fit", "qwen2.5-0.5b", "--gpu", "t4", "--maximize", "batch-size", "--seq-len", "256", "--json"
    )
    document = json.loads(result.out)
    assert document["fits"][0]["verdict"] == "fits"
    assert document["recipe"]["batch_size"] > 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("frontier", "llama-8b", "--gpu", "4090", "--batch-sizes", "0"), "whole numbers from 1 to 1048576"),
        (("frontier", "llama-8b", "--gpu", "4090", "--batch-sizes", "1,x"), "not 'x'"),
        (("frontier", "llama-8b", "--gpu", "4090", "--batch-sizes", "²"), "not '²'"),
        (("frontier", "llama-8b", "--gpu", "4090", "--batch-sizes", ""), "not ''"),
        (("frontier", "llama-8b", "--gpu", "4090", "--optimizers", ""), "names none"),
        (
            ("frontier", "llama-8b", "--gpu", "4090", "--batch-sizes", ",".join(map(str, range(1, 999)))),
            "5,988 points are more than the 2,000 of a table: give fewer --batch-sizes",
        ),
        (("frontier", "llama-8b", "--gpu", "4090", "--modes", ""), "names no mode"),
        (("frontier", "llama-8b", "--gpu", "t4", "--kernels", "memplan"), "from Ampere on"),
        (
            ("frontier", "llama-8b", "--gpu", "4090", "--seq-len", "7"),
            "looks for the longest sequences itself",
        ),
        (("frontier", "llama-8b", "--gpu", "4090", "--modes", "half"), "mode"),
        (("frontier", "llama-8b"), "--gpu"),
        (("fit", "llama-8b", "--gpu", "4090", "--gpu", "t4", "--maximize", "seq-len"), "one --gpu"),
        (("fit", "llama-8b", "--gpu", "t4", "--alloc-conf", "max_split_size_mb:1"), "too small"),
    ],
)
def test_bad_questions(memplan: Run, arguments: tuple[str, ...], complaint: str) -> None:
    result = memplan(*arguments)
    assert result.status == 2
    assert complaint in result.err
    assert result.err.count("\n") == 1


def test_flash_attn_can_not_be_asked_of_an_older_card() -> None:
    with pytest.raises(MemplanError, match="Tesla T4 is older: give --attn sdpa"):
        peaks("llama-3.2-1b", "t4", mode="lora", attn="flash_attention_2")


def test_up_to_n_means_those_below_n_as_well() -> None:
    from memplan.planning.frontier import _below

    assert _below(1) == []
    assert _below(3) == [2]
    assert max(_below(1190)) == 1189
    assert 1100 < min(_below(1190)) < 1120


def test_where_not_even_one_fits_the_status_says_so(memplan: Run) -> None:
    result = memplan("fit", "llama-70b", "--gpu", "t4", "--maximize", "seq-len")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("memplan: not even 1 token fits on the Tesla T4")


def test_steps_that_are_played_one_by_one_are_not_played_for_ever(
    memplan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memplan.planning import frontier

    monkeypatch.setattr(frontier, "_MOST_PLAYED", 1000)
    monkeypatch.setattr(frontier, "MOST_SEARCHED", 1000)
    table = memplan("frontier", "gemma-3-1b", "--gpu", "t4", "--no-exact")
    assert (table.status, table.out) == (2, "")
    assert "ask for fewer batch sizes" in table.err
    exact = memplan("frontier", "gemma-3-1b", "--gpu", "t4")
    assert (exact.status, exact.out) == (2, "")
    assert "--no-exact" in exact.err
    found = memplan("fit", "gemma-3-1b", "--gpu", "t4", "--maximize", "seq-len")
    assert (found.status, found.out) == (2, "")
    assert "without --maximize" in found.err
    advised = memplan("fit", "llama-8b", "--mode", "lora", "--gpu", "t4")  # whose changes are not asked for
    assert advised.status == 1
    assert "does not fit" in advised.out
    assert "--no-advise" in advised.err
