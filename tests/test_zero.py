"""DeepSpeed's ZeRO in the shadow against DeepSpeed: tensors at the peak of a step, read off the tapes of
dry runs on emulated A100s (torch 2.13, deepspeed 0.19.8, accelerate 1.15, transformers 5.23, peft 0.21):

    memplan dry-run --gpu 8xa100 --tape FILE -- accelerate launch --num_processes 8 trainer.py --bf16 \
        --per_device_train_batch_size 1 [--gradient_checkpointing] --deepspeed zero3.json ...

with benchmarks/trainers' trainer.py (rows of 2,048 tokens with an attention mask), zero2.json and zero3.json.
"""

from __future__ import annotations

from typing import Any

import pytest
from small_specs import SPECS

from memplan import Recipe, plan
from memplan.cli import main
from memplan.cuda.card import Card
from memplan.cuda.reduction import whole_scratch
from memplan.errors import RecipeError
from memplan.importers.hf import spec_from_config
from memplan.importers.resolve import resolve_config
from memplan.planning import predicted
from memplan.predict import step
from memplan.predict.copied import Copied
from memplan.predict.parameters import resolve_recipe
from memplan.predict.step import write_tape
from memplan.shadow import autograd
from memplan.shadow.tensor import Tensor
from memplan.tape import Category, Phase, Tape, replay
from memplan.verify.job import cut

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
TIED = {**LLAMA, "tie_word_embeddings": True}
ODD = {
    **LLAMA, "hidden_size": 1000, "intermediate_size": 2731, "num_hidden_layers": 5,
    "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 100, "vocab_size": 31999,
}  # fmt: skip
BASE = {
    "mode": "full", "trainer": "peft", "gpus": 8, "seq_len": 2048, "dtype": "bfloat16", "autocast": True,
    "gradient_checkpointing": True, "use_reentrant": False,
}  # fmt: skip
PLAIN = {"gradient_checkpointing": False, "use_reentrant": None}
LORA = {"mode": "lora", "r": 16}


def played(config: dict[str, Any], rank: int = 0, **changed: Any) -> Tape:
    """A step as the Trainer takes it."""
    spec = spec_from_config(config, "test")
    return write_tape(spec, resolve_recipe(spec, Recipe(**{**BASE, **changed})), looped=True, rank=rank)


@pytest.mark.parametrize(
    ("config", "changed", "emulated"),
    [
        (LLAMA, {"parallel": "zero1"}, 3_730_043_904),
        (LLAMA, {"parallel": "zero1", **LORA}, 2_900_999_168),
        (LLAMA, {"parallel": "zero2"}, 3_730_043_904),
        (LLAMA, {"parallel": "zero2", **LORA}, 2_900_999_168),
        (LLAMA, {"parallel": "zero2", "use_reentrant": True}, 3_730_584_576),
        (LLAMA, {"parallel": "zero2", "gpus": 2, "dtype": "float32"}, 5_131_548_672),
        (TIED, {"parallel": "zero2", "gpus": 2}, 4_476_188_672),
        (ODD, {"parallel": "zero2", "gpus": 3, **PLAIN}, 3_290_587_136),
        (ODD, {"parallel": "zero2", "gpus": 3, **PLAIN, **LORA}, 2_718_579_200),
        (LLAMA, {"parallel": "zero3"}, 2_125_355_008),
        (LLAMA, {"parallel": "zero3", **PLAIN}, 2_814_322_688),
        (LLAMA, {"parallel": "zero3", **LORA}, 1_586_477_056),
        (LLAMA, {"parallel": "zero3", **PLAIN, **LORA}, 2_630_379_520),
        (LLAMA, {"parallel": "zero3", "use_reentrant": True}, 2_125_355_008),
        (LLAMA, {"parallel": "zero3", "gradient_accumulation_steps": 2}, 2_125_404_160),
        (LLAMA, {"parallel": "zero3", "gpus": 2, "dtype": "float32"}, 3_994_028_032),
        (TIED, {"parallel": "zero3", "gpus": 2}, 3_338_668_032),
        (ODD, {"parallel": "zero3", "gpus": 3, **PLAIN}, 2_174_972_928),
        (ODD, {"parallel": "zero3", "gpus": 3, **LORA}, 1_173_632_512),
    ],
)
def test_tensors_are_those_of_deepspeed(
    config: dict[str, Any], changed: dict[str, Any], emulated: int
) -> None:
    assert replay(played(config, **changed)).allocated_bytes == emulated


