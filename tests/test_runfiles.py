"""The files that people train from. tests/run_files has examples of the projects' own, by name and value:
axolotl 0.18 and 0.21, LLaMA-Factory and TRL of July and August 2026."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memplan import Recipe, plan, rooms, runfiles, stacks
from memplan.cli import main
from memplan.errors import MemplanError, RecipeError
from memplan.planning.study import ask
from memplan.runfiles._trainer import IGNORED

yaml = pytest.importorskip("yaml")

FOLDER = Path(__file__).parent / "run_files"
EXAMPLES = {
    f"{file.stem}: {example['name']}": (file.stem, example)
    for file in sorted(FOLDER.glob("*.json"))
    for example in json.loads(file.read_text(encoding="utf-8"))
}
PLANNED = {name: example for name, example in EXAMPLES.items() if "options" in example[1]}

QLORA = {
    "base_model": "llama-3.2-1b",
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_r": 32,
    "lora_target_linear": True,
    "micro_batch_size": 2,
    "sequence_len": 1024,
    "gradient_checkpointing": True,
    "attn_implementation": "flash_attention_2",
    "val_set_size": 0,
    "datasets": [{"path": "tatsu-lab/alpaca", "type": "alpaca"}],
}
LORA_SFT = {
    "model_name_or_path": "llama-3.2-1b",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "cutoff_len": 1024,
    "per_device_train_batch_size": 1,
    "bf16": True,
    "template": "llama3",
}
TRL = {"model_name_or_path": "llama-3.2-1b", "dataset_name": "trl-lib/Capybara", "use_peft": True}

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(values: dict[str, Any] | str, name: str = "run.yaml", **more: Any) -> str:
        path = tmp_path / name
        if isinstance(values, str):
            path.write_text(values, encoding="utf-8")
        else:
            values = {key: value for key, value in {**values, **more}.items() if value != "left out"}
            dump = json.dumps if name.endswith(".json") else yaml.safe_dump
            path.write_text(dump(values), encoding="utf-8")
        return str(path)

    return _write


def read(path: str) -> runfiles.Reading:
    found = runfiles.read(path)
    assert found is not None
    return found


# -- examples of the projects' own ------------------------------------------------------------------------


def test_there_are_enough_of_each() -> None:
    for kind in ("axolotl", "llama_factory", "trl"):
        assert sum(of == kind for of, _ in EXAMPLES.values()) >= 15


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_read_or_refused_with_its_reason(name: str, write: Write) -> None:
    kind, example = EXAMPLES[name]
    path = write(example["file"])
    if "refused" in example:
        with pytest.raises(MemplanError) as refused:
            runfiles.read(path)
        assert example["refused"] in str(refused.value)
        assert "\n" not in str(refused.value)
        return
    found = read(path)
    assert found.kind == kind
    options = {field: value for field, value in found.options.items() if field != "trainer"}
    assert json.loads(json.dumps(options)) == example["options"]
    assert len(found.left_out) == example["left_out"]
    assert not any("unknown" in sentence for sentence in found.left_out)
    assert set(found.understood) | set(found.ignored) <= set(example["file"])


@pytest.mark.parametrize("name", PLANNED)
def test_an_example_plans(name: str, write: Write) -> None:
    kind, example = PLANNED[name]
    path = write(example["file"])
    said = "mode" in example["options"] or example["options"].get("parallel") != "zero3"
    recipe = None if said else Recipe(mode="full")  # what is left out is QLoRA, which ZeRO-3 can't have
    answer = plan("llama-3.2-1b", recipe, config=path, gpus=["h200"])
    assert answer.peak.tensor_bytes > 0
    assert answer.read is not None and answer.read.kind == kind
    for field, value in example["options"].items():
        said = getattr(answer.recipe, field)
        assert json.loads(json.dumps(getattr(said, "value", said))) in (
            value,
            {"adamw_8bit": "adamw_bnb_8bit"}.get(str(value)),
        )


# -- what is read -----------------------------------------------------------------------------------------


def test_a_file_stands_where_a_model_does(write: Write) -> None:
    answer = plan(write(QLORA))
    assert answer.model.name == "llama-3.2-1b"
    recipe = answer.recipe
    assert (recipe.mode.value, recipe.r, recipe.batch_size, recipe.seq_len) == ("qlora", 32, 2, 1024)
    assert (recipe.trainer, recipe.autocast, recipe.kbit_prep) == ("axolotl", True, False)
    assert answer.read is not None
    assert answer.read.ignored == ("datasets",)
    assert answer.read.understood["micro_batch_size"] == 2


def test_what_is_given_overrides_the_file(write: Write) -> None:
    path = write(QLORA)
    asked = ask(path, Recipe(batch_size=4, gradient_checkpointing=False))
    assert (asked.recipe.batch_size, asked.recipe.gradient_checkpointing) == (4, False)
    assert asked.recipe.r == 32
    full = ask(path, Recipe(mode="full")).recipe
    assert (full.mode.value, full.seq_len) == ("full", 1024)  # what its adapters are means nothing then


def test_checkpointing_that_is_turned_off_needs_no_kind(write: Write) -> None:
    path = write(QLORA, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert ask(path).recipe.use_reentrant is True
    assert ask(path, Recipe(gradient_checkpointing=False)).recipe.use_reentrant is None


def test_a_length_that_cuts_nothing_is_told(write: Write) -> None:
    assert any("max_length: null" in sentence for sentence in read(write(TRL, max_length=None)).left_out)
    for given in ({}, {"max_length": 512}, {"max_length": None, "max_seq_length": 512}):
        assert not any("max_length" in sentence for sentence in read(write(TRL, **given)).left_out)


def test_a_name_of_another_type_is_the_one_that_is_wrong(write: Write) -> None:
    with pytest.raises(MemplanError, match="must be a list of names, and one of them is 3"):
        read(write(TRL, lora_target_modules=["q_proj", 3]))


def test_a_model_beside_a_file_is_the_one_that_is_planned(write: Write) -> None:
    path = write(QLORA, base_model="somebody/unknown")
    answer = plan("llama-3.2-1b", config=path)
    assert answer.model.name == "llama-3.2-1b"
    assert answer.read is not None and "base_model" not in answer.read.understood


@pytest.mark.parametrize(
    ("trainer", "values", "mode"),
    [
        ("axolotl", {**QLORA, "micro_batch_size": "left out", "sequence_len": "left out"}, "qlora"),
        ("llama_factory", {**LORA_SFT, "cutoff_len": None, "per_device_train_batch_size": None}, "lora"),
        ("trl", TRL, "lora"),
        ("trl", {**TRL, "load_in_4bit": True}, "qlora"),
        ("trl", {**TRL, "use_peft": False}, "full"),
    ],
)
def test_where_a_file_says_nothing_its_trainers_files_defaults_count(
    trainer: str, values: dict[str, Any], mode: str, write: Write
) -> None:
    recipe = read(write(values)).recipe()
    assert recipe.mode.value == mode
    for field, setting in stacks.find(trainer).sizes.items():
        if mode in setting.by_mode and field not in read(write(values)).options:
            value = getattr(recipe, field)
            assert getattr(value, "value", value) == setting.by_mode[mode], field


def test_trl_loads_in_float32_unless_told_otherwise(write: Write) -> None:
    assert read(write(TRL)).recipe().dtype.value == "float32"
    assert read(write(TRL, dtype="bfloat16")).recipe().dtype.value == "bfloat16"
    assert read(write(TRL, model_init_kwargs={"dtype": "bfloat16"})).recipe().dtype.value == "bfloat16"
    assert read(write(TRL, model_init_kwargs='{"dtype": "bfloat16"}')).recipe().dtype.value == "bfloat16"
    with pytest.raises(MemplanError, match="model_init_kwargs must be keys and values"):
        read(write(TRL, model_init_kwargs='{"dtype": '))


def test_an_sft_config_says_nothing_of_the_model(write: Write) -> None:
    path = write({"max_length": 512, "loss_type": "nll", "packing_strategy": "bfd"}, "args.json")
    found = read(path)
    assert (found.kind, found.model, found.mode) == ("trl", None, None)
    assert found.recipe(Recipe(mode="lora")).r == Recipe().r
    with pytest.raises(MemplanError, match=r"names no model: ask `memplan MODEL --config"):
        plan(path)
    assert plan("llama-3.2-1b", config=path).recipe.seq_len == 512


def test_training_arguments_as_the_trainer_writes_them(write: Write) -> None:
    path = write(
        {
            "output_dir": "out", "per_device_train_batch_size": 4, "optim": "adamw_torch", "bf16": True,
            "deepspeed": None, "fsdp": [], "fsdp_config": {"min_num_params": 0}, "label_smoothing_factor": 0,
            "torch_compile": False, "neftune_noise_alpha": None, "num_train_epochs": 3.0, "use_cache": False,
        },
        "training_args.json",
    )  # fmt: skip
    answer = plan("llama-3.2-1b", Recipe(mode="lora"), config=path)
    assert (answer.recipe.trainer, answer.recipe.batch_size, answer.recipe.autocast) == ("peft", 4, True)
    assert answer.read is not None and answer.read.left_out == ()
    assert answer.evaluation is None  # eval_strategy is no


def test_accelerate_beside_a_model(write: Write) -> None:
    path = write({"distributed_type": "NO", "mixed_precision": "bf16", "num_processes": 1})
    assert plan("llama-3.2-1b", Recipe(trainer="peft", mode="lora"), config=path).recipe.autocast


def test_accelerate_says_how_many_gpus_and_how(write: Write) -> None:
    config = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    path = write(
        {"distributed_type": "FSDP", "mixed_precision": "bf16", "num_processes": 4, "fsdp_config": config}
    )
    told = plan("llama-3.2-1b", Recipe(mode="full"), config=path, gpus=[])
    assert (told.recipe.parallel, told.recipe.gpus) == ("fsdp2", 4)
    same = plan("llama-3.2-1b", Recipe(mode="full", parallel="fsdp2", gpus=4), gpus=[])
    assert told.peak.tensor_bytes == same.peak.tensor_bytes
    path = write({"distributed_type": "MULTI_GPU", "mixed_precision": "bf16", "num_processes": 2})
    assert plan("llama-3.2-1b", Recipe(mode="lora"), config=path, gpus=[]).recipe.parallel == "ddp"


@pytest.mark.parametrize(
    ("launched", "parallel", "gpus"),
    [
        ({"num_processes": 4}, "ddp", 4),
        ({"num_processes": 1}, None, 1),
        ({"accelerate_config": "single_gpu"}, None, 1),
        ({"accelerate_config": "multi_gpu"}, "ddp", 8),
        ({"accelerate_config": "fsdp2", "num_processes": 2}, "fsdp2", 2),
    ],
)
def test_trl_launches_several(
    launched: dict[str, Any], parallel: str | None, gpus: int, write: Write
) -> None:
    found = read(write({"model_name_or_path": "llama-3.2-1b", "use_peft": True, **launched}))
    assert (found.recipe().parallel, found.recipe().gpus) == (parallel, gpus)
    assert any("the first rank alone" in sentence for sentence in found.left_out) == (parallel == "fsdp2")


@pytest.mark.parametrize(
    ("bf16", "fp16", "dtype", "autocast"),
    [
        ("auto", None, "bfloat16", True),
        (True, False, "bfloat16", True),
        ("full", None, "bfloat16", False),
        (False, True, "float16", True),
        (None, True, "float16", True),
        (False, False, "float32", False),
    ],
)
def test_axolotls_precision(bf16: Any, fp16: Any, dtype: str, autocast: bool, write: Write) -> None:
    recipe = read(write(QLORA, bf16=bf16, fp16=fp16)).recipe()
    assert (recipe.dtype.value, recipe.autocast) == (dtype, autocast)


def test_layers_to_transform_become_a_pattern(write: Write) -> None:
    some = write(
        QLORA, lora_target_linear=False, lora_target_modules=["q_proj"], peft_layers_to_transform=[0, 3]
    )
    all_of = write(QLORA, "all.yaml", lora_target_linear=False, lora_target_modules=["q_proj"])
    layers = 16
    few, many = (plan(path).parameters.trainable for path in (some, all_of))
    assert few * layers == many * 2


def test_adapters_of_a_mixture_are_where_its_linear_layers_are(write: Write) -> None:
    for values in (
        {**QLORA, "base_model": "mixtral-8x7b", "adapter": "lora", "load_in_4bit": False},
        {**LORA_SFT, "model_name_or_path": "mixtral-8x7b"},
    ):
        assert ask(write(values)).recipe.target_modules == "attention"
    with pytest.raises(MemplanError, match="experts in float32"):
        ask(write(QLORA, base_model="mixtral-8x7b"))


def test_llama_factory_trains_in_float32_unless_it_is_pure(write: Write) -> None:
    for pure, dtype in ((False, "float32"), (True, "bfloat16")):
        path = write(LORA_SFT, finetuning_type="full", bf16=not pure, pure_bf16=pure)
        assert read(path).recipe().dtype.value == dtype


def test_evaluation_is_in_the_files_batch(write: Write) -> None:
    assert plan(write(QLORA)).evaluation is None
    evaluation = plan(write(QLORA, val_set_size=0.05)).evaluation
    assert evaluation is not None and evaluation.batch_size == 2
    evaluation = plan(write(LORA_SFT, eval_strategy="steps", per_device_eval_batch_size=3)).evaluation
    assert evaluation is not None and evaluation.batch_size == 3
    assert plan(write("model_name_or_path: llama-3.2-1b\nstage: sft\neval_strategy: no\n")).evaluation is None


# -- what is wrong ----------------------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
# fmt: off
BAD = {
    "two trainers": (
        {**QLORA, "cutoff_len": 1024},
        "has keys of two trainers: adapter is axolotl's, cutoff_len is LLaMA-Factory's",
    ),
    "a typo": (
        {**QLORA, "micro_batchsize": 4},
        "micro_batchsize is no key of axolotl's; did you mean micro_batch_size?",
    ),
    "a typo in a kind of checkpointing": (
        {**LORA_SFT, "disable_gradient_checkpoint": True}, "did you mean disable_gradient_checkpointing?",
    ),
    "no number": (
        {**QLORA, "micro_batch_size": "two"},
        "micro_batch_size must be a whole number of at least 1, not 'two'",
    ),
    "zero": ({**QLORA, "lora_r": 0}, "lora_r must be a whole number of at least 1, not 0"),
    "a fraction": ({**LORA_SFT, "cutoff_len": 10.5}, "cutoff_len must be a whole number"),
    "no flag": (
        {**QLORA, "gradient_checkpointing": 3},
        "gradient_checkpointing must be true or false, not 3",
    ),
    "a list": ({**TRL, "model_name_or_path": ["a"]}, "model_name_or_path must be a text, not a list"),
    "no rank": ({**QLORA, "lora_r": None}, "needs lora_r"),
    "no targets": ({**QLORA, "lora_target_linear": None}, "names no modules"),
    "qlora of 16 bits": ({**QLORA, "load_in_4bit": False}, "needs load_in_4bit: true"),
    "lora on 4 bits": ({**QLORA, "adapter": "lora"}, "is not heard with adapter: lora"),
    "4 bits in full": ({**QLORA, "adapter": None}, "load_in_4bit: true needs an adapter"),
    "8 bits": ({**QLORA, "adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, "is an 8-bit base"),
    "full without flash": (
        {"base_model": "llama-3.2-1b", "micro_batch_size": 1, "attn_implementation": "sdpa"},
        "lm_head and norms in float32",
    ),
    "unsloth": ({**LORA_SFT, "use_unsloth": True}, "memplan dry-run --gpu NAME -- llamafactory-cli train"),
    "offload": ({**QLORA, "gradient_checkpointing": "offload"}, "keeps activations on the host"),
    "an optimizer": ({**QLORA, "optimizer": "muon"}, "optimizer: muon is not planned"),
    "sharding": (
        {**QLORA, "fsdp_config": {"fsdp_version": 2}},
        "fsdp_config spreads the run over several cards",
    ),
    "cards": ({**QLORA, "tensor_parallel_size": 2}, "tensor_parallel_size: 2 spreads the run"),
    "a wrong precision": ({**QLORA, "bf16": "yes please"}, "bf16 must be true, false, auto or full"),
    "fp16 in full": (
        {**LORA_SFT, "finetuning_type": "full", "quantization_bit": 4}, "can't be trained in full",
    ),
    "GPTQ": ({**LORA_SFT, "model_name_or_path": "a/b-GPTQ-Int4"}, "is a base in GPTQ"),
    "nobody's": ({"hello": "world"}, "no key that would tell whose it is"),
    "torchtune": (
        {"model": {"_component_": "torchtune.models.llama3_1.qlora_llama3_1_8b"}, "batch_size": 2},
        "is torchtune's own code",
    ),
    "no model": ({"distributed_type": "NO"}, "(accelerate) names no model"),
    "DeepSpeed": (
        {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"zero_stage": 0}},
        "stage: 0 is not planned",
    ),
    "FSDP1 of one unit": (
        {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {}},
        "is of FSDP1 with no fsdp_auto_wrap_policy",
    ),
    "FSDP1 that shards nothing": (
        {
            "distributed_type": "FSDP",
            "num_processes": 2,
            "fsdp_config": {
                "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "fsdp_sharding_strategy": "NO_SHARD",
            },
        },
        "is of FSDP1 with fsdp_sharding_strategy NO_SHARD",
    ),
    "a mesh that is not all": (
        {
            "distributed_type": "FSDP",
            "num_processes": 8,
            "fsdp_config": {"fsdp_version": 2},
            "parallelism_config": {
                "parallelism_config_dp_replicate_size": 2,
                "parallelism_config_dp_shard_size": 2,
            },
        },
        "has 2 × 2 of 8 processes",
    ),
    "a mesh of FSDP1": (
        {
            "distributed_type": "FSDP",
            "num_processes": 2,
            "fsdp_config": {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
            "parallelism_config": {"parallelism_config_dp_shard_size": 2},
        },
        "is of FSDP2 alone",
    ),
    "a mesh with tensor parallelism": (
        {
            "distributed_type": "FSDP",
            "num_processes": 4,
            "fsdp_config": {"fsdp_version": 2},
            "parallelism_config": {
                "parallelism_config_dp_shard_size": 2,
                "parallelism_config_tp_size": 2,
            },
        },
        "spreads the run in more ways",
    ),
    "FSDP1 of parts of layers": (
        {
            "distributed_type": "FSDP",
            "num_processes": 2,
            "fsdp_config": {
                "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "fsdp_transformer_layer_cls_to_wrap": "LlamaMLP",
            },
        },
        "wraps 'LlamaMLP', and memplan plans decoder layers",
    ),
    "FSDP with a module left whole": (
        {
            "distributed_type": "FSDP",
            "num_processes": 2,
            "fsdp_config": {"fsdp_version": "2", "fsdp_ignored_modules": "lm_head"},
        },
        "is of FSDP2 with fsdp_ignored_modules lm_head",
    ),
    "FSDP1 in float16": (
        {
            "distributed_type": "FSDP",
            "num_processes": 2,
            "mixed_precision": "fp16",
            "fsdp_config": {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
        },
        "in which memplan does not plan FSDP1",
    ),
    "FSDP3": (
        {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 3}},
        "fsdp_config: fsdp_version must be 1 or 2, not 3",
    ),
    "one GPU and four": (
        {"model_name_or_path": "x", "use_peft": True, "accelerate_config": "single_gpu", "num_processes": 4},
        "num_processes: 4 contradicts accelerate_config: single_gpu",
    ),
    "no count": ({"distributed_type": "MULTI_GPU", "num_processes": "two"}, "num_processes must be a whole"),
    "nothing": ("", "holds null, but a run file has keys and values"),
    "a list of things": ("- a\n- b\n", "holds a list"),
    "a key that is no name": ("base_model: x\n1: 2\n", "has the key 1"),
    "a key twice": ("base_model: x\nlora_r: 1\nlora_r: 2\n", "has the key lora_r twice"),
    "no YAML": ("base_model: [x\n", "is no valid YAML"),
    "a bomb": (BOMB, "aliases unfold"),
    "an alias of itself": ("base_model: &a [*a]\n", "is no run file: an alias stands inside"),
    "depth": ("base_model: " + "[" * 3000, "is no"),
    "a tag": ("base_model: !!python/object/apply:os.system ['true']\n", "is no valid YAML"),
    "a long number": ("base_model: x\nmicro_batch_size: " + "9" * 50, "number that is too long"),
    "too much": ("base_model: x\n" + "# filler\n" * 40_000, "larger than 256 KiB"),
}
# fmt: on


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_sentence(name: str, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    values, said = BAD[name]
    assert main(["plan", write(values)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1 and "Traceback" not in err and "bug" not in err


# -- DeepSpeed --------------------------------------------------------------------------------------------

BOTH = {"device": "cpu", "pin_memory": True}
OWN = {"overlap_comm": False}  # what DeepSpeed does by itself, where transformers' examples say otherwise
OWN_3 = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


@pytest.mark.parametrize(
    ("told", "options"),
    [
        ({"stage": 1}, {"parallel": "zero1", **OWN}),
        ({"stage": 2}, {"parallel": "zero2", **OWN}),
        ({"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8}, {"parallel": "zero2"}),
        (
            {"stage": 2, "reduce_bucket_size": "auto"},
            {"parallel": "zero2", "reduce_bucket_size": "auto", **OWN},
        ),
        ({"stage": 3}, {"parallel": "zero3", **OWN_3}),
        ({"stage": 3, "overlap_comm": False, **dict.fromkeys(OWN_3, "auto")}, {"parallel": "zero3", **OWN}),
        (
            {"stage": 3, **dict.fromkeys(OWN_3, "auto"), "offload_optimizer": BOTH, "offload_param": BOTH},
            {"parallel": "zero3", "offload": "both"},
        ),
        (
            {"stage": 2, "offload_optimizer": BOTH, "offload_param": {"device": "none"}},
            {"parallel": "zero2", "offload": "optimizer", **OWN},
        ),
    ],
)
def test_deepspeeds_stages(write: Write, told: dict[str, Any], options: dict[str, Any]) -> None:
    found = read(write({"zero_optimization": told, "train_batch_size": "auto"}, "ds.json"))
    assert found.kind == "deepspeed" and found.model is None
    assert found.options == options


def test_deepspeeds_sizes(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "zero_optimization": {"stage": 2}, "train_batch_size": 48, "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2, "gradient_clipping": 0.5, "bf16": {"enabled": True},
    }  # fmt: skip
    recipe = read(write(values, "ds.json")).recipe(Recipe(mode="full"))
    assert (recipe.gpus, recipe.batch_size, recipe.gradient_accumulation_steps) == (8, 3, 2)
    assert recipe.max_grad_norm == 0.5 and recipe.autocast
    asked = ["llama-3.2-1b", "--mode", "full", "--config", write(values, "ds.json"), "--gpus", "4"]
    assert main(asked) == 2
    assert "says gpus 8, and 4 is given beside it, which DeepSpeed refuses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 1}, "zero_optimization: null is not there"),
        ({"zero_optimization": {"stage": 4}}, "stage: 4 is not planned"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "offloads to a disk"),
        ({"zero_optimization": {"stage": 3, "offload_param": BOTH}}, "without offload_optimizer"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": BOTH, "offload_optimizer": BOTH}},
            "is of stage 3 alone",
        ),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}, "must be a whole number"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "did you mean overlap_comm"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 1e7}}, "memplan plans ZeRO with 1000000000"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "trains in float16"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lamb"}}, "Adam and AdamW are"),
        (
            {
                "zero_optimization": {"stage": 2}, "train_batch_size": 10,
                "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1,
            },
            "a multiple of 4",
        ),
    ],
)  # fmt: skip
def test_deepspeed_is_refused(
    write: Write, capsys: pytest.CaptureFixture[str], values: dict[str, Any], said: str
) -> None:
    asked = ["llama-3.2-1b", "--mode", "full", "--gpus", "8", "--config", write(values, "ds.json")]
    assert main(asked) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and err.count("\n") == 1


def test_accelerates_keys_of_deepspeed(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "none"}
    values = {"distributed_type": "DEEPSPEED", "num_processes": 8, "mixed_precision": "bf16"}
    found = read(write({**values, "deepspeed_config": {**told, "gradient_clipping": 1.0}}))
    assert found.options == {
        "parallel": "zero3", **OWN_3, "offload": "optimizer", "gpus": 8, "autocast": True,
        "max_grad_norm": 1.0,
    }  # fmt: skip
    alone = {**values, "num_processes": 1, "deepspeed_config": told}
    elsewhere = {**values, "deepspeed_config": {"deepspeed_config_file": "ds.json"}}
    for asked, said in (
        (alone, "DeepSpeed on one card"),
        (elsewhere, "ds.json is not there: run memplan where it is"),
    ):
        assert main(["llama-3.2-1b", "--mode", "full", "--config", write(asked)]) == 2
        assert said in capsys.readouterr().err


def test_a_file_names_what_launches_it(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deepspeed = {
        "zero_optimization": {"stage": 3, "offload_optimizer": BOTH}, "gradient_accumulation_steps": 4,
    }  # fmt: skip
    write(deepspeed, "ds.json")
    accelerate = {"distributed_type": "DEEPSPEED", "num_processes": 4, "mixed_precision": "bf16"}
    launched = write({**accelerate, "deepspeed_config": {"deepspeed_config_file": "ds.json"}}, "acc.yaml")
    expected = {"parallel": "zero3", "offload": "optimizer", "gradient_accumulation_steps": 4}
    for found in (
        read(write(TRL, deepspeed="ds.json")),
        read(launched),
        read(write(TRL, accelerate_config="acc.yaml", use_peft=False)),
    ):
        assert expected.items() <= found.options.items()
    assert found.options["gpus"] == 4 and found.model == TRL["model_name_or_path"]
    assert found.name == "run.yaml and acc.yaml and ds.json"
    # or both are given
    run = write(TRL, use_peft=False)
    answer = plan(run, config=launched)
    assert (
        answer.recipe.gpus == 4 and answer.recipe.offload is not None and answer.recipe.mode.value == "full"
    )
    again = write({**accelerate, "deepspeed_config": {"deepspeed_config_file": "acc.yaml"}}, "acc.yaml")
    contradicts = write(TRL, "two.yaml", use_peft=False, deepspeed="ds.json", gradient_accumulation_steps=2)
    for asked, said in (
        (
            [contradicts, "--gpus", "4"],
            "says gradient_accumulation_steps 2 and ds.json 4, which DeepSpeed refuses",
        ),
        ([run, "--config", again], "one file names the other in a ring"),
        ([run, "--config", run], "are of one kind"),
        ([write(TRL, "gone.yaml", deepspeed="gone.json")], "gone.json is not there"),
        (["llama-3.2-1b", "--config", run, "--config", run], "--config is given twice"),
    ):
        assert main(asked) == 2
        assert said in capsys.readouterr().err


def test_what_is_given_stands_above_a_file_of_deepspeeds(write: Write) -> None:
    path = write(
        {"zero_optimization": {"stage": 3, "offload_optimizer": BOTH, "offload_param": BOTH}}, "ds.json"
    )
    found = read(path)
    given = Recipe(mode="full", gpus=8, offload="optimizer", reduce_bucket_size=1_000_000)
    recipe = found.recipe(given)
    assert (recipe.parallel, recipe.offload, recipe.reduce_bucket_size) == ("zero3", "optimizer", 1_000_000)
    assert recipe.stage3_prefetch_bucket_size == 50_000_000
    other = found.recipe(Recipe(mode="full", gpus=8, parallel="fsdp2", autocast=True))
    assert other.offload is None and other.stage3_prefetch_bucket_size is None


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_trls_own_configurations_of_deepspeed(write: Write, name: str) -> None:
    found = read(write(TRL, accelerate_config=name))
    own = OWN_3 if name == "zero3" else OWN
    assert {"parallel": name, "gpus": 8, **own}.items() <= found.options.items()


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "nowhere.yaml", "--gpu", "4090"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert main(["llama-3.2-1b", "--config", "nowhere.json"]) == 2
    assert (
        "is no file that a trainer is configured with: there is none of that name" in capsys.readouterr().err
    )
    assert main(["nowhere.yaml"]) == 2
    assert "there is no 'nowhere.yaml'" in capsys.readouterr().err


def test_what_json_says_twice_or_against_itself(write: Write, tmp_path: Path) -> None:
    (tmp_path / "twice.json").write_text('{"optim": "sgd", "num_train_epochs": 1, "optim": "adamw_torch"}')
    with pytest.raises(MemplanError, match="it has the key optim twice"):
        runfiles.read(tmp_path / "twice.json")
    with pytest.raises(MemplanError, match="fp16 must be false where bf16 is true"):
        runfiles.read(write({"optim": "sgd", "bf16": True, "fp16": True}, "both.json"))


def test_a_models_configuration_is_none(write: Write, tmp_path: Path) -> None:
    path = write(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "optim": "sgd"}, "config.json"
    )
    assert runfiles.read(path) is None


def test_what_contradicts_itself_names_the_file(write: Write) -> None:
    path = write(
        {
            "base_model": "llama-3.2-1b",
            "micro_batch_size": 1,
            "fp16": True,
            "bf16": False,
            "flash_attention": True,
        }
    )
    with pytest.raises(RecipeError, match=r"^run.yaml: full fine-tuning in fp16 under autocast"):
        plan(path)


def test_an_unknown_key_that_may_matter_is_named(write: Write) -> None:
    answer = plan(write(QLORA, holographic_attention=True))
    assert answer.read is not None
    assert "holographic_attention: unknown, so not counted" in answer.read.left_out


ANYTHING: tuple[Any, ...] = (
    True, False, 0, -1, 2.5, 10**30, float("nan"), "x", "", "1e400", [], ["a", 1], {}, {"use_reentrant": 7},
    {"stage": []}, {"bnb_4bit_quant_type": []}, {"dtype": ["x"]}, [True], [10**30],
)  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        QLORA, LORA_SFT, {**TRL, "load_in_4bit": True},
        {"zero_optimization": {"stage": 2}, "train_batch_size": 8, "optimizer": {"type": "Adam"}},
    ],
    ids=str,
)  # fmt: skip
def test_any_value_of_any_key_is_read_or_refused(values: dict[str, Any], write: Write) -> None:
    kind = read(write(values, "run.json" if "zero_optimization" in values else "run.yaml")).kind
    runfile = runfiles.find(kind)
    probe = runfiles.Keys("x", values, lambda: "")
    runfile.read(probe)
    for key in sorted({*probe.looked_at, *runfile.refuses}):
        for value in ANYTHING:
            keys = runfiles.Keys("x", {**values, key: value}, lambda: "")
            try:
                keys.refuse_any(runfile.refuses)
                runfile.read(keys)
                keys.finish(runfile.ignored)
                found = runfiles.Reading(
                    name="x", path="x", kind=kind, model=keys.model, options=keys.options, stack=keys.sizes,
                    understood=keys.understood, ignored=(), left_out=(),
                )  # fmt: skip
                found.recipe()
            except MemplanError:
                continue  # one of its sentences


@pytest.mark.parametrize("outer", ["zero_optimization", "deepspeed_config"])
def test_any_value_of_deepspeeds_keys_is_read_or_refused(outer: str) -> None:
    inside = (
        ("stage", "offload_optimizer", "offload_param", "overlap_comm", "reduce_bucket_size")
        if outer == "zero_optimization"
        else ("zero_stage", "offload_optimizer_device", "gradient_clipping", "deepspeed_config_file")
    )
    for key in inside:
        for value in (*ANYTHING, {"device": []}, {"device": "cpu", "ratio": "x"}, {"device": {}}):
            values = {outer: {"stage": 3, key: value}}
            if outer == "deepspeed_config":
                values = {"distributed_type": "DEEPSPEED", "num_processes": 2, outer: {key: value}}
            keys = runfiles.Keys("x", values, lambda: "")
            try:
                runfiles.find("deepspeed" if outer == "zero_optimization" else "accelerate").read(keys)
            except MemplanError:
                continue
            assert keys.options["parallel"].startswith("zero")


# -- on the command line ----------------------------------------------------------------------------------


def test_what_was_read_is_said(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(QLORA, torch_compile=True)
    assert main([path, "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "read from run.yaml (axolotl):" in out and "ignored, no memory:" in out
    assert "torch_compile: what torch.compile keeps is another amount." in out
    assert "micro_batch_size: 2" in out
    assert main([path]) == 0  # where a first screen has no room for them, it says so
    assert "More with --verbose: keys that were ignored" in capsys.readouterr().out


def test_json_says_the_file_its_trainer_and_what_was_ignored(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([write(QLORA), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["read"]["file"], answer["read"]["kind"]) == ("run.yaml", "axolotl")
    assert answer["recipe"]["trainer"] == "axolotl"
    assert answer["read"]["ignored"] == ["datasets"]
    assert main(["llama-3.2-1b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["read"] is None


def test_options_override_the_file(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write(QLORA), "--batch-size", "1", "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["batch_size"], recipe["seq_len"]) == (1, 1024)


def test_every_command_takes_a_file(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(QLORA)
    for arguments in (
        ["fit", path, "--gpu", "4090"],
        ["fit", path, "--gpu", "4090", "--maximize", "seq-len"],
        ["compare", path],
        ["frontier", path, "--gpu", "4090", "--batch-sizes", "1"],
    ):
        assert main([*arguments, "--json"]) == 0, arguments
        answer = json.loads(capsys.readouterr().out)
        assert "axolotl" in json.dumps(answer)


def test_a_frontier_is_of_the_files_own_mode(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(QLORA, optimizer="paged_adamw_8bit")
    assert main(["frontier", path, "--gpu", "4090", "--batch-sizes", "1", "--json"]) == 0
    told = capsys.readouterr().out
    assert "paged_adamw_8bit" in told and '"mode": "full"' not in told


def test_a_file_is_not_written_over(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(QLORA)
    assert main([path, "--html", path]) == 2
    assert "would be written over" in capsys.readouterr().err
    assert main(["llama-3.2-1b", "--config", path, "--tape", path]) == 2
    assert "would be written over" in capsys.readouterr().err


# -- advice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({**QLORA, "base_model": "llama-8b", "micro_batch_size": 16},
         "micro_batch_size: 1; gradient_accumulation_steps: 16"),
        ({**LORA_SFT, "model_name_or_path": "llama-8b", "per_device_train_batch_size": 16},
         "per_device_train_batch_size: 1; gradient_accumulation_steps: 16"),
        ({**TRL, "model_name_or_path": "llama-8b"}, "dtype: bfloat16; bf16: false"),
    ],
)  # fmt: skip
def test_advice_is_a_change_of_that_file(
    values: dict[str, Any], key: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(values)
    assert main(["fit", path, "--gpu", "4090", "--json"]) == 1
    (advice,) = json.loads(capsys.readouterr().out)["advice"]
    changes = [change["config"] for change in advice["changes"]]
    assert key in changes
    assert not any("(" in change and "=" in change for change in changes)  # no Python


@pytest.mark.parametrize("kind", ["axolotl", "llama_factory", "trl"])
def test_what_a_file_is_advised_to_say_it_reads(kind: str, write: Write) -> None:
    values = {"axolotl": QLORA, "llama_factory": LORA_SFT, "trl": TRL}[kind]
    before = read(write(values)).recipe()
    wanted = {
        "batch_size": 3, "seq_len": 777, "gradient_accumulation_steps": 5, "optimizer": "paged_adamw_8bit",
        "gradient_checkpointing": True, "r": 4, "target_modules": "q,v", "attn": "flash_attention_2",
    }  # fmt: skip
    for field, value in wanted.items():
        lines = runfiles.find(kind).change({field: value}, before)
        changed = {**values, **yaml.safe_load(lines.replace("; ", "\n"))}
        told = read(write(changed)).recipe()
        got = getattr(told, field)
        assert got == value or (field == "target_modules" and set(got) == {"q_proj", "v_proj"}), field


def test_what_a_file_cannot_say_is_not_advised(write: Write) -> None:
    axolotl = runfiles.find("axolotl")
    assert axolotl.sayable({"kernels": "memplan"}) is None
    assert axolotl.sayable({"loss": "chunked"}) is None
    assert axolotl.sayable({"r": 4, "lora_alpha": None}) == {"r": 4, "lora_alpha": None}
    before = Recipe(mode="full", trainer="axolotl")
    assert "lora_target_linear: true" in axolotl.change({"mode": "lora"}, before)


def test_a_file_of_another_trainer_of_trls_is_never_planned_as_the_hf_trainers(write: Write) -> None:
    """A GRPOConfig's keys are the HF Trainer's but for a few: a plan of its sizes would be another step's."""
    grpo = {"model_name_or_path": "qwen3-0.6b", "per_device_train_batch_size": 4, "num_generations": 4}
    for name in ("grpo.yaml", "grpo.json"):
        with pytest.raises(MemplanError, match=r"num_generations: 4 is of another trainer .* trl TRAINER "):
            runfiles.read(write(grpo, name))
    assert read(write(grpo, num_generations="left out")).kind == "training_arguments"
    assert read(write(TRL, beta=0.0)).kind == "trl"


