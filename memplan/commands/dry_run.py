"""``memplan dry-run --gpu G -- COMMAND``: a program, unmodified, on a card that is not there."""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.commands.arguments import Parser, UsageError, add_json, add_switch, positive, whole
from memplan.emulate.cards import MOST
from memplan.ending import in_order
from memplan.errors import shown
from memplan.streams import remark

if TYPE_CHECKING:
    from memplan.emulate.answer import DryRun, Kind
    from memplan.tape import Tape

STATUS_FITS, STATUS_DOES_NOT_FIT = 0, 1
STEPS, SECONDS = 3, 900.0

EXAMPLES = """\
PyTorch's CUDA build runs as it is, allocator and all; NVIDIA's driver and
libraries are replaced by ones that hand out memory and compute nothing. What
the program allocates is real, what it computes is not: losses are 0. It
ends after its third optimizer step, and prints to standard error.

exit status: 0 if it fits (tight counts as fits), 1 if it does not, 2 for a bad
question or a program that fails by itself

examples:
  memplan dry-run --gpu a6000 -- python train.py --model ./llama-8b
  memplan dry-run --gpu 4090 -- trl sft --config sft.yaml
"""


_OF_TOKENS = (
    "text was counted by a stand-in for the model's tokenizer, a token a word: tokenised rows, or its "
    "files in the Hub's cache, have true lengths",
)


