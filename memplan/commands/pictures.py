"""What ``memplan plan`` and ``memplan trace`` do with a tape: --timeline, and the options that name files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from memplan.commands.arguments import UsageError
from memplan.errors import shown

if TYPE_CHECKING:
    from memplan.planning.plan import Plan
    from memplan.tape import Tape

_FILES = ("tape", "html", "trace_json", "snapshot")


def asked(arguments: argparse.Namespace) -> bool:
    """Whether anything is asked for that needs the tape."""
    return arguments.timeline or any(getattr(arguments, name) is not None for name in _FILES)


def check(arguments: argparse.Namespace) -> None:
    """Refuse before anything runs what can't be had together. Raises UsageError."""
    if arguments.timeline and arguments.json:
        raise UsageError("--timeline draws and --json prints data: ask for one, or for --html beside --json")
    named = [getattr(arguments, name) for name in _FILES if getattr(arguments, name) is not None]
    if not named:
        return
    from memplan.files import same_twice
    from memplan.importers.resolve import read_from

    source = read_from(arguments.model)
    for name in named if source is not None else ():
        if same_twice([str(source), name]) is not None:
            raise UsageError(f"{shown(name)} is the model's configuration, which would be written over")
    for file in filter(None, (arguments.model, getattr(arguments, "config", None))):
        if file.endswith((".yaml", ".yml")) or file == getattr(arguments, "config", None):
            for name in named:
                if same_twice([file, name]) is not None:
                    raise UsageError(f"{shown(name)} is what the question is in, and would be written over")
    twice = same_twice(named)
    if twice is not None:
        one, other = (shown(name) for name in twice)
        where = one if one == other else f"{one} and {other}, which are one place"
        raise UsageError(f"two files can't both be written to {where}")


def write(plan: Plan, tape: Tape, arguments: argparse.Namespace, given: dict[str, Any]) -> None:
    """Write the files. Raises MemplanError for one that can't be written."""
    if arguments.tape is not None:
        from memplan.tape.file import TapeInfo, save

        info = TapeInfo(
            memplan_version=plan.memplan_version,
            model=plan.model.hub_id or plan.model.name,
            recipe=plan.recipe.model_dump(mode="json"),
            libraries=plan.libraries,
        )
        save(tape, arguments.tape, info)
    if arguments.html is not None:
        from memplan.files import write_whole
        from memplan.report.html import page

        write_whole(arguments.html, page(plan, tape, given).encode(), "the page")
    if arguments.trace_json is not None:
        from memplan.files import write_whole, zipped
        from memplan.report.perfetto import trace_json

        content = trace_json(tape, f"{plan.model.name}, {plan.recipe.mode.value} ({plan.provenance})")
        write_whole(arguments.trace_json, zipped(arguments.trace_json, content), "the trace")
    if arguments.snapshot is not None:
        from memplan.snapshot.layout import snapshot_of
        from memplan.snapshot.simulated import placement
        from memplan.snapshot.writer import save_snapshot

        run = plan.run()
        save_snapshot(snapshot_of(run.tape, placement(run)), arguments.snapshot)