# -- the room ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", rooms.names("runfiles"))
def test_a_key_means_one_thing(kind: str) -> None:
    runfile = runfiles.find(kind)
    assert not runfile.ignored & runfile.refuses.keys()
    assert runfile.launch
    assert set(runfile.says) <= set(Recipe.model_fields)
    keys = runfiles.Keys("x", {}, lambda: "")
    keys.refuse_any(runfile.refuses)
    if kind not in ("deepspeed", "torchtune", "llama_factory_v1"):  # which refuse whatever they hold
        try:
            runfile.read(keys)
        except MemplanError:
            return
    taken = keys.looked_at - set(runfile.refuses)
    assert not taken & (runfile.ignored - IGNORED)


def test_no_two_kinds_own_a_key() -> None:
    kinds = [runfiles.find(kind) for kind in rooms.names("runfiles")]
    for one in kinds:
        for other in kinds:
            assert one is other or not one.own & other.own


def test_accelerates_processes_are_those_of_all_machines(write: Write) -> None:
    file = {"distributed_type": "MULTI_GPU", "num_machines": 2, "num_processes": 16}
    recipe = plan("llama-3.2-1b", Recipe(mode="lora"), config=write(file), gpus=[]).recipe
    assert (recipe.gpus, recipe.nodes, recipe.gpus_per_node) == (16, 2, 8)
    recipe = plan("llama-3.2-1b", Recipe(mode="lora", gpus=4), config=write(file), gpus=[]).recipe
    assert (recipe.gpus, recipe.nodes) == (4, None)  # of how many machines was not said
    with pytest.raises(MemplanError, match="num_machines: 3 does not divide num_processes"):
        plan("llama-3.2-1b", Recipe(mode="lora"), config=write({**file, "num_machines": 3}), gpus=[])