class _Once(argparse.Action):
    """An option that is given once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if getattr(namespace, self.dest, None) is not None:
            raise UsageError(f"a dry run is on one kind of card: give one {option}")
        setattr(namespace, self.dest, values)


def parser() -> Parser:
    """The arguments that ``memplan dry-run`` takes."""
    result = Parser(
        "dry-run",
        "Runs a training program as it is on a card that is not there.",
        "--gpu NAME [options] -- COMMAND ...",
        EXAMPLES,
    )
    result.add_argument(
        "--gpu",
        action=_Once,
        metavar="NAME",
        required=True,
        help="the card, such as a6000 (memplan gpus), auto, or 8xh100 for eight of them",
    )
    result.add_argument(
        "--steps",
        type=whole,
        metavar="N",
        default=None,
        help=f"end after N optimizer steps (default: {STEPS})",
    )
    add_switch(result, "--eval", "see an evaluation, too (the Trainer makes its own after step N)")
    add_switch(result, "--save", "see a checkpoint being written, too")
    result.add_argument(
        "--ranks",
        type=_ranks,
        metavar="R,…",
        default=(0,),
        help="the ranks that run, such as 0,7, or all (default: 0, which stands for all)",
    )
    result.add_argument(
        "--routing",
        choices=("even", "skewed"),
        default="even",
        help="tokens of a mixture of experts: even among them (default), or all to the same few",
    )
    result.add_argument(
        "--timeout",
        type=positive,
        metavar="S",
        default=SECONDS,
        help=f"end the program after S seconds (default: {SECONDS:.0f})",
    )
    result.add_argument(
        "--snapshot",
        metavar="FILE",
        default=None,
        help="write PyTorch's own memory snapshot (pytorch.org/memory_viz)",
    )
    result.add_argument(
        "--tape",
        metavar="FILE",
        default=None,
        help="write the last step, allocation by allocation, for memplan diff",
    )
    result.add_argument(
        "--html", metavar="FILE", default=None, help="write a page with the last step's timeline"
    )
    add_switch(
        result, "--no-watch", "only the card: nothing is watched, and the program's exit status is memplan's"
    )
    add_json(result)
    result.add_argument(
        "command", nargs="+", metavar="COMMAND", help="the program with its arguments, after --"
    )
    return result


def run(arguments: argparse.Namespace) -> int:
    """Run the program and print the answer; 0 if it fits, 1 if it does not."""
    from memplan import __version__
    from memplan.device.fit import CONTEXT_BYTES
    from memplan.device.here import find_card
    from memplan.emulate import launch
    from memplan.emulate.answer import answer, read
    from memplan.emulate.taped import read_step

    steps = STEPS if arguments.steps is None else arguments.steps
    if not steps > 0:
        raise UsageError("--steps takes a whole number above 0")
    asked: dict[Kind, bool] = {"evaluation": arguments.eval, "saving": arguments.save}
    wanted = tuple(kind for kind, given in asked.items() if given)
    files = {name: getattr(arguments, name) for name in ("snapshot", "tape", "html")}
    if arguments.no_watch and (
        wanted or any(files.values()) or arguments.json or arguments.steps is not None
    ):
        raise UsageError("with --no-watch nothing is watched: leave out what asks for an answer")
    count, name = _counted(arguments.gpu)
    if re.fullmatch(r"\d{1,3}(\.\d+)? ?(G|GB|GiB)?", name, re.IGNORECASE):
        raise UsageError(
            f"a dry run is on a card, which a size is not: name one (`memplan gpus {name}` lists those of it)"
        )
    gpu, command = find_card(name), list(arguments.command)
    if arguments.no_watch:
        env = launch.environment(gpu, command, count=count)
        status = launch.run(command, env, quiet_stdout=False)
        assert status is not None
        return status if status >= 0 else 128 - status
    for name, file in files.items():
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise UsageError(f"there is no folder for --{name} {shown(file)}")
        if file is not None and Path(file).is_dir():
            raise UsageError(f"--{name} {shown(file)} is a folder: name a file")
    context = CONTEXT_BYTES[gpu.kind]
    with in_order(), tempfile.TemporaryDirectory(prefix="memplan-dry-run-") as folder:
        watching = launch.Watching(
            Path(folder),
            steps,
            wanted,
            snapshot=arguments.snapshot is not None,
            tape=arguments.tape is not None or arguments.html is not None,
            routing=arguments.routing,
            ranks=arguments.ranks,
        )
        env = launch.environment(gpu, command, count=count, taken=context, watching=watching)
        status = launch.run(command, env, timeout=arguments.timeout)
        found = answer(
            command,
            gpu,
            read(watching.folder),
            status,
            context=context,
            count=count,
            asked=steps,
            wanted=wanted,
            ranks=arguments.ranks,
            version=__version__,
            remarks=_OF_TOKENS if (watching.folder / "stand-in").exists() else (),
        )
        tape = read_step(watching.folder) if watching.tape else None
        if arguments.snapshot is not None:
            _keep(watching.folder, Path(arguments.snapshot))
    if watching.tape:
        _write(found, tape, arguments.tape, arguments.html)
    if arguments.json:
        from memplan.report.machine import print_json

        print_json(found.model_dump(mode="json"))
    else:
        from memplan.report.console import terminal
        from memplan.report.dry_run import show_dry_run

        show_dry_run(found, terminal())
    return STATUS_DOES_NOT_FIT if found.verdict == "does not fit" else STATUS_FITS


def _ranks(text: str) -> tuple[int, ...]:
    """Ranks; none stands for all."""
    if text == "all":
        return ()
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        raise argparse.ArgumentTypeError(f"takes numbers of ranks, such as 0,7, or all, not {shown(text)}")
    return tuple(sorted({0, *map(int, text.split(","))}))  # what others are given comes from rank 0


def _counted(text: str) -> tuple[int, str]:
    """How many cards of which name: 8xh100."""
    found = re.fullmatch(r"(\d+)x(.+)", text)
    if found is None:
        return 1, text
    if len(found[1]) > 3 or not 0 < int(found[1]) <= MOST:
        raise UsageError(f"--gpu takes from 1 to {MOST} cards, not {found[1][:20]}")
    return int(found[1]), found[2]


def _write(found: DryRun, tape: Tape | None, to: str | None, html: str | None) -> None:
    """The files that are made of the last step. Raises MemplanError."""
    from memplan.files import write_whole
    from memplan.report.dry_run_page import page
    from memplan.tape.file import TapeInfo, save

    if tape is None:
        remark("nothing was allocated in a step, so there is none for --tape or --html")
        return
    if to is not None:
        save(tape, to, TapeInfo(memplan_version=found.memplan_version, libraries=found.libraries))
    if html is not None:
        write_whole(html, page(found, tape).encode(), "the page")
    for file in filter(None, (to, html)):
        remark(f"wrote {shown(file)}")


def _keep(folder: Path, to: Path) -> None:
    """The largest snapshot that the program's processes wrote, where it was asked for."""
    written = sorted(folder.glob("*.pickle"), key=lambda path: path.stat().st_size)
    if written:
        shutil.copyfile(written[-1], to)
        remark(f"wrote {shown(str(to))}")