FAMILIES = [
    ("phi-3.5-mini", 3, {"parallel": "zero3"}, 3_059_911_680),
    ("gemma-2-2b", 3, {"parallel": "zero3"}, 10_755_848_192),
    ("gemma-3-1b", 3, {"parallel": "zero3"}, 8_036_344_832),
    # benchmarks/plain's scripts instead, launched as benchmarks/ranks/run.py launches them
    ("qwen2.5-1.5b", 3, {"parallel": "zero3", "gpus": 3, **PLAIN}, 7_158_775_296),
    (
        "qwen2.5-1.5b", 3,
        {"parallel": "zero2", "gpus": 3, "seq_len": 777, **PLAIN, **LORA, "r": 8},
        3_023_544_832,
    ),
    ("qwen3-4b", 2, {"parallel": "zero3", "seq_len": 777}, 3_834_384_896),
    (
        "qwen3-4b", 2,
        {"parallel": "zero2", "gpus": 3, "seq_len": 777, "gradient_accumulation_steps": 2, **PLAIN},
        8_673_668_096,
    ),
    (
        "qwen3-30b-a3b", 2,
        {"parallel": "zero2", "seq_len": 1024, "gradient_accumulation_steps": 2},
        10_645_353_472,
    ),
    ("qwen3-30b-a3b", 2, {"parallel": "zero3", "seq_len": 777}, 7_824_247_296),
    (
        "llama-3.2-1b", 3,
        {"parallel": "zero2", "mode": "qlora", "r": 8, "seq_len": 1024, "gradient_accumulation_steps": 2},
        2_811_079_680,
    ),
    ("llama-3.2-1b", 3, {"trainer": "trl", "parallel": "zero3", "gpus": 3, "seq_len": 1024}, 4_975_069_184),
    ("llama-3.1-8b", 2, {"trainer": "trl", "parallel": "zero3", "gpus": 3, "seq_len": 1024}, 14_249_662_464),
    (
        "llama-3.1-8b", 2,
        {"trainer": "trl", "parallel": "zero2", "gpus": 3, **LORA, "r": 8, "dtype": "bfloat16"},
        5_545_562_624,
    ),
    (
        "qwen3-4b", 2,
        {
            "trainer": "trl", "parallel": "zero3", "gpus": 3, "seq_len": 1024, **LORA, "r": 8,
            "dtype": "bfloat16",
        },
        1_812_614_656,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "layers", "changed", "emulated"), FAMILIES)
def test_families_and_trainers(model: str, layers: int, changed: dict[str, Any], emulated: int) -> None:
    found = resolve_config(model)
    spec = spec_from_config(cut(found.config, layers, model), found.name, found.hub_id)
    recipe = Recipe(**({**BASE, **changed} if "trainer" not in changed else {"mode": "full", **changed}))
    tape = write_tape(spec, resolve_recipe(spec, recipe), looped=True, rank=0)
    assert replay(tape).allocated_bytes == emulated


@pytest.mark.parametrize(
    ("gradients", "overlap", "accumulates", "emulated"),
    [
        (True, True, 1, 1_961_243_136),
        (True, False, 1, 1_961_243_136),
        (False, True, 1, 1_961_243_136),
        (False, False, 1, 1_961_243_136),
        (True, True, 2, 2_092_372_480),
        (False, True, 2, 2_784_183_808),
    ],
)
def test_many_buckets(gradients: bool, overlap: bool, accumulates: int, emulated: int) -> None:
    """The same with "reduce_bucket_size": 5e7, and "overlap_comm" as given."""
    tape = played(
        LLAMA,
        parallel="zero2" if gradients else "zero1",
        gradient_accumulation_steps=accumulates,
        overlap_comm=overlap,
        reduce_bucket_size=50_000_000,
    )
    assert replay(tape).allocated_bytes == emulated


