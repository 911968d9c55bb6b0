"""Options as trainers and people call them: what they become, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import Outcome

from memplan.asked.recipe import Recipe
from memplan.commands import synonyms
from memplan.commands.arguments import UsageError, given_options, parse
from memplan.commands.plan import parser
from memplan.errors import MemplanError

Run = Callable[..., Outcome]


def options(line: str) -> dict[str, Any]:
    return given_options(parse(parser(), ["llama-70b", *line.split()]))


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("--lora-r 16", "--r 16"),
        ("--rank 16", "--r 16"),
        ("-r 16", "--r 16"),
        ("--lora_rank=16", "--r 16"),
        ("--lora_alpha 32 --dropout 0.1", "--lora-alpha 32 --lora-dropout 0.1"),
        ("--bs 4", "--batch-size 4"),
        ("--micro-batch-size 4", "--batch-size 4"),
        ("--per-device-train-batch-size 4", "--batch-size 4"),
        ("--per_device_train_batch_size 4", "--batch-size 4"),
        ("--max-length 4096", "--seq-len 4096"),
        ("--cutoff_len 4096", "--seq-len 4096"),
        ("--sequence-len 4096", "--seq-len 4096"),
        ("--ctx 4k", "--seq-len 4096"),
        ("--seq-len 4k", "--seq-len 4096"),
        ("--seq_len 32K", "--seq-len 32768"),
        ("--optim adamw_bnb_8bit", "--optimizer adamw_bnb_8bit"),
        ("--optim AdamW8bit", "--optimizer adamw_bnb_8bit"),
        ("--qlora", "--mode qlora"),
        ("--load_in_4bit True", "--mode qlora"),
        ("--lora --load-in-4bit", "--mode qlora"),
        ("--use_peft", "--mode lora"),
        ("--finetuning_type lora --quantization_bit 4", "--mode qlora"),
        ("--adapter qlora", "--mode qlora"),
        ("--mode QLoRA", "--mode qlora"),
        ("--fft", "--mode full"),
        ("--bf16", "--autocast"),
        ("--bf16 true", "--autocast"),
        ("--bf16 False", "--no-autocast"),
        ("--fp16", "--dtype float16 --autocast"),
        ("--fp16 --full", "--mode full --dtype float32 --autocast"),
        ("--torch_dtype BF16", "--dtype bfloat16"),
        ("--attn fa2", "--attn flash_attention_2"),
        ("--attn_implementation flash_attention_2", "--attn flash_attention_2"),
        ("--flash-attn", "--attn flash_attention_2"),
        ("--flash_attn fa2", "--attn flash_attention_2"),
        ("--flash_attn sdpa", "--attn sdpa"),
        ("--target-modules all", "--target-modules all-linear"),
        ("--lora-target-modules q_proj v_proj", "--target-modules q_proj,v_proj"),
        ("--lora_target all", "--target-modules all-linear"),
        ("--gradient-accumulation 8", "--gradient-accumulation-steps 8"),
        ("--grad-accum 8", "--gradient-accumulation-steps 8"),
        ("--use-liger-kernel", "--loss liger"),
        ("--num_processes 8", "--gpus 8"),
        ("--nproc_per_node=8 --fsdp2", "--gpus 8 --parallel fsdp2"),
        ("--ddp --num-gpus 2", "--parallel ddp --gpus 2"),
        ("--gradient_checkpointing", "--gradient-checkpointing"),
        ("--gradient_checkpointing False", "--no-gradient-checkpointing"),
        ("--no-activation-checkpointing", "--no-gradient-checkpointing"),
        ("--packing", ""),
        ("--learning_rate 2e-4 --epochs 3 --seed 1", ""),
    ],
)
def test_what_people_type_is_ours(typed: str, ours: str) -> None:
    assert options(typed) == options(ours)


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("--deepspeed ds.json", "tensor parallel (--gpus N"),
        ("--fsdp", "tensor parallel (--gpus N"),
        ("--zero-stage 3", "dry-run --gpu 8xa100"),
        ("--parallel ddp,fsdp2", "takes one of them; `memplan compare MODEL --sweep parallel=ddp,fsdp2` all"),
        ("--per_device_eval_batch_size 1", "read from a trainer's file (--config FILE)"),
        ("--load-in-8bit", "8-bit weights are not planned"),
        ("--quantization_bit 8", "no others"),
        ("--neftune_noise_alpha 5", "NEFTune"),
        ("--lora --full", "mode full has no adapters"),
        ("--full --load-in-4bit", "mode full has no 4-bit weights"),
        ("--bf16=maybe", "neither true nor false"),
        ("--bf16 --fp16", "one of bf16 and fp16"),
        ("--load_in_4bit false", "give --mode lora or full"),
        ("--no-qlora --mode qlora", "give --mode lora or full"),
        ("--quantization_bit none", "give --mode lora or full"),
        ("--bs 0", "greater than or equal to 1"),  # what was read as what would be a second sentence
        ("--optim muon", "The optimizers are adafactor"),
        ("--trainer nobody", "The trainers are axolotl, llama_factory, peft, trl."),
        ("--trainer Unsloth", "kernels and checkpoints of its own"),
        ("--seq-len 4q", "whole number"),
        *((f"--mode {mode}", "preference training") for mode in ("dpo", "ORPO", "kto", "grpo", "ppo", "rm")),
        ("--stage dpo", "--stage dpo: preference training is not planned yet; `memplan dry-run"),
        ("--rl simpo", "preference training"),
        ("--mode fsdp", "tensor parallel (--gpus N"),
        ("--mode half", "choose from 'full', 'lora', 'qlora'"),
        ("--maximize seq-len", "it is one of `memplan fit`"),
        ("fits", "unexpected argument 'fits'"),
        ("--frobnicate 3", "no option is called '--frobnicate' here; see memplan plan --help"),
        ("--lora-rnk 3", "did you mean --r?"),
        ("--gradient-chekpointing", "did you mean --gradient-checkpointing?"),
    ],
)
def test_what_has_no_meaning_is_one_sentence(memplan: Run, typed: str, complaint: str) -> None:
    outcome = memplan("llama-70b", *typed.split())
    assert (outcome.status, outcome.out) == (2, "")
    assert complaint in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    "typed", ["--bf16 true --fp16 false", "--load_in_4bit false --lora", "--bits 16 --fft"]
)
def test_what_is_off_contradicts_nothing(typed: str) -> None:
    assert options(typed)


@pytest.mark.parametrize("words", ["qwen3 8b", "qwen3 8b --qlora --gpu 4090", "--gpu 4090 Qwen 3 8B"])
def test_a_models_name_may_be_typed_in_words(memplan: Run, words: str) -> None:
    assert "qwen3-8b  Qwen/Qwen3-8B" in memplan(*words.split()).out


def test_a_mode_of_preference_training_is_refused_in_a_list_too(memplan: Run) -> None:
    outcome = memplan("compare", "llama-8b", "--modes", "lora,dpo")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "--modes dpo: preference training is not planned yet" in outcome.err


@pytest.mark.parametrize("name", ["TRL", "Axolotl", "LLaMA-Factory", "llama_factory", "LlamaFactory", "HF"])
def test_a_trainer_is_known_however_it_is_written(name: str) -> None:
    assert Recipe(trainer=name).trainer in ("trl", "axolotl", "llama_factory", "peft")
    assert Recipe(trainer=name) == Recipe(trainer=Recipe(trainer=name).trainer)


def test_no_guess_leads_to_an_unrelated_option() -> None:
    for name in ("--frob", "--learning", "--tokenizer", "--dataset-split", "--model-revision"):
        with pytest.raises(UsageError, match="no option is called") as error:
            options(f"{name} 3")
        assert "did you mean" not in str(error.value)


def test_what_was_read_is_said_in_our_words(memplan: Run) -> None:
    outcome = memplan("llama-3.2-1b", "--lora_r", "4", "--bf16", "--lr", "1e-4")
    assert "--lora_r 4 is --r 4" in outcome.err
    assert "--bf16 is --autocast" in outcome.err
    assert "moves no memory: --lr" in outcome.err
    assert "r 4, autocast" in outcome.out
    assert memplan("llama-3.2-1b", "--r", "4").err == ""
    assert memplan("llama-3.2-1b", "--batch_size", "2").err == ""  # underscores need no explanation


def test_every_synonym_leads_to_an_option_that_there_is() -> None:
    actions = parser()._option_string_actions
    assert all(f"--{ours}" in actions for ours in synonyms.NAMES)
    for stands_for in (words for pair in synonyms.SWITCHES.values() for words in pair if words):
        parse(parser(), ["llama-70b", *stands_for.split()])
    every = [*synonyms._OURS, *synonyms.SWITCHES, *synonyms.HARMLESS, *synonyms._REFUSED]
    assert len(every) == len(set(every))
    assert not {f"--{name}" for name in every} & actions.keys() - {"--per-device-train-batch-size"}


def test_a_strangers_command_is_left_alone() -> None:
    from memplan.commands.dry_run import parser as dry_run

    asked = parse(dry_run(), ["--gpu", "4090", "--", "trl", "sft", "--max_length", "9", "--load_in_4bit"])
    assert "--max_length" in asked.command


def test_shells_complete_each_option_once(memplan: Run) -> None:
    script = memplan("completion", "bash").out
    for name in ("--cutoff-len", "--lora-r ", "--bs", "--use-liger-kernel"):
        assert name not in script


def test_unplanned_options_are_errors_of_ours() -> None:
    assert issubclass(synonyms.Unplanned, MemplanError)


@pytest.mark.parametrize(
    "typed", ["trl sft --config x.yaml", "python train.py", "accelerate launch --config_file a.yaml train.py"]
)
def test_a_program_in_place_of_a_model_is_told_apart(typed: str, memplan: Run) -> None:
    outcome = memplan(*typed.split())
    assert outcome.status == 2
    assert f"{typed.split()[0]} is a program: memplan takes the file that it trains from" in outcome.err
