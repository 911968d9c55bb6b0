"""``memplan verify MODEL``: train for real, measure, and hold the plan against it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.commands.arguments import (
    Parser,
    UsageError,
    add_json,
    add_recipe,
    add_run_file,
    add_switch,
    given_options,
    positive,
    whole,
)
from memplan.errors import MemplanError
from memplan.streams import remark, say

if TYPE_CHECKING:
    from memplan.asked.recipe import Recipe
    from memplan.verify.compare import Comparison
    from memplan.verify.measurement import Measurement

STATUS_TRAINED, STATUS_NOT = 0, 1

EXAMPLES = """\
Needs torch, transformers, peft, bitsandbytes and accelerate.
With --device cpu the training is as real, and storages are counted on the host
as CUDA would make them: that tests the plan's arithmetic, not a GPU.

exit status: 0 it trained, 1 it ran out of memory, failed, or did not learn, 2
it was not begun.

examples:
  memplan verify llama-3.2-1b --mode qlora --r 8
  memplan verify qwen2.5-0.5b --device cpu --layers 2 --seq-len 128
  memplan verify llama-70b --no-kbit-prep --cap a6000 --anyway --out measured
  memplan verify axolotl.yaml
  memplan verify llama-1b --loop trainer --gpus 2 --parallel fsdp2 --autocast
"""


def parser() -> Parser:
    """The arguments that ``memplan verify`` takes."""
    result = Parser(
        "verify", "Train a few steps for real and compare with the plan.", "MODEL [options]", EXAMPLES
    )
    add_run_file(result)
    formats = result.add_mutually_exclusive_group()
    add_json(formats)
    add_switch(formats, "--markdown", "print Markdown")
    add_switch(formats, "--html", "print one HTML page")
    result.add_argument(
        "--out",
        metavar="FOLDER",
        default=None,
        help="add the measurement to this folder (default: it is printed, not kept)",
    )
    add_run(result.add_argument_group("run"))
    add_recipe(result)
    return result


def add_run(group: argparse._ArgumentGroup) -> None:
    """The options of the run itself."""
    group.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="where to train (default: cuda)"
    )
    group.add_argument(
        "--layers", type=whole, metavar="N", default=None, help="cut the model, and the plan, to N layers"
    )
    group.add_argument(
        "--weights",
        metavar="WHERE",
        default=None,
        help="a folder or Hub id with safetensors (default: random weights of the same shapes)",
    )
    group.add_argument(
        "--text", metavar="FILE", default=None, help="train on this text (default: random tokens)"
    )
    group.add_argument(
        "--loop",
        choices=["memplan", "trainer", "sft"],
        default="memplan",
        help="who trains: memplan's plain loop, the Hugging Face Trainer, or TRL's SFTTrainer, the last two "
        "with MemoryCallback and on several GPUs (default: memplan)",
    )
    group.add_argument("--steps", type=whole, metavar="N", default=3, help="steps, at least 2 (default: 3)")
    group.add_argument(
        "--seed", type=whole, metavar="N", default=0, help="of weights and tokens (default: 0)"
    )
    group.add_argument(
        "--learning-rate",
        type=positive,
        metavar="X",
        default=1e-3,
        help="(default: 0.001); costs no memory",
    )
    group.add_argument(
        "--cap",
        metavar="CARD",
        default=None,
        help="let the allocator have no more than this card would leave it; a name, or a size such as 20GiB",
    )
    group.add_argument(
        "--cudnn-attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let PyTorch choose cuDNN's attention, as it does on Hopper (default: on)",
    )
    group.add_argument(
        "--timeout",
        type=positive,
        metavar="S",
        default=3600.0,
        help="end the run after S seconds (default: 3600)",
    )
    add_switch(group, "--anyway", "run it even if the plan says that it can't fit")


def run(arguments: argparse.Namespace) -> int:
    """Train, write the measurement, print the comparison; 0 if it trained."""
    from memplan import libraries
    from memplan.verify.compare import compare
    from memplan.verify.job import make_job
    from memplan.verify.measurement import SEEDS, keep, make_ready
    from memplan.verify.runner import run_job

    if not 0 <= arguments.seed < SEEDS:
        raise UsageError(f"--seed must be a whole number from 0 to {SEEDS - 1}")
    if arguments.steps < 2:
        raise UsageError("--steps must be at least 2: the first step makes the optimizer's state")
    libraries.require(doing="verifying")
    for warning in libraries.untested(libraries.installed()):
        remark(f"warning: {warning}")
    named, recipe, told = _asked(arguments)
    job = make_job(
        named,
        recipe,
        settings_of(arguments),
        device=arguments.device,
        layers=arguments.layers,
        weights=arguments.weights,
        anyway=arguments.anyway,
    )
    folder = None if arguments.out is None else Path(arguments.out)
    if folder is not None:
        make_ready(folder)
    if told is not None:
        remark(told)
    from memplan.report.progress import training
    from memplan.units import duration
    from memplan.verify.campaign import estimate

    seconds = estimate(job)
    kept = "" if folder is not None else "; --out FOLDER would keep the measurement"
    remark(
        f"training {job.run.steps} steps on {arguments.device}: about {duration(seconds)}, as a guess{kept}"
    )
    with training(job.run.steps, seconds) as tell:
        measured = run_job(job, tell=tell, seconds=arguments.timeout)
    trouble = None
    if folder is not None:
        path, trouble = keep(measured, folder)
        if trouble is None:
            remark(f"wrote {path}")
    found = compare(measured)
    show(measured, found, arguments)
    if trouble is not None:
        raise MemplanError(trouble)
    return STATUS_TRAINED if found.outcome == "trained" and found.why is None else STATUS_NOT


def _asked(arguments: argparse.Namespace) -> tuple[str, Recipe, str | None]:
    """The model's name and the recipe; where a trainer's file is asked about, as the file has them, and what
    was read of it."""
    from memplan.asked.recipe import Recipe
    from memplan.importers.resolve import resolve
    from memplan.planning.study import opened
    from memplan.verify.job import recipe_of

    options = given_options(arguments)
    named, read = opened(arguments.model, arguments.config)
    if read is None:
        return str(named), recipe_of(arguments.loop, options), None
    given = Recipe(**options)
    return str(named), read.suited(read.recipe(given), resolve(named).spec, given), read.told


def settings_of(arguments: argparse.Namespace) -> Any:
    """The options of the run as a record."""
    from memplan.verify.job import cap
    from memplan.verify.measurement import Run

    cap_bytes, cap_name = (None, None) if arguments.cap is None else cap(arguments.cap)
    return Run(
        loop=arguments.loop,
        steps=arguments.steps,
        seed=arguments.seed,
        learning_rate=arguments.learning_rate,
        text=arguments.text,
        cap_bytes=cap_bytes,
        cap_name=cap_name,
        cudnn_attention=arguments.cudnn_attention,
    )


def show(measured: Measurement, found: Comparison, arguments: argparse.Namespace) -> None:
    """Print a comparison in the format asked for."""
    if arguments.json:
        from memplan.report.machine import print_answer
        from memplan.verify.compare import as_json

        print_answer(as_json(measured, found))
    elif arguments.markdown or arguments.html:
        from memplan.report import verify

        text = verify.html if arguments.html else verify.markdown
        say(text(measured, found))
    else:
        from memplan.report.console import terminal
        from memplan.report.verify import show_verdict

        show_verdict(measured, found, terminal())