OFFLOADED = [  # tensors at the peak on the card, and on the host but for what a loop keeps there
    (
        "llama-3.2-1b", 3, {"parallel": "zero2", "seq_len": 1024, "offload": "optimizer"},
        5_008_684_032, 1_526_889_984,
    ),
    (
        "llama-3.2-1b", 3,
        {
            "parallel": "zero2", "seq_len": 1024, "gpus": 3, "gradient_accumulation_steps": 2,
            "offload": "optimizer", **PLAIN,
        },
        5_008_709_120, 3_721_494_552,
    ),
    (
        "llama-3.2-1b", 3, {"parallel": "zero3", "seq_len": 1024, "offload": "optimizer"},
        2_632_654_336, 1_001_553_408,
    ),
    (
        "llama-3.2-1b", 3, {"parallel": "zero3", "seq_len": 1024, "offload": "both"},
        2_521_370_624, 1_112_837_120,
    ),
    (
        "qwen2.5-1.5b", 3,
        {
            "parallel": "zero3", "seq_len": 1024, "gpus": 3, "gradient_accumulation_steps": 2,
            "offload": "both", **PLAIN,
        },
        2_967_346_176, 2_491_791_440,
    ),
    (
        "qwen3-4b", 2,
        {
            "parallel": "zero3", "seq_len": 1024, "offload": "both", "adapter_dtype": "bfloat16", **PLAIN,
            **LORA, "r": 8,
        },
        3_361_973_248, 149_998_848,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "layers", "changed", "emulated", "host"), OFFLOADED)