def _fsdp(version: int, mesh: dict[str, int] | None = None, **told: Any) -> dict[str, Any]:
    wrapped = {"fsdp_version": version, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    file = {"distributed_type": "FSDP", "num_machines": 2, "num_processes": 8, "fsdp_config": wrapped | told}
    if mesh is not None:
        file["parallelism_config"] = {f"parallelism_config_{name}_size": size for name, size in mesh.items()}
    return file


@pytest.mark.parametrize(
    ("file", "options"),
    [
        (_fsdp(2, {"dp_replicate": 2, "dp_shard": 4, "tp": 1}), {"dp_replicate": 2, "gpus": 8}),
        (_fsdp(2, {"dp_shard": 8}), {"gpus": 8}),
        (
            _fsdp(2, {"dp_replicate": 4, "dp_shard": 4}) | {"num_processes": None},
            {"dp_replicate": 4, "gpus": 16},
        ),
        (_fsdp(2, {}), {}),
        (_fsdp(2, fsdp_reshard_after_forward="false"), {"reshard_after_forward": False}),
        (_fsdp(2, fsdp_sharding_strategy="SHARD_GRAD_OP"), {}),  # FSDP1's
        (_fsdp(1, fsdp_sharding_strategy="SHARD_GRAD_OP"), {"reshard_after_forward": False}),
        (_fsdp(1, fsdp_sharding_strategy=2), {"reshard_after_forward": False}),
        (_fsdp(1, fsdp_sharding_strategy="HYBRID_SHARD"), {"dp_replicate": 2}),
        (_fsdp(1, fsdp_sharding_strategy="4") | {"num_machines": 1}, {}),
        (_fsdp(1, fsdp_reshard_after_forward="SHARD_GRAD_OP"), {}),  # which the launcher's own overrules
    ],
)
def test_accelerate_says_what_stays_and_how_often_the_model_is_there(
    file: dict[str, Any], options: dict[str, Any], write: Write
) -> None:
    found = read(write(file)).options
    named = ("dp_replicate", "reshard_after_forward", *(("gpus",) if "gpus" in options else ()))
    assert {name: found[name] for name in named if name in found} == options


def test_one_process_of_fsdp_is_not_a_plain_one(write: Write) -> None:
    with pytest.raises(MemplanError, match="num_processes: 1 is one: FSDP on one card is not planned"):
        read(write(_fsdp(2) | {"num_machines": 1, "num_processes": 1}))


def test_a_file_that_gives_way_is_named(write: Write) -> None:
    path = write(_fsdp(2))
    for given, gpus, told in (
        (Recipe(mode="full"), ["16xh100"], ("gpus",)),
        (Recipe(mode="full", gpus=16), [], ("gpus",)),
        (Recipe(mode="full", parallel="zero3"), ["8xh100"], ("parallel",)),
        (Recipe(mode="full"), ["8xh100"], ()),
        (Recipe(mode="full"), [], ()),
    ):
        found = plan("llama-3.2-1b", given, config=path, gpus=gpus).read
        assert found is not None
        assert [sentence.partition(":")[0] for sentence in found.left_out] == [*told], found.left_out


def test_what_accelerate_passes_over_is_said(write: Write) -> None:
    told = read(write(_fsdp(1, fsdp_reshard_after_forward="SHARD_GRAD_OP"))).left_out
    assert any("whose fsdp_sharding_strategy is FULL_SHARD" in sentence for sentence in told)
    assert not read(write(_fsdp(1, fsdp_reshard_after_forward="FULL_SHARD"))).left_out
