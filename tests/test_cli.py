"""The command line: answers, exit statuses, JSON, and one sentence for every bad question."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome

from memplan.asked.recipe import Recipe
from memplan.cli import HELP, main
from memplan.commands import COMMANDS, module_of
from memplan.commands.arguments import applicable, given_options, parse
from memplan.commands.plan import parser as plan_parser

Run = Callable[..., Outcome]

SMALL = "llama-3.2-1b"
COMMAND = [sys.executable, "-m", "memplan"]


# -- answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("--mode", "qlora", "--r", "8"), ("--mode", "lora"), ("--mode", "full")]
)
def test_a_model_alone_is_a_question(memplan: Run, arguments: tuple[str, ...]) -> None:
    outcome = memplan(SMALL, *arguments)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome == memplan("plan", SMALL, *arguments) == memplan(*arguments, SMALL)
    for part in (
        "meta-llama/Llama-3.2-1B",
        "predicted",
        "GiB allocated",
        "weights",
        "defaults",
        "at the peak",
    ):
        assert part in outcome.out
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    assert "\x1b" not in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_80_columns_wide(command: str) -> None:
    text = import_module(module_of(command)).parser().format_help()
    assert max(map(len, text.splitlines())) <= 80


def test_llama_70b_is_the_current_one_and_says_so(memplan: Run) -> None:
    outcome = memplan("llama-70b", "--mode", "qlora", "--r", "8")
    assert outcome.status == 0
    assert "meta-llama/Llama-3.3-70B-Instruct" in outcome.out
    assert "llama-70b means llama-3.3-70b" in outcome.out


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_json_has_the_documented_keys_and_adds_up(memplan: Run, mode: str) -> None:
    document = json.loads(memplan(SMALL, "--mode", mode, "--json").out)
    assert document["schema_version"] == 1
    assert document["provenance"] == "predicted"
    expected = {
        "model": {"name", "hub_id", "architecture"},
        "parameters": {"total", "trainable"},
        "recipe": set(Recipe.model_fields),
        "static_bytes": {"weights", "quantization_state", "adapters", "optimizer_state"},
        "peak": {"allocated_bytes", "tensor_bytes", "phase", "operation", "layer", "by_category"},
        "summary": {"weights", "lora_parameters", "optimizer_state", "activations"},
    }
    for key, names in expected.items():
        assert names <= set(document[key]), key
    peak = document["peak"]
    assert set(peak["by_category"]) == {
        "weights",
        "quantization_state",
        "adapters",
        "gradients",
        "optimizer_state",
        "activations",
        "logits_and_loss",
        "temporaries",
        "communication",
    }
    assert sum(peak["by_category"].values()) == peak["tensor_bytes"] == sum(document["summary"].values())
    assert peak["tensor_bytes"] <= peak["allocated_bytes"] == document["allocator"]["allocated_bytes"]
    assert peak["phase"] in ("forward", "backward", "optimizer")
    assert document["recipe"]["mode"] == mode
    for fit in document["fits"]:
        assert set(fit) == {
            "gpu",
            "total_bytes",
            "reserved_bytes",
            "context_bytes",
            "needed_bytes",
            "headroom_bytes",
            "verdict",
            "retries",
            "gets_through_on",
            "note",
        }
        assert fit["needed_bytes"] == fit["reserved_bytes"] + fit["context_bytes"]
        assert fit["headroom_bytes"] == fit["total_bytes"] - fit["needed_bytes"]
        assert fit["verdict"] in ("fits", "tight", "does not fit")


@pytest.mark.parametrize(
    ("arguments", "status", "verdict"),
    [
        ((SMALL, "--gpu", "h200"), 0, "fits"),
        (("llama-70b", "--gpu", "t4"), 1, "does not fit"),
        (("llama-70b", "--gpu", "b200", "--gpu", "t4"), 1, "does not fit"),
    ],
)
def test_fit_answers_with_its_exit_status(
    memplan: Run, arguments: tuple[str, ...], status: int, verdict: str
) -> None:
    outcome = memplan("fit", *arguments, "--mode", "qlora")
    assert (outcome.status, outcome.err) == (status, "")
    assert verdict in outcome.out
    as_json = memplan("fit", *arguments, "--mode", "qlora", "--json")
    assert as_json.status == status
    assert json.loads(as_json.out)["fits"][-1]["verdict"] == verdict


def test_gpus_asked_for_are_the_ones_judged(memplan: Run) -> None:
    document = json.loads(memplan(SMALL, "--gpu", "a6000", "--gpu", "4090", "--json").out)
    assert [fit["gpu"] for fit in document["fits"]] == ["NVIDIA RTX A6000", "NVIDIA GeForce RTX 4090"]


def test_compare_puts_modes_side_by_side(memplan: Run) -> None:
    outcome = memplan("compare", SMALL)
    assert outcome.status == 0
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    document = json.loads(memplan("compare", SMALL, "--modes", "lora,qlora", "--r", "4", "--json").out)
    assert [plan["recipe"]["mode"] for plan in document["plans"]] == ["lora", "qlora"]
    assert {plan["recipe"]["r"] for plan in document["plans"]} == {4}


def test_compare_compares_like_with_like(memplan: Run) -> None:
    def checkpointed(*options: str) -> list[bool]:
        plans = json.loads(memplan("compare", SMALL, *options, "--json").out)["plans"]
        return [plan["recipe"]["gradient_checkpointing"] for plan in plans]

    assert len(set(checkpointed())) == 1
    assert checkpointed("--no-gradient-checkpointing") == [False] * 3
    assert checkpointed("--gradient-checkpointing") == [True] * 3


def test_compare_takes_several_models(memplan: Run) -> None:
    outcome = memplan("compare", SMALL, "qwen2.5-0.5b", "--mode", "lora", "--gpu", "4090")
    assert (outcome.status, outcome.err) == (0, "")
    for model in (SMALL, "qwen2.5-0.5b"):
        (line,) = [line for line in outcome.out.splitlines() if line.startswith(f"  {model} ")]
        assert line.endswith("fits")
    one = json.loads(memplan(SMALL, "--mode", "lora", "--gpu", "4090", "--json").out)
    both = json.loads(
        memplan("compare", SMALL, "qwen2.5-0.5b", "--mode", "lora", "--gpu", "4090", "--json").out
    )
    assert both["plans"][0] == one


def test_a_sweep_goes_through_every_value(memplan: Run) -> None:
    asked = ("compare", SMALL, "--sweep", "r=8,16", "seq-len=1k..4k", "--gpu", "4090")
    outcome = memplan(*asked)
    assert (outcome.status, outcome.err) == (0, "")
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    plans = json.loads(memplan(*asked, "--json").out)["plans"]
    swept = [(plan["recipe"]["r"], plan["recipe"]["seq_len"]) for plan in plans]
    assert swept == [(r, length) for r in (8, 16) for length in (1024, 2048, 4096)]
    assert len([line for line in outcome.out.splitlines() if line.endswith(("fits", " no"))]) == len(plans)
    switched = memplan(
        "compare", SMALL, "--sweep", "gradient-checkpointing=on,off", "attn=fa2,sdpa", "--json"
    )
    recipes = [plan["recipe"] for plan in json.loads(switched.out)["plans"]]
    assert [recipe["gradient_checkpointing"] for recipe in recipes] == [True, True, False, False]
    assert [recipe["attn"] for recipe in recipes] == ["flash_attention_2", "sdpa"] * 2


@pytest.mark.parametrize(
    ("sweep", "complaint"),
    [
        (("r",), "OPTION=VALUE"),
        (("r=",), "OPTION=VALUE"),
        (("foo=1,2",), "no option is called '--foo'"),
        (("r=8,eight",), "eight"),
        (("seq-len=8k..1k",), "to a larger one"),
        (("r=1..512", "seq-len=1..32k", "batch-size=1,2"), "320 plans are more than the 200 of a comparison"),
        (("seq-len=" + ",".join(map(str, range(1, 3001))),), "name fewer models, modes or values"),
        (("r=" + ",".join(map(str, range(1, 3001))),) * 3, "27,000,000,000 plans"),
        (("r=1.." + "9" * 5000,), "--r"),
        (("mode=lora,qlora", "--modes", "full"), "say the same"),
        (("deepspeed=a,b",), "DDP, FSDP, ZeRO and tensor parallel"),
    ],
)
def test_a_sweep_that_makes_no_sense(memplan: Run, sweep: tuple[str, ...], complaint: str) -> None:
    check_refusal(memplan("compare", SMALL, "--sweep", *sweep), complaint)


FOUR_BITS = "unsloth/Meta-Llama-3.1-8B-bnb-4bit"


@pytest.mark.parametrize("command", [("compare",), ("frontier", "--gpu", "4090", "--no-exact")])
def test_modes_that_a_checkpoint_in_4_bits_has_not_are_left_out_and_said_to_be(
    memplan: Run, command: tuple[str, ...]
) -> None:
    outcome = memplan(command[0], FOUR_BITS, *command[1:], "--json")
    assert outcome.status == 0
    assert outcome.err == (
        f"memplan: {FOUR_BITS} holds weights in 4 bits, which are trained as QLoRA alone: full and lora are "
        "left out\n"
    )
    answer = json.loads(outcome.out)
    assert {one["recipe"]["mode"] for one in answer.get("plans") or answer["rows"]} == {"qlora"}
    named = memplan(command[0], FOUR_BITS, *command[1:], "--modes", "qlora", "--json")
    assert (named.out, named.err) == (outcome.out, "")
    check_refusal(memplan(command[0], FOUR_BITS, *command[1:], "--modes", "lora,qlora"), "are QLoRA: give")


def test_compare_leaves_out_what_a_mode_has_no_use_for(memplan: Run) -> None:
    assert applicable({"r": 4, "kbit_prep": True, "seq_len": 8}, "full") == {"seq_len": 8}
    assert applicable({"r": 4, "kbit_prep": True, "seq_len": 8}, "lora") == {"r": 4, "seq_len": 8}
    assert memplan("compare", SMALL, "--use-dora", "--kbit-prep").status == 0


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("models",), "models"),
        (("models", "qwen2.5"), "models"),
        (("gpus",), "gpus"),
        (("gpus", "h100"), "gpus"),
        (("completion", "bash"), "commands"),
        (("compare", SMALL), "plans"),
    ],
)
def test_every_command_takes_json(memplan: Run, arguments: tuple[str, ...], key: str) -> None:
    outcome = memplan(*arguments, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    document = json.loads(outcome.out)
    assert document["schema_version"] == 1
    assert document[key]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("plan", (SMALL,)),
        ("fit", (SMALL, "--gpu", "4090")),
        ("frontier", (SMALL, "--gpu", "4090", "--batch-sizes", "1", "--modes", "qlora", "--no-exact")),
        ("compare", (SMALL, "--modes", "lora")),
        ("diff", (f"plan:{SMALL}", f"plan:{SMALL}")),
        ("models", ()),
        ("gpus", ()),
        ("completion", ("bash",)),
    ],
)
def test_every_json_is_as_described(memplan: Run, command: str, arguments: tuple[str, ...]) -> None:
    path = Path(__file__).parent.parent / "docs" / "answers.schema.json"
    schema = json.loads(path.read_text(encoding="utf-8"))
    assert set(schema["commands"]) == set(COMMANDS)
    told = schema["$defs"][schema["commands"][command]["$ref"].rpartition("/")[2]]
    document = json.loads(memplan(command, *arguments, "--json").out)
    assert document["schema_version"] == 1
    assert set(document) == set(told["properties"])


def test_diff_of_two_models_says_how_they_are_called(memplan: Run) -> None:
    check_refusal(memplan("diff", SMALL, "qwen2.5-0.5b"), f"plan:{SMALL}")
    check_refusal(memplan("diff", "no-such-file.json", f"plan:{SMALL}"), "no-such-file.json")


def test_models_and_gpus_are_listed(memplan: Run) -> None:
    models, gpus = memplan("models"), memplan("gpus")
    assert models.status == gpus.status == 0
    assert "llama-3.3-70b" in models.out
    assert "RTX A6000" in gpus.out
    assert "RTX 4090" not in memplan("gpus", "h100").out


# -- options -----------------------------------------------------------------------------------------------


def test_every_field_of_a_recipe_has_an_option_and_every_option_a_field() -> None:
    others = {"help", "model", "gpu", "json", "tape", "trace", "verbose", "config", "lengths", "host_memory"}
    others |= {"timeline", "html", "trace_json", "snapshot"}
    destinations = {action.dest for action in plan_parser()._actions}
    assert destinations - others == set(Recipe.model_fields)


def test_option_names_that_scripts_rely_on() -> None:
    names = {option for action in plan_parser()._actions for option in action.option_strings}
    promised = (
        "--mode --r --lora-alpha --lora-dropout --target-modules --batch-size --seq-len --optimizer --dtype "
        "--attn --gradient-checkpointing --no-gradient-checkpointing --autocast --no-autocast --loss "
        "--kbit-prep --no-kbit-prep --double-quant --no-double-quant --adapter-dtype --gpu --json"
    )
    assert set(promised.split()) <= names


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--mode", "lora", "--r", "16"], {"mode": "lora", "r": 16}),
        (["--target-modules", "q,v"], {"target_modules": "q,v"}),
        (["--target-modules", "all-linear"], {"target_modules": "all-linear"}),
        (["--target-modules", "q_proj"], {"target_modules": ("q_proj",)}),
        (["--target-modules", "q_proj, mlp.up_proj"], {"target_modules": ("q_proj", "mlp.up_proj")}),
        (["--target-modules", r".*\.(q|v)_proj"], {"target_modules": r".*\.(q|v)_proj"}),
        (["--modules-to-save", "lm_head,embed_tokens"], {"modules_to_save": ("lm_head", "embed_tokens")}),
        (["--dtype", "bf16", "--adapter-dtype", "fp32"], {"dtype": "bfloat16", "adapter_dtype": "float32"}),
        (["--attn", "flash"], {"attn": "flash_attention_2"}),
        (
            ["--no-kbit-prep", "--gradient-checkpointing"],
            {"kbit_prep": False, "gradient_checkpointing": True},
        ),
        (["--per-device-train-batch-size", "4"], {"batch_size": 4}),
    ],
)
def test_options_become_fields(arguments: list[str], options: dict[str, Any]) -> None:
    given = given_options(parse(plan_parser(), ["llama-70b", *arguments]))
    assert given == options
    assert Recipe(**given)


# -- help --------------------------------------------------------------------------------------------------


def test_help_fits_a_screen_and_names_every_command(memplan: Run) -> None:
    outcome = memplan("--help")
    assert outcome == memplan("-h") == memplan("help")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert 24 <= len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert "Examples:" in lines
    for command in COMMANDS:
        assert any(line.startswith(f"  {command} ") for line in lines), command


def test_examples_of_the_help_are_understood() -> None:
    examples = [line.split()[1:] for line in HELP.splitlines() if line.startswith("  memplan ")]
    assert len(examples) >= 4
    for first, *rest in examples:
        name = first if first in COMMANDS else "plan"
        parse(import_module(module_of(name)).parser(), rest if name == first else [first, *rest])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(memplan: Run, command: str) -> None:
    shown = memplan(command, "--help")
    assert (shown.status, shown.err) == (0, "")
    assert "--json" in shown.out


def test_version(memplan: Run) -> None:
    from memplan import __version__

    assert memplan("--version") == memplan("version") == (0, f"memplan {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_may_be_asked_for_in_words(memplan: Run, command: str) -> None:
    assert memplan("help", command) == memplan(command, "--help")


def test_help_for_what_is_no_command(memplan: Run) -> None:
    check_refusal(memplan("help", "fitt"), "memplan help fit")
    check_refusal(memplan("help", "llama-70b"), "no command")


def test_nothing_asked_gets_the_help_and_status_2(memplan: Run) -> None:
    assert memplan() == (2, "", HELP)


# -- bad questions -----------------------------------------------------------------------------------------

BAD_QUESTIONS = {
    "unknown model": (["lama-70b"], "llama-70b"),
    "no model": (["--mode", "lora"], "MODEL"),
    "empty model": ([""], "empty"),
    "misspelt command": (["modles"], "memplan models"),
    "unknown card": (["llama-70b", "--gpu", "a600"], "a6000"),
    "fit without card": (["fit", "llama-70b"], "--gpu"),
    "unknown option": (["llama-70b", "--quant-typ", "nf4"], "--quant-type"),
    "unknown short option": (["llama-70b", "-z", "8"], "-z"),
    "two models": (["llama-70b", "llama-8b"], "llama-8b"),
    "unknown mode": (["llama-70b", "--mode", "qlorra"], "qlora"),
    "unknown mode to compare": (["compare", "llama-70b", "--modes", "full,qlorra"], "qlora"),
    "no mode to compare": (["compare", "llama-70b", "--modes", ","], "--modes"),
    "unknown optimizer": (["llama-70b", "--optimizer", "adamw_fused"], "adamw_torch_fused"),
    "unknown dtype": (["llama-70b", "--dtype", "int8"], "bfloat16"),
    "unknown attention": (["llama-70b", "--attn", "paged"], "sdpa"),
    "unknown loss": (["llama-70b", "--loss", "mse"], "standard"),
    "rank 0": (["llama-70b", "--r", "0"], "r"),
    "rank is no number": (["llama-70b", "--r", "eight"], "eight"),
    "rank above the matrix": (["llama-70b", "--r", "100000"], "100000"),
    "alpha NaN": (["llama-70b", "--lora-alpha", "nan"], "lora_alpha"),
    "alpha negative": (["llama-70b", "--lora-alpha", "-1"], "lora_alpha"),
    "dropout 1": (["llama-70b", "--lora-dropout", "1"], "lora_dropout"),
    "dropout NaN": (["llama-70b", "--lora-dropout", "nan"], "lora_dropout"),
    "clipping at infinity": (["llama-70b", "--max-grad-norm", "inf"], "max_grad_norm"),
    "batch 0": (["llama-70b", "--batch-size", "0"], "batch_size"),
    "batch huge": (["llama-70b", "--batch-size", "9" * 30], "at most 18 digits"),
    "batch too long to be a number": (["llama-70b", "--batch-size", "9" * 5000], "batch"),
    "batch fraction": (["llama-70b", "--batch-size", "1.5"], "1.5"),
    "too many tokens": (["llama-70b", "--batch-size", "1048576", "--seq-len", "16777216"], "tokens"),
    "sequence 0": (["llama-70b", "--seq-len", "0"], "seq_len"),
    "target matches nothing": (["llama-70b", "--target-modules", "c_attn"], "c_attn"),
    "no target": (["llama-70b", "--target-modules", ","], "--target-modules"),
    "broken pattern": (["llama-70b", "--target-modules", "(q_proj"], "(q_proj"),
    "4-bit full": (["llama-70b", "--mode", "full", "--kbit-prep"], "qlora"),
    "kbit prep in lora": (["llama-70b", "--mode", "lora", "--kbit-prep"], "qlora"),
    "momentum of Adam": (["llama-70b", "--momentum", "0.9"], "sgd"),
    "option without value": (["llama-70b", "--r"], "--r"),
    "no such file": (["./no/such/config.json"], "no/such"),
    "no such model listed": (["models", "zzz"], "zzz"),
    "no such card listed": (["gpus", "zzz"], "zzz"),
    "unknown shell": (["completion", "tcsh"], "bash"),
}


@pytest.mark.parametrize("question", BAD_QUESTIONS)
def test_a_bad_question_gets_one_sentence_and_status_2(memplan: Run, question: str) -> None:
    arguments, fragment = BAD_QUESTIONS[question]
    check_refusal(memplan(*arguments), fragment)


def check_refusal(outcome: Outcome, fragment: str) -> None:
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("memplan: ")
    assert outcome.err.count("\n") == 1 and outcome.err.endswith("\n")
    assert "Traceback" not in outcome.err
    assert fragment in outcome.err
    assert len(outcome.err) < 500


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

BAD_CONFIGS = {
    "empty": "",
    "truncated": json.dumps(LLAMA)[:-20],
    "no JSON": "hidden_size: 64",
    "a list": "[]",
    "null": "null",
    "no architecture": "{}",
    "unknown architecture": json.dumps(LLAMA | {"architectures": ["FooForCausalLM"], "model_type": "foo"}),
    "negative size": json.dumps(LLAMA | {"hidden_size": -64}),
    "zero layers": json.dumps(LLAMA | {"num_hidden_layers": 0}),
    "missing size": json.dumps({key: value for key, value in LLAMA.items() if key != "hidden_size"}),
    "size is text": json.dumps(LLAMA | {"hidden_size": "sixty-four"}),
    "size is NaN": json.dumps(LLAMA | {"hidden_size": float("nan")}),
    "size is infinite": json.dumps(LLAMA | {"intermediate_size": float("inf")}),
    "not divisible by heads": json.dumps(LLAMA | {"hidden_size": 65}),
    "heads not divisible": json.dumps(LLAMA | {"num_key_value_heads": 3}),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_bad_config_gets_one_sentence_and_status_2(memplan: Run, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(BAD_CONFIGS[kind], encoding="utf-8")
    check_refusal(memplan(path), "")


def test_a_good_config_is_planned_by_file_and_by_folder(memplan: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8")
    by_file, by_folder = memplan(path, "--json"), memplan(tmp_path, "--json")
    assert by_file.status == by_folder.status == 0
    assert json.loads(by_file.out) == json.loads(by_folder.out)


def test_a_folder_without_config(memplan: Run, tmp_path: Path) -> None:
    check_refusal(memplan(tmp_path), "config.json")


def test_an_unreadable_file(memplan: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00binary")
    check_refusal(memplan(path), "config.json")


def test_a_hub_id_without_network(memplan: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    check_refusal(memplan("nobody/no-such-model"), "nobody/no-such-model")


@pytest.mark.parametrize("steps", ["1000", "1" + 9 * "0"])
def test_many_accumulation_steps_are_no_more_work_than_few(steps: str) -> None:
    question = [*COMMAND, SMALL, "--gradient-accumulation-steps", steps, "--json"]
    process = subprocess.run(question, capture_output=True, timeout=10, check=True)
    few = subprocess.run([*question[:-2], "4", "--json"], capture_output=True, timeout=10, check=True)
    many, four = json.loads(process.stdout), json.loads(few.stdout)
    # all batches of a step are on the card at once: ids, mask and labels
    waiting = (int(steps) - 4) * 3 * 8 * four["recipe"]["batch_size"] * four["recipe"]["seq_len"]
    assert many["peak"]["tensor_bytes"] - four["peak"]["tensor_bytes"] == waiting
    assert many["peak"]["operation"] == four["peak"]["operation"]


# -- what else can happen to a process ---------------------------------------------------------------------


def test_an_interrupt_is_quiet(memplan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memplan.planning.study.replay", interrupt)
    assert memplan(SMALL) == (130, "", "")


@pytest.mark.parametrize("arguments", [["models"], ["gpus", "--json"], ["--help"], ["completion", "bash"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as pipe:
        process = subprocess.run([*COMMAND, *arguments], stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk to write to")
def test_a_full_disk_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 – Path("/dev/full").open is the same thing
        process = subprocess.run(
            [*COMMAND, "models"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert process.returncode == 2
    assert process.stderr.startswith("memplan: ")
    assert process.stderr.count("\n") == 1


def in_a_terminal(arguments: list[str], **environment: str) -> str:
    """What a command prints to a terminal of its own."""
    ours, theirs = pty.openpty()
    settings = {"TERM": "xterm-256color", "COLUMNS": "80", "PATH": os.environ["PATH"]} | environment
    process = subprocess.Popen([*COMMAND, *arguments], stdout=theirs, stderr=theirs, env=settings)
    os.close(theirs)

    def chunks() -> Iterator[bytes]:
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # Linux says EIO when the other side has closed
                return
            if not chunk:
                return
            yield chunk

    text = b"".join(chunks()).decode()
    os.close(ours)
    assert process.wait() == 0
    return text


def test_colour_in_a_terminal_unless_no_color() -> None:
    assert "\x1b[" in in_a_terminal(["gpus"])
    assert "\x1b" not in in_a_terminal(["gpus"], NO_COLOR="1")
    assert "\x1b[" in in_a_terminal(["gpus"], NO_COLOR="")  # no-color.org: only when not empty


def test_a_terminal_that_speaks_ascii_gets_ascii() -> None:
    process = subprocess.run(
        [*COMMAND, "gpus"], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=True
    )
    assert process.stdout.decode("ascii")


def test_python_dash_m_is_the_command() -> None:
    process = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert process.stdout.startswith("memplan ")


# -- completion --------------------------------------------------------------------------------------------

COMPLETED = {
    ("memplan", "comp"): {"compare", "completion"},
    ("memplan", "llama-3.3"): {"llama-3.3-70b"},
    ("memplan", "llama-70b", "--mod"): {"--mode", "--modules-to-save"},
    ("memplan", "llama-70b", "--mode", "q"): {"qlora"},
    ("memplan", "fit", "llama-70b", "--gpu", "b200"): {"b200"},
    ("memplan", "compare", "llama-70b", "--modes"): {"--modes"},
    ("memplan", "completion", "f"): {"fish"},
}


@pytest.mark.parametrize("words", COMPLETED, ids=" ".join)
def test_bash_completes(memplan: Run, words: tuple[str, ...]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    script = memplan("completion", "bash").out
    ask = 'COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _memplan; printf "%s\\n" "${COMPREPLY[@]}"'
    process = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}", "bash", *words], capture_output=True, text=True, check=True
    )
    assert COMPLETED[words] <= set(process.stdout.split())
    assert all(word.startswith(words[-1]) for word in process.stdout.split())
    assert process.stderr == ""


@pytest.mark.parametrize("words", COMPLETED, ids=" ".join)
def test_fish_completes(memplan: Run, words: tuple[str, ...]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("no fish here")
    script = memplan("completion", "fish").out
    process = subprocess.run(
        ["fish", "-c", f"{script}\ncomplete -C '{' '.join(words)}'"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert COMPLETED[words] <= {line.split("\t")[0] for line in process.stdout.splitlines()}


def test_zsh_reads_its_script(memplan: Run) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("no zsh here")
    script = memplan("completion", "zsh").out
    assert script.startswith("#compdef memplan\n")
    subprocess.run(["zsh", "-n"], input=script, text=True, check=True)


def test_main_takes_the_process_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["memplan", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("memplan ")


def test_json_goes_into_a_stream_that_has_no_encoding() -> None:
    with redirect_stdout(StringIO()) as out:
        assert main(["llama-3.2-1b", "--seq-len", "64", "--json"]) == 0
    assert json.loads(out.getvalue())["recipe"]["seq_len"] == 64