def test_offload(model: str, layers: int, changed: dict[str, Any], emulated: int, host: int) -> None:
    """Of benchmarks/plain's hf_trainer.py with benchmarks/trainers' files."""
    found = resolve_config(model)
    spec = spec_from_config(cut(found.config, layers, model), found.name, found.hub_id)
    recipe = Recipe(**{**BASE, **changed})
    tape = write_tape(spec, resolve_recipe(spec, recipe), looped=True, rank=0)
    assert replay(tape).allocated_bytes == emulated
    tensors, taken, pinned = tape.host
    assert tensors == host <= taken and 0 < pinned < taken
    # gradients and masters of what is trained are there, and no optimizer's state is on the card
    assert Category.OPTIMIZER_STATE not in set(tape.categories)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"parallel": "zero1", "offload": "optimizer"}, "ZeRO-1 with offload is not planned"),
        ({"parallel": "zero2", "offload": "both"}, "offloads parameters in ZeRO-3 alone"),
        ({"parallel": "fsdp2", "offload": "optimizer"}, "parameters and the optimizer together"),
        ({"parallel": "zero2", "stage3_prefetch_bucket_size": 5}, "is of ZeRO-3"),
        ({"parallel": "ddp", "offload": "both"}, "offload is ZeRO's or FSDP's"),
        ({"parallel": "ddp", "overlap_comm": True}, "overlap_comm is DeepSpeed's"),
    ],
)
def test_what_is_not_offloaded(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe(**{**BASE, **changed})


@pytest.mark.parametrize(("room", "status"), [("200GB", 0), ("0.1TB", 2), ("0GB", 2), ("lots", 2)])
def test_host_memory(room: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["llama-8b", "--mode", "full", "--parallel", "zero3", "--offload", "both", "--gpus", "8"]
    assert main([*asked, "--host-memory", room]) == status
    out, err = capsys.readouterr()
    if status:
        assert not out and err.count("\n") == 1
        assert "takes a size" in err or "8 processes keep 21.28 GiB each on the host, 170.25" in err
    else:
        assert "On the host: 21.28 GiB for each process, 170.25 GiB for 8" in " ".join(out.split())


LLAMA_8B = {
    **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip


def test_other_sizes_than_auto() -> None:
    sizes = {
        "reduce_bucket_size": 5_000_000,
        "stage3_prefetch_bucket_size": 20_000_000,
        "stage3_param_persistence_threshold": 100_000,
    }
    assert replay(played(LLAMA, parallel="zero3", **LORA, **sizes)).allocated_bytes == 1_588_088_832


def test_auto_is_what_follows_from_the_width() -> None:
    for parallel, sizes in (
        ("zero2", {"reduce_bucket_size": 2048**2}),
        (
            "zero3",
            {
                "reduce_bucket_size": 2048**2,
                "stage3_prefetch_bucket_size": int(0.9 * 2048**2),
                "stage3_param_persistence_threshold": 10 * 2048,
            },
        ),
    ):
        auto = played(LLAMA, parallel=parallel, **dict.fromkeys(sizes, "auto"))
        assert auto == played(LLAMA, parallel=parallel, **sizes)


@pytest.mark.parametrize(
    ("config", "changed", "tensors", "reserved"),
    [
        (LLAMA, {"parallel": "zero2"}, 3_730_043_904, 4_485_808_128),
        (LLAMA, {"parallel": "zero3"}, 2_125_355_008, 2_642_411_520),
        (LLAMA, {"parallel": "zero3", **LORA}, 1_586_477_056, 2_111_832_064),
        (LLAMA_8B, {"parallel": "zero2"}, 36_269_993_472, 40_502_296_576),
        (LLAMA_8B, {"parallel": "zero3"}, 22_133_668_864, 29_483_859_968),
        (LLAMA_8B, {"parallel": "zero3", **LORA}, 7_917_296_128, 11_634_999_296),
    ],
)
def test_reserved_bytes_are_those_of_deepspeed(
    config: dict[str, Any], changed: dict[str, Any], tensors: int, reserved: int
) -> None:
    """To 0.1 %. Of the models, the larger one is Llama-3.1-8B."""
    spec = spec_from_config(config, "test")
    run = predicted.run(spec, resolve_recipe(spec, Recipe(**{**BASE, **changed})), rank=0)
    assert replay(run.tape).allocated_bytes == tensors
    assert run.free.reserved == pytest.approx(reserved, rel=0.001)


@pytest.mark.parametrize("parallel", ["zero1", "zero2", "zero3"])
def test_what_rests_is_there_again_after_a_step(parallel: str) -> None:
    tape = played(LLAMA, parallel=parallel)
    live = 0
    resting = []
    for segment in tape.segments:
        live += sum(tape.deltas[segment.start : segment.stop])
        if segment.phase is Phase.SETUP:
            resting.append(live)
    assert live == resting[-1]


def test_the_rank_that_takes_the_most_is_played() -> None:
    twice = {"parallel": "zero2", "gradient_accumulation_steps": 2}
    peaks = [replay(played(LLAMA, rank, **twice)).allocated_bytes for rank in range(8)]
    spec = spec_from_config(LLAMA, "test")
    tape = write_tape(spec, resolve_recipe(spec, Recipe(**{**BASE, **twice})), looped=True)
    assert replay(tape).allocated_bytes == peaks[tape.rank] == max(peaks) > min(peaks)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"optimizer": "adamw_bnb_8bit"}, "ZeRO-3 with optimizer adamw_bnb_8bit is not planned"),
        ({"mode": "qlora"}, "does not divide 4-bit weights"),
        ({"mode": "lora", "use_dora": True}, "use_dora"),
        ({"trainer": "peft", "autocast": False}, "use --autocast"),
    ],
)
def test_what_was_not_compared_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe(**{"mode": "full", "parallel": "zero3", "gpus": 8, **options})


def test_adapted_experts_are_refused() -> None:
    found = resolve_config("qwen3-30b-a3b")
    spec = spec_from_config(found.config, found.name, found.hub_id)
    with pytest.raises(RecipeError, match="adapters on experts under ZeRO"):
        resolve_recipe(spec, Recipe(mode="lora", parallel="zero2", gpus=8))
    with pytest.raises(RecipeError, match="mixture of experts under ZeRO-3"):
        resolve_recipe(spec, Recipe(mode="lora", parallel="zero3", gpus=8, target_modules="attention"))
    found = resolve_config("mixtral-8x7b")
    spec = spec_from_config(found.config, found.name, found.hub_id)
    with pytest.raises(RecipeError, match="Mixtral under ZeRO-3"):
        resolve_recipe(spec, Recipe(mode="full", parallel="zero3", gpus=8))


def test_gathered_parameters_are_communication() -> None:
    tape = played(LLAMA, parallel="zero3")
    gathered = {event for event in tape.events if event >= 0 and tape.operations[event] == "all_gather"}
    assert gathered
    assert {tape.categories[storage] for storage in gathered} == {Category.COMMUNICATION}
    assert {tape.streams.get(storage, 0) for storage in gathered} == {0, 2}  # persistent ones on the first


@pytest.mark.parametrize(
    ("count", "itemsize", "scratch"),
    [
        # has_inf_or_nan's amax of bf16, get_grad_norm_direct's norms of fp64, as in those tapes
        (38_928_384, 2, [(864, 4)]),
        (38_928_384, 8, [(3456, 4)]),
        (1_441_792, 8, [(1408, 4)]),
        (524_288, 8, [(512, 4)]),
        (32_768, 8, []),
        (256, 8, []),
    ],
)
def test_reductions_to_one_number(count: int, itemsize: int, scratch: list[tuple[int, int]]) -> None:
    assert whole_scratch(count, itemsize, itemsize, Card()) == scratch


COPIED = {
    "full": {},
    "full, no checkpointing": PLAIN,
    "full, reentrant": {"use_reentrant": True},
    "full, accumulated": {"gradient_accumulation_steps": 2},
    "full, offloaded": {"parallel": "zero2", "offload": "optimizer"},
    "full, small buckets": {"reduce_bucket_size": 30_000},
    "lora": LORA,
    "lora, no checkpointing": {**LORA, **PLAIN},
    "qlora": {"mode": "qlora", "kbit_prep": False},
}


@pytest.mark.parametrize("parallel", ["zero1", "zero2"])
@pytest.mark.parametrize("case", COPIED)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "phi3"])
def test_copied_layers_are_those_that_are_played(
    family: str, case: str, parallel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[family](12)
    asked = {**BASE, "parallel": parallel, "seq_len": 130, **COPIED[case]}
    recipe = resolve_recipe(spec, Recipe(**asked))
    copies: list[bool] = []
    forward = Copied.forward

    def noted(copied: Copied, hidden: Tensor) -> Tensor:
        copies.append(True)
        return forward(copied, hidden)

    monkeypatch.setattr(Copied, "forward", noted)
    found = write_tape(spec, recipe, looped=True)
    assert len(copies) == recipe.gradient_accumulation_steps, "they were played after all"
    assert found == write_tape(spec, recipe, looped=True, folded=False)


@pytest.mark.parametrize("asked", [{}, PLAIN, LORA, {**LORA, **PLAIN}, {"offload": "both"}])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "qwen3_moe"])
def test_three_layers_rehearse_for_all(
    family: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[family](7)
    if family == "qwen3_moe" and "mode" in asked:
        return  # refused
    recipe = resolve_recipe(spec, Recipe(**{**BASE, "parallel": "zero3", "seq_len": 130, **asked}))
    found = write_tape(spec, recipe, looped=True)
    monkeypatch.setattr(step, "_rehearsed", lambda *_: 7)
    assert found == write_tape(spec, recipe, looped=True)


@pytest.mark.parametrize(
    ("parallel", "most"), [("ddp", 400), ("fsdp2", 400), ("zero1", 500), ("zero2", 500), ("zero3", 12_000)]
)
def test_few_layers_are_played_of_many(parallel: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of the backward pass, of which 126 layers have 7,500 (22,000 in ZeRO-3, with its hooks, where
    they are rehearsed): what a plan costs, on whatever machine."""
    played: list[int] = []
    evaluate = autograd._evaluate

    def counted(*asked: Any) -> Any:
        played[-1] += 1
        return evaluate(*asked)

    monkeypatch.setattr(autograd, "_evaluate", counted)
    for gpus in (8, 512):
        played.append(0)
        plan("llama-3.1-405b", Recipe(mode="full", parallel=parallel, gpus=gpus))
    assert played[0] == played[1] <= most
